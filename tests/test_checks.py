"""Data sets with one change each, of kinds that people have reported: the change makes no
difference, or an error says in one line what is wrong, or a warning says how many objects it
concerns."""

import copy
import json
import re
import shutil
import sys
import warnings
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import (
    CocoDataset,
    CocoPanopticDataset,
    ConcatDataset,
    CrowdHumanDataset,
    LVISV1Dataset,
    VOCDataset,
)
from mmdet.evaluation import CocoMetric
from mmengine.registry import METRICS, init_default_scope
from mmengine.runner import EpochBasedTrainLoop

from make_shapes import make_shapes
from mmsoftpool import cli
from mmsoftpool.checks import DataCheckHook, check_dataset
from mmsoftpool.config import load_config
from mmsoftpool.errors import UserError
from mmsoftpool.runner import _Runner, build_model

from .common import config_path

CLASSES = ("disc", "square", "triangle", "star")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A valid data set: 24 images, four classes."""
    root = tmp_path_factory.mktemp("base")
    make_shapes(root, train=18, val=6, size=64)
    return root


@pytest.fixture(scope="module")
def model():
    return build_model(load_config(config_path("demo_retinanet_softpool")))


class Data:
    """A data set whose files, and the config's settings, a case may change."""

    def __init__(self, base, root):
        self.root = root
        shutil.copytree(base, root)
        self.options = {}
        self.splits = {s: json.loads(self.file(s).read_text()) for s in ("train", "val")}

    def file(self, split):
        return self.root / "annotations" / f"instances_{split}.json"

    def each(self, key, change):
        """Changes every entry of a list in both files."""
        for data in self.splits.values():
            for entry in data[key]:
                change(entry)

    def build(self):
        """The data sets and the metric as a run builds them."""
        for split, data in self.splits.items():
            self.file(split).write_text(data if isinstance(data, str) else json.dumps(data))
        options = {"data_root": str(self.root), **self.options}
        cfg = load_config(config_path("demo_retinanet_softpool"), options, str(self.root / "run"))
        init_default_scope("mmdet")
        for split in self.splits:
            cfg[f"{split}_dataloader"].update(num_workers=0, persistent_workers=False)
            loader = _Runner.build_dataloader(cfg[f"{split}_dataloader"])
            metrics = [METRICS.build(cfg[f"{split}_evaluator"])] if split == "val" else []
            yield split, loader.dataset, metrics


def average_precision(dataset, metric) -> float:
    """The AP of detections that are the data set's own boxes, with its own labels."""
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        found = [i for i in info["instances"] if not i["ignore_flag"]]
        boxes = torch.tensor([i["bbox"] for i in found], dtype=torch.float).reshape(-1, 4)
        labels = torch.tensor([i["bbox_label"] for i in found], dtype=torch.long)
        instances = dict(bboxes=boxes, scores=torch.ones(len(found)), labels=labels)
        sample = dict(img_id=info["img_id"], ori_shape=(64, 64), pred_instances=instances)
        metric.process({}, [sample])
    return metric.evaluate(len(dataset))["coco/bbox_mAP"]


