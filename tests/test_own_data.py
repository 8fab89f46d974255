"""docs/own_data.md from top to bottom, on a Pascal VOC folder like the one that it downloads."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, METRICS, init_default_scope

from mmsoftpool.checks import check_dataset
from mmsoftpool.config import load_config
from mmsoftpool.runner import build_model

from .common import ROOT, SHARED, blocks
from .test_docs import commands

CONFIG = "configs/bccd/bccd_retinanet_softpool.py"
PHOTOS = {"train": "BloodImage_00001", "val": "BloodImage_00000", "test": "BloodImage_00007"}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's Python blocks, in a folder with the data that the first of them has converted."""
    voc = tmp_path / "BCCD_Dataset" / "BCCD"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (voc / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, name in PHOTOS.items():
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
        photo = cv2.resize(rng.integers(0, 256, (30, 40, 3), np.uint8), (640, 480))
        cv2.imwrite(str(voc / "JPEGImages" / f"{name}.jpg"), photo)
        objects = "".join(
            f"<object><name>{cell}</name><bndbox><xmin>{x}</xmin><ymin>101</ymin>"
            f"<xmax>{x + 79}</xmax><ymax>160</ymax></bndbox></object>"
            for cell, x in (("RBC", 11), ("WBC", 201), ("Platelets", 401))
        )
        (voc / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>640</width>"
            f"<height>480</height><depth>3</depth></size>{objects}</annotation>"
        )
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    convert, *others = blocks(ROOT / "docs" / "own_data.md", "python")
    exec(convert, {})
    for block in others:
        if block.startswith("# "):
            (tmp_path / block.partition("\n")[0][2:]).write_text(block)
    return others


def test_the_conversion_keeps_every_box_in_its_split(page):
    for split, name in PHOTOS.items():
        with open(f"data/bccd/annotations/instances_{split}.json") as file:
            data = json.load(file)
        assert [image["file_name"] for image in data["images"]] == [f"{name}.jpg"]
        assert cv2.imread(f"data/bccd/{split}/{name}.jpg").shape == (480, 640, 3)
        names = {category["id"]: category["name"] for category in data["categories"]}
        # Pascal VOC counts pixels from 1 and names the last one.
        assert [(names[a["category_id"]], a["bbox"]) for a in data["annotations"]] == [
            ("RBC", [10, 100, 80, 60]),
            ("WBC", [200, 100, 80, 60]),
            ("Platelets", [400, 100, 80, 60]),
        ]
        assert min(annotation["id"] for annotation in data["annotations"]) == 1


def test_a_folder_without_splits_is_split_by_images(page, tmp_path):
    images = [dict(id=i, file_name=f"{i}.jpg") for i in range(50)]
    boxes = [dict(id=i, image_id=i % 50) for i in range(1, 100)]
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "annotations.json").write_text(
        json.dumps(dict(images=images, annotations=boxes, categories=[]))
    )
    exec(page[0], {})
    parts = [
        json.loads((tmp_path / f"export/instances_{split}.json").read_text()) for split in PHOTOS
    ]
    assert [len(part["images"]) for part in parts] == [10, 20, 20]
    assert sorted(box["id"] for part in parts for box in part["annotations"]) == [*range(1, 100)]
    for part in parts:
        ids = {image["id"] for image in part["images"]}
        assert {box["image_id"] for box in part["annotations"]} == ids


@pytest.mark.parametrize("config", ["cells.py", "cells_maxpool.py", "small_cells.py", CONFIG])
def test_the_configs_fit_the_data(page, config):
    cfg = load_config(config)
    init_default_scope("mmdet")
    for split in ("train", "val", "test"):
        metrics = [METRICS.build(cfg[f"{split}_evaluator"])] if split != "train" else []
        check_dataset(split, DATASETS.build(cfg[f"{split}_dataloader"].dataset), metrics)
    with torch.device("meta"):
        model = build_model(cfg)
    assert type(model.backbone.maxpool).__name__ == (
        "MaxPool2d" if config == "cells_maxpool.py" else "SoftPool2d"
    )
    assert cfg.test_evaluator.ann_file == "data/bccd/annotations/instances_test.json"
    assert "end" not in cfg.param_scheduler[1]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "bccd").exists(), reason="no BCCD photos there")
def test_the_smoke_test_runs(run_tool, tmp_path):
    (words,) = [w for w in commands(ROOT / "docs" / "own_data.md") if "work_dirs/smoke" in w]
    options = words[words.index("--cfg-options") :]
    options += [f"data_root={SHARED / 'data' / 'bccd'}", f"visualizer.name={tmp_path.name}"]
    status, out, _ = run_tool("train", ROOT / CONFIG, "--work-dir", tmp_path, *options)
    assert status == 0 and "Epoch(val)" in out and (tmp_path / "epoch_3.pth").exists()


@pytest.mark.skipif(not (SHARED / "data" / "bccd").exists(), reason="no BCCD photos there")
def test_the_small_detector_learns_from_the_photos(run_tool, tmp_path):
    options = (
        *("--cfg-options", f"data_root={SHARED / 'data' / 'bccd'}", "train_cfg.max_epochs=1"),
        *("train_dataloader.dataset.indices=32", "train_dataloader.batch_size=4"),
        *("val_dataloader.dataset.indices=2", "param_scheduler.0.end=4"),
        *("param_scheduler.1.begin=0", "default_hooks.logger.interval=1"),
        "model.test_cfg.score_thr=0",
        # mmengine keeps one visualizer of a name for a process, with the folder of its first run.
        f"visualizer.name={tmp_path.name}",
    )
    status, out, _ = run_tool("train", ROOT / CONFIG, "--work-dir", tmp_path, *options)
    assert status == 0 and "coco/bbox_mAP" in out
    (log,) = tmp_path.glob("*/vis_data/scalars.json")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 8 and sum(losses[-3:]) < 0.95 * sum(losses[:3])
