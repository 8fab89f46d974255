"""The ResNet family with SoftPool in its stem (Stergiou et al., ICCV 2021, section 4.4).

The stem's pool is the only one that ResNet and ResNeXt have.
"""

import inspect
from typing import Any

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS

#: The arguments of the max pool in mmdet's ResNet.
_GRID = dict(kernel_size=3, stride=2, padding=1)


class _StemPool:
    """Mixin that makes the stem's pool of an mmdet ResNet configurable."""

    stem_channels: int  # mmdet's ResNet sets it

    def __init__(
        self,
        *args: Any,
        stem_pool: dict[str, Any] = dict(type="SoftPool2d", **_GRID),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        grid = {} if "kernel_size" in stem_pool else _GRID
        stem_pool = {"type": "SoftPool2d", **grid, **stem_pool}
        pool = stem_pool["type"]
        pool = MODELS.get(pool) if isinstance(pool, str) else pool
        if pool is not None and "channels" in inspect.signature(pool).parameters:
            stem_pool = {"channels": self.stem_channels, **stem_pool}
        self.maxpool = MODELS.build(stem_pool)  # the name that ResNet.forward calls


class SoftPoolResNet(_StemPool, ResNet):
    """mmdet's :class:`~mmdet.models.backbones.ResNet` with another pool in the stem, its only
    pooling layer.

    The state dict has the keys of mmdet's ResNet, so ImageNet checkpoints load without missing or
    unexpected keys.

    Note:
        With ``frozen_stages >= 0`` the stem is frozen, so the pool's backward never runs. mmdet's
        detection configs set ``frozen_stages=1``, with which ``gradient`` has no effect.

    Args:
        *args: As for mmdet's ResNet; all depths (18, 34, 50, 101, 152).
        stem_pool (dict): Config of the pool in the stem, for ``MODELS.build``. Defaults to
            ``dict(type='SoftPool2d', kernel_size=3, stride=2, padding=1)``. A type that is left out
            has its default, and without a ``kernel_size`` these three arguments have theirs:
            ``dict(alpha=4.0)`` is sharper, ``dict(type='torch.nn.MaxPool2d')`` mmdet's own pool;
            ``dict(type='SoftPool2d', kernel_size=2, stride=2)`` is the pool of the authors' code. A
            pool with an argument ``channels`` gets the stem's number of channels.
        **kwargs: As for mmdet's ResNet.

    Example:
        >>> import torch
        >>> backbone = SoftPoolResNet(depth=18)
        >>> [tuple(level.shape) for level in backbone(torch.rand(1, 3, 32, 32))]
        [(1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2), (1, 512, 1, 1)]
    """


class SoftPoolResNetV1d(_StemPool, ResNetV1d):
    """mmdet's :class:`~mmdet.models.backbones.ResNetV1d` with another pool in the stem; see
    :class:`SoftPoolResNet`.

    ResNet-D has three 3x3 convolutions in the stem and average pools in the shortcuts, which are
    kept; ``SoftPoolBackbone`` replaces them too.
    """


class SoftPoolResNeXt(_StemPool, ResNeXt):
    """mmdet's :class:`~mmdet.models.backbones.ResNeXt` with another pool in the stem; see
    :class:`SoftPoolResNet`. Depths 50, 101 and 152.

    Example:
        >>> backbone = SoftPoolResNeXt(depth=50, groups=32, base_width=4)  # ResNeXt-50 32x4d
    """