def outcome(data, model):
    """``('error', message)``, ``('warning', messages)`` or ``('same', AP)``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for split, dataset, metrics in data.build():
                check_dataset(split, dataset, metrics, model, log=lambda line: None)
        except (UserError, OSError) as error:
            return "error", str(error)
    ours = [str(w.message) for w in caught if "checks.py" in w.filename or "test_ch" in w.filename]
    return ("warning", " ".join(ours)) if ours else ("same", average_precision(dataset, *metrics))


def drop(*keys):
    def change(entry):
        for key in keys:
            entry.pop(key, None)

    return change


def first(data, split="train"):
    return data.splits[split]["annotations"][0]


SAME, ERROR, WARNING = "same", "error", "warning"
CASES = {}


def case(ending, pattern=""):
    def add(change):
        CASES[change.__name__] = (change, ending, pattern)
        return change

    return add


@case(SAME)
def unchanged(data):
    pass


@case(SAME)
def keys_that_only_other_tools_use(data):
    data.each("images", lambda e: e.update(date_captured="", coco_url="", extra={"a": 1}))
    data.each("annotations", lambda e: e.update(attributes={"occluded": False}, keypoints=[]))


@case(SAME)
def no_segmentation_for_boxes(data):
    data.each("annotations", drop("segmentation"))


@case(SAME)
def boxes_as_floats(data):
    data.each("annotations", lambda e: e.update(bbox=[float(v) for v in e["bbox"]]))


@case(SAME)
def category_ids_with_gaps(data):
    data.each("categories", lambda e: e.update(id=e["id"] * 7))
    data.each("annotations", lambda e: e.update(category_id=e["category_id"] * 7))


@case(SAME)
def category_ids_from_zero(data):
    data.each("categories", lambda e: e.update(id=e["id"] - 1))
    data.each("annotations", lambda e: e.update(category_id=e["category_id"] - 1))


@case(SAME)
def an_image_without_objects(data):
    image = data.splits["train"]["images"][0]["id"]
    objects = data.splits["train"]["annotations"]
    objects[:] = [o for o in objects if o["image_id"] != image]


@case(SAME)
def a_category_that_is_not_trained(data):
    for split in data.splits.values():
        split["categories"].append(dict(id=9, name="background", supercategory="none"))


@case(SAME)
def a_grouping_category_of_another_name(data):
    for split in data.splits.values():
        split["categories"].insert(0, dict(id=0, name="shapes", supercategory="none"))


@case(SAME)
def no_info_and_no_licenses(data):
    for split in data.splits.values():
        drop("info", "licenses")(split)


@case(SAME)
def image_ids_that_are_large(data):
    data.each("images", lambda e: e.update(id=e["id"] + 10**12))
    data.each("annotations", lambda e: e.update(image_id=e["image_id"] + 10**12))


@case(SAME)
def file_names_with_folders(data):
    for split in data.splits:
        (data.root / split / "sub dir").mkdir()
        for path in (data.root / split).glob("*.jpg"):
            path.rename(path.parent / "sub dir" / path.name)
    data.each("images", lambda e: e.update(file_name="sub dir/" + e["file_name"]))


@case(SAME)
def spaces_commas_and_brackets_in_the_path(data):
    moved = data.root.with_name("my data, (2)")
    shutil.move(data.root, moved)
    data.root = moved


@case(SAME)
def a_subset_of_the_classes(data):
    classes = dict(classes=CLASSES[1:3])
    data.options |= {f"{s}_dataloader.dataset.metainfo": classes for s in ("train", "val")}
    data.two_classes = True


@case(ERROR, "more than one category of the name disc; rename")
def a_grouping_category_of_the_same_name(data):
    for split in data.splits.values():
        split["categories"].insert(0, dict(id=0, name="disc", supercategory="none"))


@case(ERROR, "no box in .* is used for training: \\d+ have iscrowd=1")
def every_object_a_crowd(data):
    data.each("annotations", lambda e: e.update(iscrowd=1))


@case(ERROR, "no box in .* is used for training: \\d+ have no area")
def areas_of_zero(data):
    data.each("annotations", lambda e: e.update(area=0))


@case(ERROR, "no box in .* is used for training: \\d+ are narrower or lower than a pixel")
def normalised_boxes(data):
    data.each("annotations", lambda e: e.update(bbox=[v / 64 for v in e["bbox"]]))


@case(ERROR, "cannot use .*: no image is left after filter_cfg=")
def no_annotations(data):
    data.splits["train"]["annotations"] = []
    data.options["train_dataloader.dataset.filter_cfg"] = dict(filter_empty_gt=True)


@case(ERROR, "no box in .* is used for training")
def no_annotations_and_no_filter(data):
    data.splits["train"]["annotations"] = []


@case(WARNING, "^1 boxes of the train data are not used: 1 have iscrowd=1")
def one_crowd(data):
    first(data)["iscrowd"] = 1


@case(WARNING, "^2 boxes of the train data are not used: 1 are outside of their image, 1 have no")
def boxes_that_are_dropped(data):
    objects = data.splits["train"]["annotations"]
    objects[0]["bbox"] = [100, 100, 9, 9]
    objects[1]["area"] = 0


@case(WARNING, "1 of the 4 classes have no box in the train data: star")
def a_class_without_boxes(data):
    objects = data.splits["train"]["annotations"]
    objects[:] = [o for o in objects if o["category_id"] != 4]


@case(ERROR, "numbers the labels in the file's order: set classes=\\('disc', 'square'")
def classes_in_another_order(data):
    classes = dict(classes=CLASSES[::-1])
    data.options |= {f"{s}_dataloader.dataset.metainfo": classes for s in ("train", "val")}


@case(ERROR, "val data set must be .* in the file's order: set classes=\\('star', 'triangle'")
def categories_in_another_order_in_val(data):
    data.splits["val"]["categories"].reverse()


@case(ERROR, "has no category disk")
def a_misspelt_class(data):
    classes = dict(classes=("disk", *CLASSES[1:]))
    data.options |= {f"{s}_dataloader.dataset.metainfo": classes for s in ("train", "val")}


@case(ERROR, "must be a tuple of names, for one class \\('name',\\), got 'disc'")
def one_class_without_a_comma(data):
    data.options["train_dataloader.dataset.metainfo"] = dict(classes="disc")


@case(ERROR, "model.bbox_head.num_classes must be 3, .* \\(disc, square, triangle\\), got 4")
def classes_left_out(data):
    data.options["train_dataloader.dataset.metainfo"] = dict(classes=CLASSES[:3])


@case(ERROR, "val_evaluator.ann_file lacks images of the val data set .*: \\d of 6 are")
def an_evaluator_of_another_split(data):
    data.each("images", lambda e: None)
    for image in data.splits["val"]["images"]:
        image["id"] += 100
    for annotation in data.splits["val"]["annotations"]:
        annotation["image_id"] += 100
    data.options["val_evaluator.ann_file"] = str(data.file("train"))


@case(ERROR, "mmdet's CocoDataset cannot use .*instances_train.json: .* are not unique")
def annotation_ids_used_twice(data):
    objects = data.splits["train"]["annotations"]
    objects[1]["id"] = objects[0]["id"]


@case(ERROR, "^1 of the \\d+ objects in .*instances_train.json have no segmentation")
def no_polygon_for_one_mask(data):
    first(data)["segmentation"] = []
    data.options["train_dataloader.dataset.pipeline.1"] = dict(
        type="LoadAnnotations", with_bbox=True, with_mask=True
    )


@case(
    ERROR, "annotations in val_evaluator.ann_file cannot be evaluated: \\d+ of \\d+ have no iscrowd"
)
def no_iscrowd(data):
    data.each("annotations", drop("iscrowd"))


@case(ERROR, "has height and width \\(64, 64\\), its annotations say \\(128, 32\\)")
def sizes_of_other_images(data):
    data.each("images", lambda e: e.update(height=128, width=32))


@case(ERROR, "say \\(64, 80\\); is it turned by its EXIF orientation")
def images_that_are_turned(data):
    for path in data.root.glob("*/*.jpg"):
        cv2.imwrite(str(path), np.zeros((80, 64, 3), np.uint8))
    data.each("images", lambda e: e.update(height=64, width=80))


@case(ERROR, "ann_file must be one file, got .*; a ConcatDataset joins several")
def a_list_of_annotation_files(data):
    files = ["annotations/instances_train.json", "annotations/instances_val.json"]
    data.options["train_dataloader.dataset.ann_file"] = files


@case(ERROR, "2 of the 18 train images are missing")
def missing_images(data):
    for image in data.splits["train"]["images"][:2]:
        (data.root / "train" / image["file_name"]).unlink()


@case(ERROR, "the 18 train images are missing")
def no_image_folder(data):
    shutil.rmtree(data.root / "train")


@case(ERROR, "cannot read the train image .*000000.jpg")
def an_empty_image(data):
    (data.root / "train" / "000000.jpg").write_bytes(b"")


@case(ERROR, "No such file or directory: .*instances_val.json")
def no_annotation_file(data):
    data.options["val_dataloader.dataset.ann_file"] = "missing/instances_val.json"


@case(ERROR, "cannot use .*instances_train.json: JSONDecodeError")
def a_truncated_file(data):
    data.splits["train"] = json.dumps(data.splits["train"])[:-9]


@case(ERROR, "cannot use .*instances_train.json: KeyError: 'bbox'")
def an_object_without_a_box(data):
    del first(data)["bbox"]


@case(ERROR, "cannot use .*instances_train.json: ")
def a_file_of_another_kind(data):
    data.splits["train"] = "[1, 2]"


@case(ERROR, "cannot use .*instances_train.json: KeyError: 'file_name'")
def an_image_without_a_file_name(data):
    del data.splits["train"]["images"][0]["file_name"]


@case(WARNING, "the annotation with id 0 in val_evaluator.ann_file counts as not found")
def annotation_ids_from_zero(data):
    first(data, "val")["id"] = 0


@case(ERROR, "val_evaluator.ann_file has no annotations to compare detections with")
def an_empty_val_file(data):
    data.splits["val"]["annotations"] = []


@pytest.mark.parametrize("name", CASES)
def test_data_set(name, base, tmp_path, model):
    change, ending, pattern = CASES[name]
    data = Data(base, tmp_path / "data")
    change(data)
    checked = copy.deepcopy(model)
    if hasattr(data, "two_classes"):
        checked.bbox_head.num_classes = 2
    found, result = outcome(data, checked)
    assert found == ending, result
    if ending == SAME:
        assert result == 1
    else:
        assert re.search(pattern, result), result
        assert "\n" not in result


def test_other_formats_are_checked_as_mmdet_reads_them(tmp_path):
    """A data set without a file of COCO's, such as CrowdHuman or VOC."""

    class Listed(CocoDataset):
        def load_data_list(self):
            instances = [dict(bbox=[0, 0, 9, 9], bbox_label=0, ignore_flag=0)]
            path = str(tmp_path / "1.png")
            return [dict(img_path=path, img_id="one", height=8, width=8, instances=instances)]

    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((8, 8, 3), np.uint8))
    lines = []
    dataset = Listed(metainfo=dict(classes=("cell",)), pipeline=[])
    check_dataset("train", dataset, log=lines.append)
    assert lines == ["train data: 1 images, 1 boxes of 1 classes"]


