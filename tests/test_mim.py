"""The index of the configs for mim, and the registry scope for other OpenMMLab libraries."""

import os
import re

import pytest
import yaml
from mmengine.registry import MODELS, Registry

from .common import ROOT, config_path

METAFILE = yaml.safe_load((ROOT / "configs" / "metafile.yml").read_text())


def test_the_metafile_names_every_config_and_no_other():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    assert index == {"Import": ["configs/metafile.yml"]}
    named = [model["Config"] for model in METAFILE["Models"]]
    assert sorted(named) == sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "configs").rglob("*.py")
        if path.parent.name != "_base_"
    )
    for model in METAFILE["Models"]:
        assert config_path(model["Name"]) == str(ROOT / model["Config"])
        assert model["In Collection"] in [entry["Name"] for entry in METAFILE["Collections"]]
    for collection in METAFILE["Collections"]:
        assert (ROOT / collection["README"]).is_file()


def test_an_editable_install_links_to_the_configs():
    shipped = ROOT / "mmsoftpool" / ".mim"
    assert os.readlink(shipped / "configs") == "../../configs"
    assert (shipped / "model-index.yml").read_text() == (ROOT / "model-index.yml").read_text()


@pytest.fixture(params=["mmpretrain", "mmseg"])
def other_library(request):
    """The registry of another OpenMMLab library: a child of mmengine's."""
    if request.param == "mmpretrain":
        from mmpretrain.registry import MODELS as mmpretrain_models

        yield mmpretrain_models
        return
    yield Registry("model", parent=MODELS, scope=request.param, locations=["mmsoftpool"])
    MODELS.children.pop(request.param)


def test_other_libraries_find_pools_and_backbones(other_library):
    for name in ("SoftPool2d", "mmsoftpool.SoftPool2d"):
        assert type(other_library.build(dict(type=name, kernel_size=2))).__name__ == "SoftPool2d"
    backbone = other_library.build(dict(type="mmsoftpool.SoftPoolResNet", depth=18))
    assert type(backbone.maxpool).__name__ == "SoftPool2d"


def test_the_prefix_needs_no_custom_imports(run_script):
    code = (
        "from mmengine.registry import MODELS\n"
        "print(MODELS.build(dict(type='mmsoftpool.SoftPool2d', kernel_size=2)))\n"
        "backbone = MODELS.build(dict(type='SoftPoolResNet', depth=18, _scope_='mmsoftpool'))\n"
        "print(backbone.maxpool)"
    )
    assert len(re.findall(r"^SoftPool2d\(", run_script("-c", code).stdout, re.MULTILINE)) == 2


def test_every_model_is_in_the_scope():
    import mmdet.registry

    from mmsoftpool.registry import MODELS as ours

    for registry in (MODELS, mmdet.registry.MODELS):
        for name, module in registry.module_dict.items():
            if module.__module__.startswith("mmsoftpool."):
                assert ours.get(name) is module
