"""Training and evaluation of detectors from configs, on mmengine's Runner."""

from .build import build_model, build_optimizer
from .checkpoints import AtomicCheckpointHook, find_intact_checkpoint
from .config import coco_metrics, load_config, require
from .data import check_data
from .resume import EpochSeedHook, MissedValidationHook, keep_torch_seed
from .runner import build_runner, load_model, read_weights, test, train

__all__ = [
    "AtomicCheckpointHook",
    "EpochSeedHook",
    "MissedValidationHook",
    "build_model",
    "build_optimizer",
    "build_runner",
    "check_data",
    "coco_metrics",
    "find_intact_checkpoint",
    "keep_torch_seed",
    "load_config",
    "load_model",
    "read_weights",
    "require",
    "test",
    "train",
]
