"""Inception v1, which mmdet, mmpretrain and timm do not have, as a backbone."""

from typing import Any

from mmengine.model import BaseModule
from torch import Tensor


class GoogLeNet(BaseModule):
    """torchvision's GoogLeNet up to its last block (Szegedy et al., CVPR 2015, with batch norm).

    Parameters have torchvision's names. The pools are max pools; ``SoftPoolBackbone`` replaces
    them. Needs torchvision.

    Args:
        init_cfg (dict, optional): Config of the initialization, as for every backbone. Defaults to
            None, torchvision's random weights.

    Example:
        >>> import torch
        >>> from mmengine.registry import MODELS
        >>> cfg = dict(type="SoftPoolBackbone", backbone=dict(type="mmsoftpool.GoogLeNet"))
        >>> [tuple(level.shape) for level in MODELS.build(cfg)(torch.rand(2, 3, 64, 64))]
        [(2, 192, 16, 16), (2, 480, 8, 8), (2, 832, 4, 4), (2, 1024, 2, 2)]
    """

    #: The last modules of the levels with strides 4, 8, 16 and 32.
    LEVELS = ("conv3", "inception3b", "inception4e", "inception5b")

    def __init__(self, init_cfg: dict[str, Any] | None = None):
        from torchvision.models import googlenet  # here: importing mmsoftpool needs no torchvision

        super().__init__(init_cfg)
        for name, module in googlenet(aux_logits=False, init_weights=True).named_children():
            self.add_module(name, module)
            if name == self.LEVELS[-1]:
                break

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The four levels of an image (N, 3, H, W)."""
        levels = []
        for name, module in self.named_children():  # in the order of their calls
            x = module(x)
            if name in self.LEVELS:
                levels.append(x)
        return tuple(levels)
