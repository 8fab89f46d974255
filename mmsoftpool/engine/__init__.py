"""Training and evaluation of detectors from configs, on mmengine's Runner."""

from .build import build_model
from .config import coco_metrics, load_config
from .data import check_data
from .resume import EpochSeedHook, find_intact_checkpoint, keep_torch_seed
from .runner import build_runner, load_model, read_weights, test, train

__all__ = [
    "EpochSeedHook",
    "build_model",
    "build_runner",
    "check_data",
    "coco_metrics",
    "find_intact_checkpoint",
    "keep_torch_seed",
    "load_config",
    "load_model",
    "read_weights",
    "test",
    "train",
]
