"""YOLOX and RTMDet with SoftPool in their SPP blocks."""

import re
import shutil
import urllib.error

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmsoftpool import SoftPool2d, export, runner
from mmsoftpool.config import load_config
from mmsoftpool.evaluation.comparison import compare_detections
from mmsoftpool.evaluation.swap import evaluate_swap
from mmsoftpool.runner import evaluate, train

from ..common import ROOT, quick_and_slow, randn

BASES = {"yolox_s": "yolox/yolox_s_8xb8-300e_coco", "rtmdet_s": "rtmdet/rtmdet_s_8xb32-300e_coco"}
POOLS = {"softpool": SoftPool2d, "maxpool": nn.MaxPool2d}

# A quarter of the channels, a block per stage, and few images in one worker.
SMALL = {
    "model.backbone.backbone.init_cfg": None,
    "model.backbone.backbone.widen_factor": 0.125,
    "model.backbone.backbone.deepen_factor": 0.1,
    "model.neck.in_channels": [32, 64, 128],
    "model.neck.out_channels": 32,
    "model.bbox_head.in_channels": 32,
    "model.bbox_head.feat_channels": 32,
    "model.bbox_head.stacked_convs": 1,
    "model.test_cfg.score_thr": 0.0,  # an untrained detector has detections too
    "model.test_cfg.min_bbox_size": -1,
    "train_cfg.max_epochs": 1,
    "train_cfg.val_interval": 1,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.logger.interval": 1,
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 1,
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
    "val_dataloader.dataset.indices": 2,
}


def config(name):
    return str(ROOT / "configs" / f"{name}.py")


def small(name, work_dir, coco_root=None, images=2, **options):
    """The config of a detector, shrunk until a CPU trains it in seconds."""
    dataset = "dataset.dataset" if name.startswith("yolox") else "dataset"
    options = {**SMALL, f"train_dataloader.{dataset}.indices": images, **options}
    if coco_root is not None:
        options["data_root"] = str(coco_root)
    cfg = load_config(config(name), options, str(work_dir))
    shrink(cfg._cfg_dict)
    return cfg


