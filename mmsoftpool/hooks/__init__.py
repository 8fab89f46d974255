"""Hooks that a config names: exact resume, and checkpoints that survive a kill or a full disk.

``configs/_base_/exact_resume.py`` has them all.
"""

from .checkpoints import AtomicCheckpointHook, find_intact_checkpoint
from .resume import EpochSeedHook, MissedValidationHook

__all__ = [
    "AtomicCheckpointHook",
    "EpochSeedHook",
    "MissedValidationHook",
    "find_intact_checkpoint",
]
