"""Missing data is reported before anything is built."""

import pytest

from mmsoftpool import engine

from ..common import config_path


def test_a_complete_data_set_passes(cfg):
    engine.check_data(cfg, "train", "val", "test")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_annotations_are_named_with_their_source(cfg, tmp_path, split):
    path = tmp_path / "annotations" / f"instances_{split}2017.json"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {split} annotations at {path}") as info:
        engine.check_data(cfg, split)
    assert "cocodataset.org" in str(info.value)
    assert "cfg_options data_root=DIR" in str(info.value)


def test_an_empty_image_folder_is_named(cfg, tmp_path):
    (tmp_path / "val2017" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=f"no val images in {tmp_path}/val2017"):
        engine.check_data(cfg, "val")


def test_a_missing_image_folder_is_named(cfg, tmp_path):
    (tmp_path / "val2017" / "1.jpg").unlink()
    (tmp_path / "val2017").rmdir()
    with pytest.raises(FileNotFoundError, match=f"no test images in {tmp_path}/val2017"):
        engine.check_data(cfg, "test")


def test_the_demo_names_the_tool_that_draws_its_data(tmp_path):
    options = dict(data_root=str(tmp_path))
    cfg = engine.load_config(config_path("demo_retinanet_softpool"), options)
    with pytest.raises(FileNotFoundError, match=r"tools/make_shapes\.py"):
        engine.check_data(cfg, "train")


def test_imagenet_needs_a_folder_for_each_split(tmp_path):
    options = dict(data_root=str(tmp_path))
    cfg = engine.load_config(config_path("pretrain_resnet50_softpool_in1k"), options)
    with pytest.raises(FileNotFoundError, match=f"no train images in {tmp_path}/train; get Image"):
        engine.check_data(cfg, "train")
