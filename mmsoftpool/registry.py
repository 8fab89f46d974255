"""The scope ``mmsoftpool``: any OpenMMLab config can say ``type='mmsoftpool.SoftPool2d'``.

mmengine imports this module when it meets the prefix, so such a config needs no ``custom_imports``.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    "model", parent=MMENGINE_MODELS, scope="mmsoftpool", locations=["mmsoftpool.models"]
)
