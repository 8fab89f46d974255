"""Pre-training on ImageNet, and a detector that starts from its weights."""

import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmsoftpool import SoftPool2d, engine

from ..common import config_path

DEPTHS = [18, 34, 50, 101]
SPLITS = ("train", "val", "test")


def config(name, **options):
    return engine.load_config(config_path(name), options)


def build(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """ImageNet's layout with three classes; among the images some are smaller than a crop."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (*random.integers(200, 400, 2), 3)
                image = random.integers(0, 255, size, dtype=np.uint8)
                cv2.imwrite(str(root / split / name / f"{i}.jpg"), image)
    return root


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_recipe_is_the_papers(depth):
    cfg = config(f"pretrain_resnet{depth}_softpool_in1k")
    assert cfg.model.backbone.depth == depth
    assert cfg.optim_wrapper.optimizer.type == "SGD" and cfg.optim_wrapper.optimizer.lr == 0.1
    schedule = cfg.param_scheduler
    assert (schedule.type, schedule.milestones, schedule.gamma) == ("MultiStepLR", [40, 80], 0.1)
    assert cfg.train_cfg.max_epochs == 100
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 256
    crop, resize = cfg.train_dataloader.dataset.pipeline[1:3]
    assert (crop.type, crop.crop_size) == ("RandomCrop", 294)
    assert (resize.type, resize.scale) == ("Resize", 224)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_classifier_has_the_detectors_backbone(depth):
    channels = [(1 if depth < 50 else 4) * n for n in (64, 128, 256, 512)]
    with torch.device("meta"):
        classifier = build(config(f"pretrain_resnet{depth}_softpool_in1k"))
        options = {"model.backbone.depth": depth, "model.neck.in_channels": channels}
        detector = build(config("retinanet_r50_softpool", **options))
        last = classifier.backbone(torch.empty(2, 3, 224, 224))[-1]
    assert last.shape[1] == classifier.head.in_channels == channels[-1]
    assert type(classifier.backbone.maxpool) is SoftPool2d
    assert repr(classifier.backbone.maxpool) == repr(detector.backbone.maxpool)
    ours = {k: v.shape for k, v in classifier.backbone.state_dict().items()}
    assert ours == {k: v.shape for k, v in detector.backbone.state_dict().items()}
    classifier.train()
    assert classifier.backbone.bn1.training and classifier.backbone.conv1.weight.requires_grad


def test_it_trains_and_its_checkpoint_starts_the_detector(run_script, image_folder, tmp_path):
    options = [
        f"data_root={image_folder}",
        "train_cfg.max_epochs=1",
        "train_dataloader.batch_size=3",
        "default_hooks.logger.interval=1",
        *(f"{split}_dataloader.dataset.metainfo.classes=[a,b,c]" for split in SPLITS),
        *(f"{split}_dataloader.num_workers=0" for split in SPLITS),
        *(f"{split}_dataloader.persistent_workers=False" for split in SPLITS),
    ]
    config_file = "configs/pretrain_resnet50_softpool_in1k.py"
    out = run_script(
        "tools/train.py", config_file, "--work-dir", tmp_path, "--cfg-options", *options
    ).stdout
    losses = [float(x) for x in re.findall(r"Epoch\(train\) .* loss: ([\d.]+)", out)]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert re.search(r"Epoch\(val\) \[1\].*accuracy/top1: [\d.]+ +accuracy/top5: [\d.]+", out)

    checkpoint = str(tmp_path / "epoch_1.pth")
    detector = build(
        config(
            "retinanet_r50_softpool",
            **{
                "model.backbone.init_cfg.checkpoint": checkpoint,
                "model.backbone.init_cfg.prefix": "backbone.",
            },
        )
    )
    detector.backbone.init_weights()
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    theirs = {
        k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")
    }
    ours = detector.backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(value.equal(theirs[key]) for key, value in ours.items())
    assert {k for k in weights if not k.startswith("backbone.")} == {
        "head.fc.weight",
        "head.fc.bias",
    }


def test_without_mmpretrain_the_error_names_what_to_install(monkeypatch):
    def fromfile(path):
        raise ModuleNotFoundError("mmpretrain is not installed, please install mmpretrain manually")

    monkeypatch.setattr(engine.config.Config, "fromfile", fromfile)
    with pytest.raises(ValueError, match=r"needs mmpretrain: pip install 'mmsoftpool\[pretrain\]'"):
        config("pretrain_resnet50_softpool_in1k")