VOC = """<annotation><size><width>64</width><height>64</height></size>{}</annotation>"""
OBJECT = """<object><name>{}</name><difficult>0</difficult><bndbox><xmin>11</xmin><ymin>11</ymin>
<xmax>{}</xmax><ymax>40</ymax></bndbox></object>"""


def images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), np.zeros((64, 64, 3), np.uint8))


def test_a_voc_data_set_passes(tmp_path):
    images(tmp_path, "VOC2007/JPEGImages/1.jpg")
    (tmp_path / "VOC2007/Annotations").mkdir()
    objects = OBJECT.format("cat", 40) + OBJECT.format("unknown", 40)
    (tmp_path / "VOC2007/Annotations/1.xml").write_text(VOC.format(objects))
    (tmp_path / "train.txt").write_text("1\n")
    lines = []
    dataset = VOCDataset(
        metainfo=dict(classes=("cat",)),
        data_root=str(tmp_path),
        ann_file="train.txt",
        data_prefix=dict(sub_data_root="VOC2007/"),
        pipeline=[],
    )
    check_dataset("train", dataset, log=lines.append)
    assert lines == ["train data: 1 images, 1 boxes of 1 classes"]


def test_a_crowdhuman_data_set_passes(tmp_path):
    """One JSON object a line, the sizes of the images in a second file, its own metric."""
    images(tmp_path, "Images/1.jpg")
    boxes = dict(hbox=[1, 1, 9, 9], vbox=[1, 1, 30, 40], fbox=[1, 1, 30, 50])
    person = dict(tag="person", extra={}, head_attr={}, **boxes)
    (tmp_path / "train.odgt").write_text(
        json.dumps(dict(ID="1", gtboxes=[person, {**person, "tag": "mask"}]))
    )
    (tmp_path / "sizes.json").write_text(json.dumps({"1": [64, 64]}))
    lines = []
    dataset = CrowdHumanDataset(
        data_root=str(tmp_path),
        ann_file="train.odgt",
        extra_ann_file=str(tmp_path / "sizes.json"),
        data_prefix=dict(img="Images/"),
        pipeline=[],
    )
    check_dataset("train", dataset, log=lines.append)
    assert lines == ["train data: 1 images, 1 boxes of 1 classes"]


