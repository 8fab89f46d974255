"""SoftPool for MMDetection."""
