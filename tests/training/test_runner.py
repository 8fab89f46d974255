"""Training and evaluation in this process, and the arguments that they refuse."""

import urllib.error

import pytest
import torch

from mmsoftpool import runner
from mmsoftpool.config import load_config
from mmsoftpool.errors import UserError
from mmsoftpool.runner import build_model, evaluate, load_model, train

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
    finished = train(load_config(config_path(name), options, str(tmp_path)))
    assert finished.iter == 1
    assert 0 < finished.message_hub.get_scalar("train/loss").current() < 20
    for metric in ["bbox", "segm"] if mask else ["bbox"]:
        assert 0 <= finished.message_hub.get_scalar(f"val/coco/{metric}_mAP").current() <= 1


def test_a_missing_checkpoint_is_named(cfg, tmp_path):
    missing = str(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {missing}"):
        evaluate(cfg, missing)
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {missing}"):
        train(cfg, resume=missing)


def test_missing_pretrained_weights_are_named(cfg, tmp_path):
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/x.pth can not be found"):
        train(cfg)


def test_unavailable_pretrained_weights_are_reported(cfg, monkeypatch):
    def unreachable(cfg):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(runner, "build_runner", unreachable)
    message = r"weights are unavailable .*no network.*init_cfg\.checkpoint=FILE"
    with pytest.raises(UserError, match=message):
        train(cfg)
    cfg.load_from = "https://example.com/x.pth"
    del cfg.model.backbone
    message = r"load_from=https://example\.com/x\.pth, or the pretrained weights, are unavailable"
    with pytest.raises(UserError, match=message):
        train(cfg)


@pytest.mark.parametrize("resume", [None, True])
def test_a_first_call_starts_from_load_from(cfg, tmp_path, monkeypatch, resume):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(dict(state_dict={}), tmp_path / "x.pth")
    cfg.load_from = "~/x.pth"

    def build(cfg):
        raise UserError(f"loads {cfg.load_from}, resumes: {cfg.resume}")

    monkeypatch.setattr(runner, "build_runner", build)
    with pytest.raises(UserError, match=r"loads ~/x\.pth, resumes: False"):
        train(cfg, resume=resume)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_mixed_precision_needs_a_gpu(cfg):
    with pytest.raises(ValueError, match="amp needs a GPU"):
        train(cfg, amp=True)


def test_scaling_the_learning_rate_needs_a_base(cfg):
    cfg.pop("auto_scale_lr")
    with pytest.raises(ValueError, match=r"auto_scale_lr needs auto_scale_lr\.base_batch_size in "):
        train(cfg, auto_scale_lr=True)


def test_predictions_are_written_as_pickle_only(cfg, tmp_path):
    (tmp_path / "x.pth").touch()
    with pytest.raises(ValueError, match=r"out must end in \.pkl or \.pickle, got x\.json"):
        evaluate(cfg, str(tmp_path / "x.pth"), out="x.json")


class TestLoadModel:
    @pytest.fixture
    def demo(self):
        return load_config(config_path("demo_retinanet_softpool"))

    def test_weights_that_do_not_fit_are_three_mismatches_and_their_number(self, demo, tmp_path):
        weights = build_model(demo).state_dict()
        weights["bbox_head.retina_cls.bias"] = torch.zeros(1)
        del weights["backbone.conv1.weight"]
        weights.update({f"x{i}": torch.zeros(1) for i in range(5)})
        torch.save(dict(state_dict=weights), tmp_path / "x.pth")
        with pytest.raises(UserError) as error:
            load_model(demo, str(tmp_path / "x.pth"))
        assert str(error.value).endswith(
            "7 mismatches, bbox_head.retina_cls.bias has the shape (1,), not (24,); "
            "backbone.conv1.weight is missing; x0 is unexpected; ..."
        )

    def test_a_text_file_is_not_a_checkpoint(self, demo, tmp_path):
        (tmp_path / "x.pth").write_text("weights")
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load_model(demo, str(tmp_path / "x.pth"))
