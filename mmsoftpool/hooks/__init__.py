"""Hooks that a config names: exact resume, checkpoints that survive a kill or a full disk (both in
``configs/_base_/exact_resume.py``), and a sharpness that changes during the training."""

from .alpha import AlphaAnnealingHook, RandomAlphaHook
from .checkpoints import AtomicCheckpointHook, find_intact_checkpoint
from .resume import EpochSeedHook, MissedValidationHook

__all__ = [
    "AlphaAnnealingHook",
    "AtomicCheckpointHook",
    "EpochSeedHook",
    "MissedValidationHook",
    "RandomAlphaHook",
    "find_intact_checkpoint",
]
