"""Reading a config: the options that override it, its data root, its metrics."""

import pytest
from mmdet.evaluation import CocoMetric
from mmengine.config import Config

from mmsoftpool.config import coco_metrics, load_config

from .common import config_path

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
    ("name", "content", "message"),
    [
        ("x.py", "model = dict(", "SyntaxError"),
        ("x.py", "model = dict(a=b)", "NameError: name 'b' is not defined .*x.py, line 1"),
        ("x.py", "_base_ = './no.py'", "No such file or directory: .*no.py"),
        ("x.txt", "model = dict()", r"must end in one of \.py"),
        ("x.json", "{", "JSONDecodeError"),
        ("x.py", "a = 1", "must have a model, a dict, got None"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_config(str(tmp_path / name))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x"], "form key=value, got 'x'"),
        (["data_root="], "data_root in cfg_options must be a folder"),
        (["model.backbone.depth.x=1"], "cfg_options do not fit"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_config(RETINANET, options)


def test_an_empty_data_root_cannot_be_moved_and_tuples_are(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("model = dict()\ndata_root = ''\nother = '/usr/x'")
    with pytest.raises(ValueError, match="has no data_root to replace"):
        load_config(str(path), dict(data_root="y"))
    path.write_text("model = dict()\ndata_root = 'a/'\nfiles = ('a/b', ['a/c'], 'ab')")
    assert load_config(str(path), dict(data_root="y")).files == ("y/b", ["y/c"], "ab")


@pytest.mark.parametrize("name", ["retinanet_r50_softpool", "demo_retinanet_maxpool.py"])
def test_a_config_of_this_package_is_known_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(name)
    assert cfg.model == load_config(config_path(name.removesuffix(".py"))).model
    assert cfg.work_dir == f"work_dirs/{name.removesuffix('.py')}"


def test_a_file_comes_before_a_config_of_this_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "retinanet_r50_softpool.py").write_text("model = dict(type='Mine')")
    assert load_config("retinanet_r50_softpool.py").model == dict(type="Mine")
    (tmp_path / "retinanet_r18_softpool").mkdir()  # the folder of a run
    assert load_config("retinanet_r18_softpool").model.backbone.depth == 18


@pytest.mark.parametrize(
    ("metric", "expected"), [("bbox", ["bbox"]), (["bbox", "segm"], ["bbox", "segm"])]
)
def test_coco_metrics(metric, expected):
    cfg = load_config(RETINANET, {"test_evaluator.metric": metric})
    assert coco_metrics(cfg) == expected


@pytest.mark.parametrize("folder", ["my data (2)", "a, b", "[x]", "d"])
def test_paths_are_taken_literally(folder):
    cfg = load_config(RETINANET, [f"data_root={folder}", f"load_from=/x/{folder}"])
    assert cfg.train_dataloader.dataset.data_root == f"{folder}/"
    assert cfg.load_from == f"/x/{folder}"


def test_a_metric_given_as_a_class():
    cfg = load_config(RETINANET)
    cfg.test_evaluator.type = CocoMetric
    assert coco_metrics(cfg) == ["bbox"]


def test_other_metrics_than_cocos_are_refused():
    with pytest.raises(ValueError, match=r"test_evaluator\.metric .* must be bbox or segm"):
        coco_metrics(load_config(RETINANET, {"test_evaluator.metric": "proposal"}))
    with pytest.raises(ValueError, match="must have one test_evaluator, a CocoMetric"):
        coco_metrics(load_config(RETINANET, {"test_evaluator.type": "VOCMetric"}))
    for metric in ([], 5, [["bbox"]]):
        with pytest.raises(ValueError, match=r"test_evaluator\.metric of .* must be bbox or segm"):
            coco_metrics(load_config(RETINANET, {"test_evaluator.metric": metric}))
