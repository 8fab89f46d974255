from .functional import soft_pool1d, soft_pool2d, soft_pool3d
from .modules import SoftPool1d, SoftPool2d, SoftPool3d

__all__ = [
    "SoftPool1d",
    "SoftPool2d",
    "SoftPool3d",
    "soft_pool1d",
    "soft_pool2d",
    "soft_pool3d",
]
