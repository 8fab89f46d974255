"""SoftPoolBackbone: mmdet's, mmpretrain's and timm's backbones with their pools replaced."""

import mmdet.registry
import mmengine.registry
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

from mmsoftpool import SoftPool2d, replace_pooling
from mmsoftpool.config import load_config

from ..common import randn

RES2NET = dict(type="Res2Net", depth=50, frozen_stages=1, norm_eval=True)
BACKBONES = {
    "mmdet": (RES2NET, ["maxpool", "layer2.0.downsample.0"]),
    "mmpretrain": (
        dict(type="mmpretrain.DenseNet", arch="121", out_indices=(0, 1, 2, 3)),
        ["stem.3", "transitions.2.pool"],
    ),
    "timm": (
        dict(type="mmpretrain.TIMMBackbone", model_name="densenet121", features_only=True),
        ["timm_model.features_pool0", "timm_model.features_transition3.pool"],
    ),
}


def build(cfg, **settings):
    wrapped = dict(type="SoftPoolBackbone", backbone=cfg, **settings)
    return mmdet.registry.MODELS.build(wrapped)


@pytest.mark.parametrize("library", BACKBONES)
def test_it_is_the_backbone_with_its_pools_replaced(library):
    cfg, names = BACKBONES[library]
    theirs = mmdet.registry.MODELS.build(cfg)
    ours = build(cfg)
    assert type(ours) is type(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name in names:
        assert type(ours.get_submodule(name)) is SoftPool2d
    ours.load_state_dict(theirs.state_dict(), strict=True)
    replace_pooling(theirs)
    for backbone in (ours, theirs):
        backbone.eval()
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        for level, other in zip(ours(x), theirs(x), strict=True):
            assert level.equal(other)


def test_frozen_stages_and_norm_eval_are_the_backbones():
    ours = build(RES2NET)
    ours.train()
    assert not any(p.requires_grad for p in ours.layer1.parameters())
    assert all(p.requires_grad for p in ours.layer2.parameters())
    assert not any(m.training for m in ours.modules() if isinstance(m, nn.BatchNorm2d))


def test_init_cfg_is_the_backbones(tmp_path):
    file = str(tmp_path / "weights.pth")
    theirs = mmdet.registry.MODELS.build(RES2NET)
    torch.save(dict(state_dict=theirs.state_dict()), file)
    ours = build({**RES2NET, "init_cfg": dict(type="Pretrained", checkpoint=file)})
    ours.init_weights()
    assert all(v.equal(theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_include_exclude_and_pool():
    cfg = dict(type="Res2Net", depth=50)
    pools = [n for n, m in build(cfg, include=["maxpool"]).named_modules() if type(m) is SoftPool2d]
    assert pools == ["maxpool"]
    ours = build(
        cfg, include=["torch.nn.MaxPool2d"], pool=dict(type="SoftPool2d", gradient="paper")
    )
    assert ours.maxpool.gradient == "paper" and type(ours.layer2[0].pool) is nn.AvgPool2d
    assert type(build(cfg, exclude=["maxpool"]).maxpool) is nn.MaxPool2d
    with pytest.raises(ValueError, match="include has 'stem', which matches no pool; Res2Net has"):
        build(cfg, include=["stem"])


def test_a_running_configs_scope_goes_first():
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        ours = mmengine.registry.MODELS.build(
            dict(type="SoftPoolBackbone", backbone=dict(type="DenseNet", arch="121"))
        )
    assert type(ours).__module__.startswith("mmpretrain.")


def test_any_detectors_config_by_one_line(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        '_base_ = "mmdet::res2net/faster-rcnn_res2net-101_fpn_2x_coco.py"\n'
        'custom_imports = dict(imports=["mmsoftpool"])\n'
        "model = dict(backbone=dict(\n"
        '    _delete_=True, type="SoftPoolBackbone", backbone={{_base_.model.backbone}}\n'
        "))\n"
    )
    cfg = load_config(str(path))
    assert Config.fromfile(path).model.backbone.backbone.depth == 101
    cfg.model.backbone.backbone.update(depth=50, init_cfg=None)
    init_default_scope("mmdet")
    model = mmdet.registry.MODELS.build(cfg.model)
    assert type(model.backbone.maxpool) is SoftPool2d
    assert "backbone.layer1.0.conv1.weight" in model.state_dict()
