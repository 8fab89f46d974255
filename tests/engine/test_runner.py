"""Training and evaluation in this process, and the arguments that they refuse."""

import urllib.error

import pytest
import torch

from mmsoftpool import engine

from ..common import SMALL, TABLE_8, config_path, quick_and_slow


@pytest.mark.parametrize(
    "name",
    quick_and_slow(
        [f"{d}_{pool}" for d in TABLE_8 for pool in ("softpool", "maxpool")],
        *("retinanet_r18_softpool", "retinanet_r18_maxpool", "mask_rcnn_r50_softpool"),
    ),
)
def test_table_8_trains_an_iteration_and_evaluates(name, coco_root, tmp_path):
    options = {**SMALL, "data_root": str(coco_root)}
    options |= {f"{split}_dataloader.dataset.indices": 2 for split in ("train", "val")}
    mask = name.startswith("mask")
    options["model.test_cfg.rcnn.score_thr" if mask else "model.test_cfg.score_thr"] = 0.0
    runner = engine.train(engine.load_config(config_path(name), options, str(tmp_path)))
    assert runner.iter == 1
    assert 0 < runner.message_hub.get_scalar("train/loss").current() < 20
    for metric in ["bbox", "segm"] if mask else ["bbox"]:
        assert 0 <= runner.message_hub.get_scalar(f"val/coco/{metric}_mAP").current() <= 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_checks_the_data_of_both_its_splits(cfg, tmp_path, split):
    (tmp_path / "annotations" / f"instances_{split}2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"no {split} annotations"):
        engine.train(cfg)


def test_evaluation_checks_the_data(cfg, tmp_path):
    (tmp_path / "val2017" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no test images"):
        engine.test(cfg, "x.pth")


def test_a_missing_checkpoint_is_named(cfg, tmp_path):
    missing = str(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {missing}"):
        engine.test(cfg, missing)
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {missing}"):
        engine.train(cfg, resume=missing)


def test_missing_pretrained_weights_are_named(cfg, tmp_path):
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=f"no pretrained weights at {tmp_path}/x.pth"):
        engine.train(cfg)


def test_unavailable_pretrained_weights_are_reported(cfg, monkeypatch):
    class Unreachable:
        def train(self):
            raise urllib.error.URLError("no network")

    monkeypatch.setattr(engine.runner.Runner, "from_cfg", lambda cfg: Unreachable())
    message = r"weights are unavailable .*no network.*init_cfg\.checkpoint=FILE"
    with pytest.raises(FileNotFoundError, match=message):
        engine.train(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_mixed_precision_needs_a_gpu(cfg):
    with pytest.raises(ValueError, match="amp needs a GPU"):
        engine.train(cfg, amp=True)


def test_scaling_the_learning_rate_needs_a_base(cfg):
    cfg.pop("auto_scale_lr")
    with pytest.raises(ValueError, match=r"auto_scale_lr needs auto_scale_lr\.base_batch_size in "):
        engine.train(cfg, auto_scale_lr=True)


def test_predictions_are_written_as_pickle_only(cfg, tmp_path):
    (tmp_path / "x.pth").touch()
    with pytest.raises(ValueError, match=r"out must end in \.pkl or \.pickle, got x\.json"):
        engine.test(cfg, str(tmp_path / "x.pth"), out="x.json")
