"""Backbones for configs.

``import mmsoftpool`` registers their names; see :mod:`mmsoftpool.registry`. Each class here imports
its module, and with it mmdet's models where it needs them, when it is first used.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "GoogLeNet": "googlenet",
    "SoftPoolResNet": "resnet",
    "SoftPoolResNetV1d": "resnet",
    "SoftPoolResNeXt": "resnet",
    "soft_pool_backbone": "backbone",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