def shrink(node):
    """Divides all image sizes of a config by five, 640x640 becomes 128x128."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            shrink(value)
        elif isinstance(value, tuple) and all(isinstance(v, int) and abs(v) >= 320 for v in value):
            node[key] = tuple(v // 5 for v in value)


@pytest.mark.parametrize("name", BASES)
def test_a_pair_of_configs_differs_in_the_pool_alone(name):
    soft, hard = (Config.fromfile(config(f"{name}_{pool}")) for pool in POOLS)
    assert "pool" not in soft.model.backbone  # SoftPool is the default
    assert hard.model.backbone.pop("pool") == dict(type="torch.nn.MaxPool2d")
    assert soft._cfg_dict == hard._cfg_dict


@pytest.mark.parametrize("name", BASES)
def test_the_config_is_mmdets_with_its_backbone_wrapped(tmp_path, name):
    (tmp_path / "base.py").write_text(f"_base_ = 'mmdet::{BASES[name]}.py'")
    ours, theirs = (
        Config.fromfile(config(f"{name}_softpool")),
        Config.fromfile(tmp_path / "base.py"),
    )
    assert ours.pop("custom_imports") == dict(imports=["mmsoftpool"])
    theirs.merge_from_dict(
        dict(default_hooks=Config.fromfile(config("_base_/exact_resume")).exact_resume)
    )
    wrapped = dict(type="SoftPoolBackbone", backbone=theirs.model.backbone)
    assert ours.model.backbone == wrapped
    ours.model.backbone = theirs.model.backbone
    assert ours._cfg_dict == theirs._cfg_dict


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("pool", POOLS)
def test_the_pools_of_the_spp_block(name, pool):
    cfg = load_config(config(f"{name}_{pool}"))
    init_default_scope("mmdet")
    with torch.device("meta"):
        detector = MODELS.build(cfg.model)
    pools = {n: m for n, m in detector.named_modules() if isinstance(m, tuple(POOLS.values()))}
    assert list(pools) == [f"backbone.stage4.1.poolings.{i}" for i in range(3)]
    for module, kernel in zip(pools.values(), (5, 9, 13), strict=True):
        assert type(module) is POOLS[pool]
        assert repr(module).startswith(
            f"{POOLS[pool].__name__}(kernel_size={kernel}, stride=1, padding={kernel // 2}, "
        )


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("pool", quick_and_slow(POOLS, "softpool"))
def test_it_trains_an_iteration_and_evaluates(name, pool, coco_root, tmp_path):
    runner = train(small(f"{name}_{pool}", tmp_path, coco_root))
    assert runner.iter == 1
    assert 0 < runner.message_hub.get_scalar("train/loss").current() < 1000
    assert 0 <= runner.message_hub.get_scalar("val/coco/bbox_mAP").current() <= 1


@pytest.mark.parametrize("name", quick_and_slow(BASES, "yolox_s"))
def test_the_pair_is_tested_swapped_and_compared(name, coco_root, tmp_path):
    """With EMA, whose hook keeps weights of its own."""
    results = {}
    for pool in POOLS:
        options = {"test_dataloader.dataset.indices": 2, "test_dataloader.num_workers": 0}
        options |= {"test_dataloader.persistent_workers": False}
        options |= {"test_evaluator.outfile_prefix": str(tmp_path / pool)}
        cfg = small(f"{name}_{pool}", tmp_path / "run" / pool, coco_root, **options)
        trained = train(cfg)
        checkpoint = f"{cfg.work_dir}/epoch_1.pth"
        cfg = small(f"{name}_{pool}", tmp_path / "test" / pool, coco_root, **options)
        ap = trained.message_hub.get_scalar("val/coco/bbox_mAP").current()
        assert evaluate(cfg, checkpoint)["coco/bbox_mAP"] == ap
        results[pool] = [f"{tmp_path / pool}.bbox.json"]
    cfg = small(f"{name}_maxpool", tmp_path / "swap", coco_root)
    swap = evaluate_swap(cfg, [checkpoint], [1e30])
    assert swap.trained == swap.swapped == 100 * ap
    annotations = coco_root / "annotations" / "instances_val2017.json"
    assert compare_detections(annotations, results, resamples=2).images == 59


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("yolox_s", {"custom_hooks.0.num_last_epochs": 0}),
        pytest.param("rtmdet_s", {"custom_hooks.1.switch_epoch": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_switches_its_pipeline_and_ends_in_the_same_weights(
    name, switch, coco_root, tmp_path
):
    def run(folder, **kwargs):
        options = {**switch, "train_cfg.max_epochs": 2, "train_cfg.val_interval": 9}
        cfg = small(f"{name}_softpool", folder, coco_root, images=4, **options)
        finished = train(cfg, **kwargs)
        assert finished.epoch == 2 and finished.train_loop.iter == 4
        return torch.load(folder / "epoch_2.pth", weights_only=False)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = run(whole)
    resumed.mkdir()
    shutil.copy(whole / "epoch_1.pth", resumed)
    got = run(resumed, resume=True)
    for weights in ("state_dict", "ema_state_dict"):
        assert got[weights].keys() == expected[weights].keys()
        for key, value in expected[weights].items():
            assert value.equal(got[weights][key]), (weights, key)
    for folder in (whole, resumed):
        logs = "".join(path.read_text() for path in folder.glob("*/*.log"))
        assert len(re.findall("No mosaic and mixup aug now|Switch pipeline now", logs)) == 1


@pytest.mark.parametrize("name", quick_and_slow(BASES, "yolox_s"))
def test_the_exported_detector_takes_multiples_of_its_coarsest_stride(name, tmp_path):
    cfg = small(f"{name}_softpool", tmp_path)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    checkpoint, file = str(tmp_path / "epoch_1.pth"), str(tmp_path / "detector.pt2")
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict(), "meta": {}}, checkpoint)
    network = export.build_network(cfg, checkpoint)
    assert export.export(network, "pt2", file) <= 1e-4
    exported, image = torch.export.load(file).module(), randn(1, 3, 96, 160)
    with torch.no_grad():
        for got, expected in zip(exported(image), network(image), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_one_option_moves_all_data_and_missing_data_is_found(name, tmp_path):
    cfg = load_config(config(f"{name}_softpool"), dict(data_root=str(tmp_path)))
    assert "data/coco" not in cfg.dump()
    missing = f"missing file: {tmp_path}/annotations/instances_train2017.json; download COCO"
    with pytest.raises(FileNotFoundError, match=missing):
        train(cfg)


def unreachable(cfg):
    raise urllib.error.URLError("no network")


def test_unavailable_pretrained_weights_name_the_option_of_the_wrapped_backbone(
    coco_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "build_runner", unreachable)
    options = dict(data_root=str(coco_root))
    cfg = load_config(config("rtmdet_s_softpool"), options, str(tmp_path))
    option = r"model\.backbone\.backbone\.init_cfg"
    with pytest.raises((ValueError, OSError), match=rf"{option}\.checkpoint=FILE.*{option}=None"):
        train(cfg)
