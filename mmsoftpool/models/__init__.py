"""Backbones for configs, and the pooling methods that the paper compares SoftPool with.

``import mmsoftpool`` registers their names; see :mod:`mmsoftpool.registry`. Each class here imports
its module, and with it mmdet's models where it needs them, when it is first used.
"""

from importlib import import_module
from typing import Any

from .pooling_methods import REGISTERED

_MODULES = {
    "GoogLeNet": "googlenet",
    "SoftPoolResNet": "resnet",
    "SoftPoolResNetV1d": "resnet",
    "SoftPoolResNeXt": "resnet",
    "soft_pool_backbone": "backbone",
    **{pool.__name__: "pooling_methods" for pool in REGISTERED},
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
