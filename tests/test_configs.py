"""The configs of the project: pairs that differ in the pool, on mmdet's own configs."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsoftpool.config import load_config

from .common import TABLE_8, config_path

PAIRS = [*TABLE_8, "demo_retinanet", "bccd_retinanet", "bccd_retinanet_r50"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_configs_differs_in_the_pool_alone(name):
    soft, hard = (
        Config.fromfile(config_path(f"{name}_{pool}")) for pool in ("softpool", "maxpool")
    )
    assert "stem_pool" not in soft.model.backbone  # SoftPool is the backbone's default
    assert hard.model.backbone.pop("stem_pool").type == "torch.nn.MaxPool2d"
    assert soft._cfg_dict == hard._cfg_dict


@pytest.mark.parametrize("name", [f"{p}_{pool}" for p in PAIRS for pool in ("softpool", "maxpool")])
def test_configs_build_the_detector_with_the_pool_of_their_name(name):
    from mmdet.registry import MODELS

    cfg = load_config(config_path(name))
    assert cfg.custom_imports == dict(imports=["mmsoftpool"])
    init_default_scope("mmdet")
    with torch.device("meta"):
        backbone = MODELS.build(cfg.model.backbone)
    pool = "SoftPool2d" if name.endswith("softpool") else "MaxPool2d"
    assert repr(backbone.maxpool).startswith(f"{pool}(kernel_size=3, stride=2, padding=1")
    depth = re.search(r"_r(\d+)_", name)
    assert backbone.depth == int(depth[1] if depth else 18)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("bccd_retinanet_avgpool", "AvgPool2d(kernel_size=3, stride=2, padding=1)"),
        ("bccd_retinanet_softpool_alpha4", "alpha=4.0, gradient='exact'"),
        ("bccd_retinanet_softpool_paper", "alpha=1.0, gradient='paper'"),
        ("bccd_retinanet_r50_softpool_alpha4", "alpha=4.0, gradient='exact'"),
        ("bccd_retinanet_r50_softpool_alpha8", "alpha=8.0, gradient='exact'"),
        ("bccd_retinanet_r50_softpool_alpha16", "alpha=16.0, gradient='exact'"),
        ("demo_retinanet_softpool_alpha4", "alpha=4.0, gradient='exact'"),
    ],
)
def test_a_variant_differs_from_its_base_in_the_pool_alone(name, pool):
    from mmdet.registry import MODELS

    base, variant = (
        Config.fromfile(config_path(n))
        for n in (re.sub("(avg|soft)pool.*", "softpool", name), name)
    )
    init_default_scope("mmdet")
    with torch.device("meta"):
        assert pool in repr(MODELS.build(variant.model.backbone).maxpool)
    variant.model.backbone.pop("stem_pool")
    assert base._cfg_dict == variant._cfg_dict


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("retinanet_r50_softpool", "retinanet/retinanet_r50_fpn_1x_coco"),
        ("mask_rcnn_r50_softpool", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco"),
    ],
)
def test_coco_configs_differ_from_mmdets_in_backbone_and_resume_only(tmp_path, name, base):
    (tmp_path / "base.py").write_text(f"_base_ = 'mmdet::{base}.py'")
    ours, theirs = Config.fromfile(config_path(name)), Config.fromfile(tmp_path / "base.py")
    assert ours.pop("custom_imports") and ours.data_root == "data/coco/"
    hooks = Config.fromfile(config_path("_base_/exact_resume")).exact_resume
    theirs.merge_from_dict(dict(default_hooks=hooks))
    backbone, other = ours.model.pop("backbone"), theirs.model.pop("backbone")
    assert ours._cfg_dict == theirs._cfg_dict
    assert {k for k in backbone if backbone[k] != other.get(k)} == {"type", "init_cfg"}
    assert backbone.keys() == other.keys()
