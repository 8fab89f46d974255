"""Configs, and what a user gets wrong with them."""

import json
import re
import urllib.error

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsoftpool import engine

from ..common import ROOT

#: The detectors of Table 8 of the paper.
TABLE_8 = [
    *(f"retinanet_r{d}" for d in (18, 34, 50, 101)),
    *(f"mask_rcnn_r{d}" for d in (34, 50, 101)),
]
PAIRS = [*TABLE_8, "demo_retinanet"]

# A detector and its real pipeline, shrunk until a CPU trains it in seconds.
SMALL = {
    "model.backbone.init_cfg": None,
    "train_cfg.max_epochs": 1,
    "default_hooks.logger.interval": 1,
    "model.data_preprocessor.pad_size_divisor": 32,
    **{f"{split}_dataloader.num_workers": 0 for split in ("train", "val", "test")},
    **{f"{split}_dataloader.persistent_workers": False for split in ("train", "val", "test")},
    **{f"{split}_dataloader.dataset.indices": 4 for split in ("train", "val", "test")},
    "train_dataloader.dataset.pipeline.2.scale": (192, 128),
    "val_dataloader.dataset.pipeline.1.scale": (192, 128),
    "test_dataloader.dataset.pipeline.1.scale": (192, 128),
}


def config(name):
    return str(ROOT / "configs" / f"{name}.py")


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_configs_differs_in_the_pool_alone(name):
    soft, hard = (Config.fromfile(config(f"{name}_{pool}")) for pool in ("softpool", "maxpool"))
    assert "stem_pool" not in soft.model.backbone  # SoftPool is the backbone's default
    pool = hard.model.backbone.pop("stem_pool")
    assert pool == dict(type="torch.nn.MaxPool2d")
    assert soft._cfg_dict == hard._cfg_dict


@pytest.mark.parametrize("name", [f"{p}_{pool}" for p in PAIRS for pool in ("softpool", "maxpool")])
def test_configs_build_the_detector_with_the_pool_of_their_name(name):
    from mmdet.registry import MODELS

    cfg = engine.load_config(config(name))
    assert cfg.custom_imports == dict(imports=["mmsoftpool"])
    init_default_scope("mmdet")
    with torch.device("meta"):
        backbone = MODELS.build(cfg.model.backbone)
    pool = "SoftPool2d" if name.endswith("softpool") else "MaxPool2d"
    assert repr(backbone.maxpool).startswith(f"{pool}(kernel_size=3, stride=2, padding=1")
    depth = re.search(r"_r(\d+)_", name)
    assert backbone.depth == int(depth[1] if depth else 18)


@pytest.mark.parametrize(
    "name", [f"{d}_{pool}" for d in TABLE_8 for pool in ("softpool", "maxpool")]
)
def test_table_8_trains_an_iteration_and_evaluates(name, coco_root, tmp_path, capsys):
    options = {**SMALL, "data_root": str(coco_root)}
    options |= {f"{split}_dataloader.dataset.indices": 2 for split in ("train", "val")}
    mask = name.startswith("mask")
    options["model.test_cfg.rcnn.score_thr" if mask else "model.test_cfg.score_thr"] = 0.0
    runner = engine.train(engine.load_config(config(name), options, str(tmp_path)))
    assert runner.iter == 1
    assert 0 < runner.message_hub.get_scalar("train/loss").current() < 20
    for metric in ["bbox", "segm"] if mask else ["bbox"]:
        assert 0 <= runner.message_hub.get_scalar(f"val/coco/{metric}_mAP").current() <= 1


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("retinanet_r50_softpool", "retinanet/retinanet_r50_fpn_1x_coco"),
        ("mask_rcnn_r50_softpool", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco"),
    ],
)
def test_coco_configs_differ_from_mmdets_in_the_backbone_alone(tmp_path, name, base):
    (tmp_path / "base.py").write_text(f"_base_ = 'mmdet::{base}.py'")
    ours, theirs = Config.fromfile(config(name)), Config.fromfile(tmp_path / "base.py")
    assert ours.pop("custom_imports") and ours.data_root == "data/coco/"
    backbone, other = ours.model.pop("backbone"), theirs.model.pop("backbone")
    assert ours._cfg_dict == theirs._cfg_dict
    assert {k for k in backbone if backbone[k] != other.get(k)} == {"type", "init_cfg"}
    assert backbone.keys() == other.keys()