def coco_file(path, **image):
    box = dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)
    data = dict(
        images=[dict(id=1, height=64, width=64, **image)],
        annotations=[dict(box, segmentation=[[1, 1, 9, 1, 9, 9]])],
        categories=[dict(id=1, name="cat")],
    )
    path.write_text(json.dumps(data))


def test_an_lvis_data_set_passes(tmp_path):
    images(tmp_path, "train2017/1.jpg")
    url = "http://images.cocodataset.org/train2017/1.jpg"
    coco_file(tmp_path / "lvis.json", coco_url=url, neg_category_ids=[])
    dataset = LVISV1Dataset(
        metainfo=dict(classes=("cat",)),
        ann_file=str(tmp_path / "lvis.json"),
        data_prefix=dict(img=str(tmp_path)),
        pipeline=[],
    )
    check_dataset("train", dataset, log=[].append)


def test_the_unlabelled_part_of_a_semi_supervised_data_set_passes(tmp_path):
    images(tmp_path, "1.jpg")
    for name in ("labelled", "unlabelled"):
        coco_file(tmp_path / f"{name}.json", file_name="1.jpg")
    data = json.loads((tmp_path / "unlabelled.json").read_text())
    (tmp_path / "unlabelled.json").write_text(json.dumps({**data, "annotations": []}))
    options = dict(metainfo=dict(classes=("cat",)), pipeline=[])
    parts = [
        CocoDataset(ann_file=f"{tmp_path}/{n}.json", data_prefix=dict(img=str(tmp_path)), **options)
        for n in ("labelled", "unlabelled")
    ]
    lines = []
    check_dataset("train", ConcatDataset(parts), log=lines.append)
    assert lines == ["train data: 2 images, 1 boxes of 1 classes"]


