"""OpenMMLab registration: the pools for all of its libraries, the backbones for mmdet."""

import importlib.util
from pathlib import Path

from mmengine.analysis import complexity_analysis
from mmengine.config import Config
from mmengine.registry import MODELS

from .. import registry
from ..ops import SoftPool1d, SoftPool2d, SoftPool3d
from ..ops.flops import FVCORE
from .backbone import soft_pool_backbone  # noqa: F401
from .googlenet import GoogLeNet  # noqa: F401
from .pooling_methods import (
    GatedPool2d,
    LearnedNormPool2d,
    LIPool2d,
    LiteS3DPPool2d,
    PowerAvgPool2d,
    S3Pool2d,
    StochasticPool2d,
    SumPool2d,
)

# In the root registry, where mmdet, mmpretrain and the other libraries find them. force, because
# this module may be imported again after the import of mmdet below has failed.
for _module in (
    SoftPool1d,
    SoftPool2d,
    SoftPool3d,
    PowerAvgPool2d,
    SumPool2d,
    LearnedNormPool2d,
    GatedPool2d,
    LiteS3DPPool2d,
    LIPool2d,
    StochasticPool2d,
    S3Pool2d,
):
    MODELS.register_module(module=_module, force=True)


# mmengine has no public way to add a formula to its default ones.
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(FVCORE)

_find_base = Config._get_cfg_path


def _find_base_of_ours(path: str, filename: str) -> tuple[str, str | None]:
    """Finds the file of ``_base_ = "mmsoftpool::NAME.py"``, one of the configs in this package.

    mmengine finds only configs of the packages that it lists, and only those in subfolders.
    """
    if path.startswith("mmsoftpool::"):
        name = path.partition("::")[2]
        return str(Path(__file__).parents[1] / ".mim" / "configs" / name), None
    return _find_base(path, filename)


if not hasattr(_find_base, "__wrapped__"):  # once, however often this module is imported
    _find_base_of_ours.__wrapped__ = _find_base
    Config._get_cfg_path = staticmethod(_find_base_of_ours)

if importlib.util.find_spec("mmdet") is not None:
    import mmdet.registry

    from .resnet import SoftPoolResNet, SoftPoolResNetV1d, SoftPoolResNeXt  # noqa: F401

    # The scope mmsoftpool finds the modules of its parent, but not those of its sibling mmdet.
    for _name, _module in mmdet.registry.MODELS.module_dict.items():
        if _module.__module__.startswith(__name__):
            registry.MODELS.register_module(name=_name, module=_module)
