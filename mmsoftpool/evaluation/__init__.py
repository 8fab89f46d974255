"""Comparison of models with confidence intervals, and submissions to the COCO server."""
