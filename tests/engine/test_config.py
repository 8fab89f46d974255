"""Reading a config: the options that override it, its data root, its metrics."""

import pytest
from mmengine.config import Config

from mmsoftpool.engine import coco_metrics, load_config

from ..common import config_path

RETINANET = config_path("retinanet_r50_softpool")


@pytest.mark.parametrize("root", ["/elsewhere/images", "/elsewhere/images/"])
@pytest.mark.parametrize(
    "name", ["retinanet_r50_softpool", "mask_rcnn_r50_softpool", "demo_retinanet_softpool"]
)
def test_data_root_moves_all_data_sets_and_evaluators(name, root):
    cfg = load_config(config_path(name), dict(data_root=root))
    for split in ("train", "val", "test"):
        assert cfg[f"{split}_dataloader"].dataset.data_root == "/elsewhere/images/"
    for split in ("val", "test"):
        path = cfg[f"{split}_evaluator"].ann_file
        assert path.startswith("/elsewhere/images/annotations/instances_val") and "//" not in path
    assert Config.fromfile(config_path(name)).data_root not in cfg.dump()


def test_cfg_options_override_settings():
    cfg = load_config(RETINANET, {"train_dataloader.batch_size": 5, "model.backbone.depth": 101})
    assert (cfg.train_dataloader.batch_size, cfg.model.backbone.depth) == (5, 101)


def test_the_work_dir_has_the_name_of_the_config_by_default():
    assert load_config(RETINANET).work_dir == "work_dirs/retinanet_r50_softpool"
    assert load_config(RETINANET, work_dir="/x").work_dir == "/x"


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no config file at {tmp_path}/x.py"):
        load_config(str(tmp_path / "x.py"))


def test_a_config_without_data_root_cannot_move_it(tmp_path):
    (tmp_path / "x.py").write_text("model = dict()")
    with pytest.raises(ValueError, match=r"cfg_options sets data_root=y, but .* has no data_root"):
        load_config(str(tmp_path / "x.py"), dict(data_root="y"))


@pytest.mark.parametrize(
    ("metric", "expected"), [("bbox", ["bbox"]), (["bbox", "segm"], ["bbox", "segm"])]
)
def test_coco_metrics(metric, expected):
    cfg = load_config(RETINANET, {"test_evaluator.metric": metric})
    assert coco_metrics(cfg) == expected


def test_other_metrics_than_cocos_are_refused():
    with pytest.raises(ValueError, match=r"test_evaluator\.metric .* must be bbox or segm"):
        coco_metrics(load_config(RETINANET, {"test_evaluator.metric": "proposal"}))
    with pytest.raises(ValueError, match="must have one test_evaluator, a CocoMetric"):
        coco_metrics(load_config(RETINANET, {"test_evaluator.type": "VOCMetric"}))
