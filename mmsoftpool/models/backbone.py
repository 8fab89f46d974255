"""SoftPoolBackbone: any backbone with its pools replaced, from a config."""

import importlib
import importlib.util
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from ..replace import replace_pooling


def soft_pool_backbone(
    backbone: dict[str, Any],
    pool: Any = dict(type="SoftPool2d"),
    include: Any = None,
    exclude: Any = (),
) -> nn.Module:
    """Builds a backbone and replaces its pools; ``SoftPoolBackbone`` in a config.

    The result is the backbone itself, not a wrapper: outputs, ``init_cfg``, ``frozen_stages``,
    ``norm_eval`` and checkpoint keys are unchanged.

    Args:
        backbone: Config of a backbone of mmdet, mmpretrain (``type='mmpretrain.DenseNet'``) or timm
            (``type='mmpretrain.TIMMBackbone'``), with all of its own settings.
        pool: The new pool, as for :func:`mmsoftpool.replace_pooling`, such as
            ``dict(type='SoftPool2d', alpha=4.0)``. Defaults to ``dict(type='SoftPool2d')``.
        include: Names and classes of the pools to replace, as for
            :func:`mmsoftpool.replace_pooling`; a class of torch as ``'torch.nn.MaxPool2d'``.
            Defaults to None, all max and average pools except global ones.
        exclude: Names and classes of the pools to keep. Defaults to none.

    Returns:
        The backbone.

    Raises:
        ValueError: See :func:`mmsoftpool.replace_pooling`.

    Example:
        >>> from mmengine.registry import MODELS
        >>> cfg = dict(type="SoftPoolBackbone", backbone=dict(type="mmdet.Res2Net", depth=50))
        >>> type(MODELS.build(cfg).maxpool).__name__
        'SoftPool2d'
    """
    registry: Any = MODELS
    if importlib.util.find_spec("mmdet") is not None:
        # A type without prefix is looked up in the default scope of the running config, such as
        # mmpretrain, and then in mmdet.
        registry = importlib.import_module("mmdet.registry").MODELS
    module: nn.Module = registry.build(backbone)
    replace_pooling(module, pool, include=include, exclude=exclude)
    return module
