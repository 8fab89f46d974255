"""The registry scope ``mmsoftpool``, for ``type='mmsoftpool.SoftPool2d'`` in any OpenMMLab config.

mmengine imports this module when it finds the prefix, so the config needs no ``custom_imports``.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    "model", parent=MMENGINE_MODELS, scope="mmsoftpool", locations=["mmsoftpool.models"]
)