@pytest.mark.parametrize("root", ["/elsewhere/images", "/elsewhere/images/"])
@pytest.mark.parametrize(
    "name", ["retinanet_r50_softpool", "mask_rcnn_r50_softpool", "demo_retinanet_softpool"]
)
def test_one_option_moves_all_data(name, root):
    cfg = engine.load_config(config(name), dict(data_root=root))
    for split in ("train", "val", "test"):
        assert cfg[f"{split}_dataloader"].dataset.data_root == "/elsewhere/images/"
    for split in ("val", "test"):
        path = cfg[f"{split}_evaluator"].ann_file
        assert path.startswith("/elsewhere/images/annotations/instances_val") and "//" not in path
    cfg.pop("data_source", None)  # a text
    assert Config.fromfile(config(name)).data_root not in cfg.dump()


def test_other_options_and_the_work_dir():
    options = {"train_dataloader.batch_size": 5, "model.backbone.depth": 101}
    cfg = engine.load_config(config("retinanet_r50_softpool"), options)
    assert (cfg.train_dataloader.batch_size, cfg.model.backbone.depth) == (5, 101)
    assert cfg.work_dir == "work_dirs/retinanet_r50_softpool"
    assert engine.load_config(config("retinanet_r50_softpool"), None, "/x").work_dir == "/x"


class TestMistakes:
    @pytest.fixture
    def cfg(self, tmp_path):
        """A config whose data set is complete."""
        for split in ("train2017", "val2017"):
            (tmp_path / split).mkdir()
            (tmp_path / split / "1.jpg").touch()
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps({}))
        path = config("retinanet_r50_softpool")
        return engine.load_config(path, dict(data_root=str(tmp_path)), str(tmp_path / "work"))

    def test_a_complete_data_set_passes(self, cfg):
        engine.check_data(cfg, "train", "val", "test")

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_missing_annotations(self, cfg, tmp_path, split):
        path = tmp_path / "annotations" / f"instances_{split}2017.json"
        path.unlink()
        with pytest.raises(ValueError) as info:
            engine.train(cfg)
        message = str(info.value)
        assert f"no {split} annotations at {path}" in message
        assert "cocodataset.org" in message and "--cfg-options data_root=DIR" in message

    def test_missing_or_empty_image_folder(self, cfg, tmp_path):
        (tmp_path / "val2017" / "1.jpg").unlink()
        with pytest.raises(ValueError, match=f"no val images in {tmp_path}/val2017"):
            engine.check_data(cfg, "val")
        (tmp_path / "val2017").rmdir()
        with pytest.raises(ValueError, match=f"no test images in {tmp_path}/val2017"):
            engine.test(cfg, "x.pth")

    def test_the_demo_says_how_to_draw_its_data(self, tmp_path):
        cfg = engine.load_config(config("demo_retinanet_softpool"), dict(data_root=str(tmp_path)))
        with pytest.raises(ValueError, match=r"tools/make_shapes\.py"):
            engine.train(cfg)

    def test_missing_config(self, tmp_path):
        with pytest.raises(ValueError, match=f"no config file at {tmp_path}/x.py"):
            engine.load_config(str(tmp_path / "x.py"))

    def test_a_config_without_data_root(self, tmp_path):
        (tmp_path / "x.py").write_text("model = dict()")
        with pytest.raises(ValueError, match="has no data_root"):
            engine.load_config(str(tmp_path / "x.py"), dict(data_root="y"))

    def test_missing_checkpoints(self, cfg, tmp_path):
        missing = str(tmp_path / "x.pth")
        with pytest.raises(ValueError, match=f"no checkpoint at {missing}"):
            engine.test(cfg, missing)
        with pytest.raises(ValueError, match=f"no checkpoint at {missing}"):
            engine.train(cfg, resume=missing)
        cfg.load_from = None
        cfg.model.backbone.init_cfg.checkpoint = missing
        with pytest.raises(ValueError, match=f"no pretrained weights at {missing}"):
            engine.train(cfg)

    def test_pretrained_weights_out_of_reach(self, cfg, monkeypatch):
        class Unreachable:
            def train(self):
                raise urllib.error.URLError("no network")

        monkeypatch.setattr(engine.runner.Runner, "from_cfg", lambda cfg: Unreachable())
        with pytest.raises(ValueError, match=r"no network.*init_cfg\.checkpoint=FILE"):
            engine.train(cfg)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_mixed_precision_without_a_gpu(self, cfg):
        with pytest.raises(ValueError, match="--amp needs a GPU"):
            engine.train(cfg, amp=True)

    def test_learning_rate_scaling_without_a_base(self, cfg):
        cfg.pop("auto_scale_lr")
        with pytest.raises(ValueError, match="--auto-scale-lr"):
            engine.train(cfg, auto_scale_lr=True)

    def test_predictions_of_another_format(self, cfg, tmp_path):
        (tmp_path / "x.pth").touch()
        with pytest.raises(ValueError, match=r"--out must end in \.pkl"):
            engine.test(cfg, str(tmp_path / "x.pth"), out="x.json")
