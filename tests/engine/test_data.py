"""Missing data is reported before anything is built."""

import json

import pytest

from mmsoftpool import engine
from mmsoftpool.datasets.shapes import make_shapes

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


def test_a_config_that_inherits_from_the_demo_has_advice_of_its_own(tmp_path):
    (tmp_path / "own.py").write_text(
        f"_base_ = {config_path('demo_retinanet_softpool')!r}\n"
        "train_dataloader = dict(dataset=dict(data_root='/mine'))"
    )
    with pytest.raises(FileNotFoundError, match="no train annotations at /mine") as error:
        engine.check_data(engine.load_config(str(tmp_path / "own.py")), "train")
    assert "make_shapes" not in str(error.value) and "data_root=DIR" in str(error.value)


class TestOwnData:
    """A synthetic data set, as of a user, and the demo's config with mistakes."""

    @pytest.fixture
    def check(self, tmp_path):
        make_shapes(tmp_path, train=2, val=2, size=64)

        def check(*splits, annotations=None, **options):
            options = {key.replace("__", "."): value for key, value in options.items()}
            path = tmp_path / "annotations" / "instances_train.json"
            if annotations:
                data = json.loads(path.read_text())
                annotations(data)
                path.write_text(json.dumps(data))
            options |= {
                f"{split}_dataloader.dataset.ann_file": "annotations/instances_train.json"
                for split in ("train", "val")
            }
            options |= dict(data_root=str(tmp_path)) | {"val_evaluator.ann_file": str(path)}
            name = config_path("demo_retinanet_softpool")
            engine.check_data(engine.load_config(name, options), *splits)

        return check

    def test_without_a_mistake_it_passes(self, check):
        check("train", "val")

    def test_a_class_that_the_annotations_do_not_have(self, check):
        classes = ("disc", "square", "triangle", "stars")
        with pytest.raises(ValueError, match=r"disc, square, triangle, star; it has not stars"):
            check("train", train_dataloader__dataset__metainfo=dict(classes=classes))

    def test_one_class_without_a_comma(self, check):
        with pytest.raises(ValueError, match=r"a tuple of names, .*\('name',\), got 'disc'"):
            check("train", train_dataloader__dataset__metainfo=dict(classes="disc"))

    @pytest.mark.parametrize("number", [3, 80])
    def test_a_head_with_another_number_of_classes(self, check, number):
        message = rf"model\.bbox_head\.num_classes .* must be 4, .* got {number}"
        with pytest.raises(ValueError, match=message):
            check("train", model__bbox_head__num_classes=number)

    def test_a_data_set_of_an_unknown_type(self, check):
        with pytest.raises(ValueError, match="'CocoDatset' is not registered; did you mean 'Coco"):
            check("train", train_dataloader__dataset__type="CocoDatset")

    def test_no_object_of_the_classes(self, check):
        with pytest.raises(ValueError, match="has no annotation of the classes disc"):
            check("train", annotations=lambda data: data.update(annotations=[]))

    def test_an_annotation_with_id_0_is_warned_of(self, check):
        with pytest.warns(UserWarning, match="id 0 in .* counts as not found"):
            check("val", annotations=lambda data: data["annotations"][0].update(id=0))

    def test_annotations_without_an_area(self, check):
        with pytest.raises(ValueError, match="no area: 1 times, the first is number 1"):
            check("train", annotations=lambda data: data["annotations"][1].pop("area"))

    def test_annotations_that_are_not_json(self, check, tmp_path):
        (tmp_path / "annotations" / "instances_train.json").write_text("{")
        with pytest.raises(ValueError, match=r"instances_train\.json is not JSON"):
            check("train")


def test_imagenet_needs_a_folder_for_each_split(tmp_path):
    options = dict(data_root=str(tmp_path))
    cfg = engine.load_config(config_path("pretrain_resnet50_softpool_in1k"), options)
    with pytest.raises(FileNotFoundError, match=f"no train images in {tmp_path}/train; get Image"):
        engine.check_data(cfg, "train")
