"""SoftPool for MMDetection.

Requires only torch. Where mmengine and mmdet are installed, the modules, backbones and hooks are
registered as well, so that ``custom_imports = dict(imports=['mmsoftpool'])`` is all that a config
needs.
"""

import importlib.util
import warnings

from . import ops
from .ops import *  # noqa: F403 (its __all__)
from .replace import replace_pooling

__version__ = "0.1.0"
__all__ = ["replace_pooling"]
__all__ += ops.__all__

if importlib.util.find_spec("mmengine") is not None:
    try:
        from . import registry  # noqa: F401
    except Exception as error:  # mmdet checks mmcv's version by assert, mmcv's ops may not load
        warnings.warn(
            "mmsoftpool: OpenMMLab's packages are installed but cannot be imported, so nothing is "
            f"registered for configs: {type(error).__name__}: {error}",
            stacklevel=2,
        )
