"""What is there for OpenMMLab: the pools in its registry, and the backbones for mmdet."""

import importlib.util

from mmengine.registry import MODELS

from ..ops import SoftPool1d, SoftPool2d, SoftPool3d

# In the root registry, so that mmdet, mmpretrain and the rest all find them.
for _module in (SoftPool1d, SoftPool2d, SoftPool3d):
    MODELS.register_module(module=_module)

if importlib.util.find_spec("mmdet") is not None:
    from .resnet import SoftPoolResNet  # noqa: F401