def test_images_of_another_kind_pass(tmp_path):
    np.save(tmp_path / "1.npy", np.zeros((64, 64, 5)))
    coco_file(tmp_path / "x.json", file_name="1.npy")
    options = dict(metainfo=dict(classes=("cat",)), data_prefix=dict(img=str(tmp_path)))
    dataset = CocoDataset(ann_file=str(tmp_path / "x.json"), pipeline=[], **options)
    check_dataset("train", dataset, log=[].append)


def test_a_panoptic_data_set_passes(tmp_path, model):
    """Its annotations have segments, and its box heads know only the things."""
    images(tmp_path, "1.jpg")
    segment = dict(id=1, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)
    classes = ("disc", "square", "triangle", "star", "sky")
    data = dict(
        images=[dict(id=1, height=64, width=64, file_name="1.jpg")],
        annotations=[dict(image_id=1, file_name="1.png", segments_info=[segment])],
        categories=[
            dict(id=i, name=name, isthing=int(name != "sky"), color=[i, i, i])
            for i, name in enumerate(classes, 1)
        ],
    )
    (tmp_path / "panoptic.json").write_text(json.dumps(data))
    dataset = CocoPanopticDataset(
        metainfo=dict(classes=classes, thing_classes=classes[:4], stuff_classes=classes[4:]),
        ann_file=str(tmp_path / "panoptic.json"),
        data_prefix=dict(img=str(tmp_path), seg=str(tmp_path)),
        pipeline=[],
    )
    metric = SimpleNamespace(_coco_api=object())  # CocoPanopticMetric's, which needs panopticapi
    lines = []
    check_dataset("val", dataset, [metric], model, log=lines.append)
    assert lines == ["val data: 1 images, 1 boxes of 5 classes"]


