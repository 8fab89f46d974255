"""Pre-training on ImageNet, and a detector that starts from its weights."""

import copy
import functools
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from mmsoftpool.config import load_config
from mmsoftpool.convert import ARCHITECTURES
from mmsoftpool.errors import UserError

from ..common import CLASSIFIERS, config_path, quick_and_slow

SPLITS = ("train", "val", "test")
# The backbones of detectors that start from the weights; mmdet's scope is a detector's.
BACKBONES = {
    **ARCHITECTURES,
    "inception_v1": dict(type="mmsoftpool.GoogLeNet"),
    "inception_v3": dict(
        type="mmpretrain.TIMMBackbone",
        model_name="inception_v3",
        features_only=True,
        out_indices=(1, 2, 3, 4),
    ),
}
every_network = pytest.mark.parametrize("name", CLASSIFIERS)


@functools.cache
def config(name):
    return load_config(config_path(name))


def backbone_config(name, init_cfg=None):
    cfg = dict(BACKBONES[name], init_cfg=init_cfg)
    if cfg["type"].startswith("SoftPool"):
        return cfg
    return dict(type="SoftPoolBackbone", include="*", backbone=cfg)


def build_on_meta(cfg, scope):
    """Builds a part of a config in a library's scope, on the meta device."""
    # mmpretrain's ResNet reads a tensor's values when it is built.
    device = "cpu" if "mmpretrain.ResNet" in str(cfg) else "meta"
    with torch.device(device), DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg).to("meta")


def build_classifier(name):
    return build_on_meta(config(f"pretrain_{name}_softpool_in1k").model, "mmpretrain")


class PoolingCalls(TorchDispatchMode):
    """Records the pooling operators that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "pool" in name:
            self.names.append(name)
        return func(*args, **kwargs or {})

    def __enter__(self):
        self.names = []
        return super().__enter__()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """ImageNet's layout with three classes; among the images some are smaller than a crop."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            size = (*random.integers(200, 400, 2), 3)
            image = random.integers(0, 255, size, dtype=np.uint8)
            cv2.imwrite(str(root / split / name / "0.jpg"), image)
    return root


@pytest.fixture
def work_dir(tmp_path):
    """A folder for checkpoints, which are too large to keep."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@every_network
def test_the_recipe_is_the_papers(name):
    cfg = config(f"pretrain_{name}_softpool_in1k")
    assert cfg.optim_wrapper.optimizer.type == "SGD" and cfg.optim_wrapper.optimizer.lr == 0.1
    schedule = cfg.param_scheduler
    assert (schedule.type, schedule.milestones, schedule.gamma) == ("MultiStepLR", [40, 80], 0.1)
    assert cfg.train_cfg.max_epochs == 100
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 256
    crop, resize = cfg.train_dataloader.dataset.pipeline[1:3]
    assert (crop.type, crop.crop_size) == ("RandomCrop", 294)
    assert (resize.type, resize.scale) == ("Resize", 224)


@every_network
def test_the_classifier_is_the_papers(name):
    classifier = build_classifier(name).train()
    if CLASSIFIERS[name]:
        parameters = sum(p.numel() for p in classifier.parameters())
        assert round(parameters / 1e6, 1) == CLASSIFIERS[name]
    # All of it is trained.
    assert all(p.requires_grad for p in classifier.parameters())
    assert all(m.training for m in classifier.modules() if isinstance(m, _BatchNorm))
    # All pools but the global one before the head are SoftPool.
    with PoolingCalls() as calls:
        features = classifier.backbone(torch.empty(2, 3, 224, 224, device="meta"))
    pools = {"densenet": 4, "inception": 13}.get(re.match(r"[a-z]+", name)[0], 1)
    assert calls.names == ["soft_pool"] * pools
    assert classifier.head(classifier.neck(features)).shape == (2, 1000)


@every_network
def test_a_classifier_has_the_detectors_backbone(name):
    classifier = build_classifier(name)
    images = torch.empty(2, 3, 128, 128, device="meta")
    levels = build_on_meta(backbone_config(name), "mmdet")(images)
    cfg = copy.deepcopy(config("retinanet_r50_softpool").model)
    cfg.backbone = backbone_config(name)
    cfg.neck.in_channels = [level.shape[1] for level in levels]
    detector = build_on_meta(cfg, "mmdet")
    assert len(detector.extract_feat(images)) == 5
    ours, theirs = (model.backbone.state_dict() for model in (classifier, detector))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    pools = [
        {name: repr(m) for name, m in model.backbone.named_modules() if "Pool" in type(m).__name__}
        for model in (classifier, detector)
    ]
    assert pools[0] == pools[1]


@pytest.mark.parametrize(
    "name", quick_and_slow(CLASSIFIERS, "resnet18", "densenet121", "inception_v1")
)
def test_it_trains_and_its_checkpoint_starts_the_detector(run_tool, image_folder, work_dir, name):
    size = 75 if name == "inception_v3" else 32
    options = [
        f"data_root={image_folder}",
        "train_cfg.max_epochs=1",
        "train_dataloader.batch_size=3",
        f"train_dataloader.dataset.pipeline.2.scale={size}",
        f"val_dataloader.dataset.pipeline.1.scale={size}",
        f"val_dataloader.dataset.pipeline.2.crop_size={size}",
        "default_hooks.logger.interval=1",
        "default_hooks.checkpoint.save_optimizer=False",
        *(f"{split}_dataloader.dataset.metainfo.classes=[a,b,c]" for split in SPLITS),
        *(f"{split}_dataloader.num_workers=0" for split in SPLITS),
        *(f"{split}_dataloader.persistent_workers=False" for split in SPLITS),
    ]
    path = config_path(f"pretrain_{name}_softpool_in1k")
    status, out, err = run_tool("train", path, "--work-dir", work_dir, "--cfg-options", *options)
    assert status == 0, err
    losses = [float(x) for x in re.findall(r"Epoch\(train\) .* loss: ([\d.]+)", out)]
    assert len(losses) == 1 and 0 < losses[0] < 100
    assert re.search(r"Epoch\(val\) \[1\].*accuracy/top1: [\d.]+ +accuracy/top5: [\d.]+", out)

    checkpoint = str(work_dir / "epoch_1.pth")
    init_cfg = dict(type="Pretrained", checkpoint=checkpoint, prefix="backbone.")
    backbone = build_on_meta(backbone_config(name, init_cfg), "mmdet").to_empty(device="cpu")
    backbone.init_weights()
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    theirs = {
        k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")
    }
    ours = backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(value.equal(theirs[key]) for key, value in ours.items())
    assert {k for k in weights if not k.startswith("backbone.")} == {
        "head.fc.weight",
        "head.fc.bias",
    }


def test_without_mmpretrain_the_error_names_what_to_install(monkeypatch):
    def fromfile(path):
        raise ModuleNotFoundError("mmpretrain is not installed, please install mmpretrain manually")

    monkeypatch.setattr(Config, "fromfile", fromfile)
    with pytest.raises(UserError, match=r"cannot be read: .*: mmpretrain is not installed"):
        load_config(config_path("pretrain_resnet50_softpool_in1k"))
