"""Registration with OpenMMLab's registries, all in one place.

A registered name is a function that imports its module when it is called, so ``import mmsoftpool``
imports neither mmdet's models nor mmcv's operators. The pools, which need only torch, are
registered themselves.

mmengine imports this module when it finds the prefix ``mmsoftpool.`` in a config, as in
``type='mmsoftpool.SoftPool2d'``; such a config needs no ``custom_imports``.
"""

import importlib.util
import warnings
from importlib import import_module

from mmengine.registry import FUNCTIONS, HOOKS, TRANSFORMS, Registry
from mmengine.registry import MODELS as ROOT

from . import _openmmlab, ops

#: The scope ``mmsoftpool``, which has every model of this package.
MODELS = Registry("model", parent=ROOT, scope="mmsoftpool")


def _register(name: str, module, *registries: Registry) -> None:
    for registry in registries:
        if name in registry.module_dict:
            warnings.warn(
                f"mmsoftpool: {name} in the registry {registry.scope}.{registry.name} is "
                f"{registry.module_dict[name]!r}, which is kept; use mmsoftpool.{name} for this "
                "one",
                stacklevel=2,
            )
        else:
            registry.register_module(name=name, module=module)


def _builder(module: str, name: str):
    """A function that imports the class ``name`` when it is called, and makes an instance."""

    def build(*args, **kwargs):
        return getattr(import_module(module, __package__), name)(*args, **kwargs)

    build.__name__ = build.__qualname__ = name
    return build


# In the root registry: mmdet, mmpretrain and the other libraries find these without a prefix.
for _name in ops.__all__:
    if isinstance(getattr(ops, _name), type):
        _register(_name, getattr(ops, _name), MODELS, ROOT)
_register("SoftPoolBackbone", _builder(".models.backbone", "soft_pool_backbone"), MODELS, ROOT)

for _name, _module in (
    ("AtomicCheckpointHook", ".hooks.checkpoints"),
    ("EpochSeedHook", ".hooks.resume"),
    ("MissedValidationHook", ".hooks.resume"),
    ("RandomAlphaHook", ".hooks.alpha"),
    ("AlphaAnnealingHook", ".hooks.alpha"),
):
    _register(_name, _builder(_module, _name), HOOKS)

# Only in the scope mmsoftpool: a name that others may have too.
_register("GoogLeNet", _builder(".models.googlenet", "GoogLeNet"), MODELS)

if importlib.util.find_spec("mmdet") is not None:
    import mmdet.registry

    for _name in ("SoftPoolResNet", "SoftPoolResNetV1d", "SoftPoolResNeXt"):
        _register(_name, _builder(".models.resnet", _name), MODELS, mmdet.registry.MODELS)

# For checkpoints of development versions, which have these names in their configs.
_register("NamingLoadImageFromFile", _builder("mmcv.transforms", "LoadImageFromFile"), TRANSFORMS)


@FUNCTIONS.register_module()
def keep_torch_seed(worker_id: int) -> None:
    """A ``worker_init_fn`` that keeps the seed that torch gives a worker.

    torch draws it from the generator of the main process, so it differs between epochs. mmengine's
    own ``worker_init_fn`` sets the same seed in every epoch.
    """


_openmmlab.count_flops()