def test_a_resumed_run_whose_schedules_end_early_triggers_a_warning():
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop._epoch, loop._max_epochs = 4, 8
    schedules = [SimpleNamespace(by_epoch=False, end=50), SimpleNamespace(by_epoch=True, end=6)]
    runner = SimpleNamespace(
        train_loop=loop, param_schedulers=schedules, train_dataloader=range(100)
    )
    with pytest.warns(UserWarning, match="the schedules end after 6 of 8 epochs"):
        DataCheckHook("train").before_train(runner)
    schedules[1].end = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DataCheckHook("train").before_train(runner)


def test_pictures_of_one_name_trigger_a_warning(tmp_path):
    images(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    options = dict(metainfo=dict(classes=("cat",)), pipeline=[])
    parts = []
    for folder, name in (("a", "1"), ("b", "1"), ("b", "2")):
        coco_file(tmp_path / f"{folder}{name}.json", file_name=f"{folder}/{name}.jpg")
        ann_file = f"{tmp_path}/{folder}{name}.json"
        parts.append(CocoDataset(ann_file=ann_file, data_prefix=dict(img=str(tmp_path)), **options))
    drawing = SimpleNamespace(test_out_dir="pictures")
    for count, dataset in ((1, ConcatDataset(parts)), (0, ConcatDataset(parts[1:]))):
        loader = SimpleNamespace(dataset=dataset)
        runner = SimpleNamespace(hooks=[drawing], test_dataloader=loader)
        with warnings.catch_warnings(record=True) as caught:
            DataCheckHook().before_run(runner)
        assert len(caught) == count
        assert all("1 pictures will be overwritten: " in str(w.message) for w in caught)


def test_schedules_that_do_not_fit_the_training_are_one_line(base, tmp_path, capsys):
    options = ("param_scheduler.1.begin=2", "param_scheduler.1.end=1")
    with pytest.raises(SystemExit):
        config = config_path("demo_retinanet_softpool")
        options = ("--cfg-options", f"data_root={base}", *options)
        cli.main(["train", config, "--work-dir", str(tmp_path), *options])
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: param_scheduler does not fit train_cfg: end should be larger", last)


def test_a_missing_package_of_a_vis_backend_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    backends = ("visualizer.name=other", "visualizer.vis_backends.0.type=TensorboardVisBackend")
    with pytest.raises(SystemExit):
        config = config_path("demo_retinanet_softpool")
        cli.main(["train", config, "--work-dir", str(tmp_path), "--cfg-options", *backends])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {config} needs a missing package: ") and "tensorboard" in last


def test_an_evaluator_without_a_file_takes_the_data_sets_annotations(base):
    data = {}
    dataset = CocoDataset(
        metainfo=dict(classes=CLASSES),
        data_root=str(base),
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        pipeline=[],
    )
    check_dataset("val", dataset, [CocoMetric()], log=data.setdefault)
    assert data == {next(iter(data)): None}


def test_a_run_ends_in_one_line_before_its_first_iteration(base, tmp_path, capsys):
    data = Data(base, tmp_path / "data")
    every_object_a_crowd(data)
    data.file("train").write_text(json.dumps(data.splits["train"]))
    work_dir = ("--work-dir", str(tmp_path / "run"))
    options = ("--cfg-options", f"data_root={data.root}", "train_dataloader.num_workers=0")
    with pytest.raises(SystemExit) as end:
        cli.main(["train", config_path("demo_retinanet_softpool"), *work_dir, *options])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "Epoch(train)" not in out
    assert err.splitlines()[-1].startswith("error: no box in ")


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ("demo_retinanet_softpool", "draw the data set with 'python tools/make_shapes.py"),
        ("retinanet_r18_softpool", "download COCO 2017 from https://cocodataset.org"),
    ],
)
def test_a_missing_data_set_is_named_with_its_source(tmp_path, capsys, config, advice):
    options = (f"data_root={tmp_path}/none", "model.backbone.init_cfg=None")
    with pytest.raises(SystemExit):
        cli.main(
            ["train", config_path(config), "--work-dir", str(tmp_path), "--cfg-options", *options]
        )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: missing file: {tmp_path}/none/annotations/instances_train")
    assert advice in last and "--cfg-options data_root=DIR" in last
