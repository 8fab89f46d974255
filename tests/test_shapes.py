"""The synthetic data set: COCO's format, reproducible, resumable."""

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from make_shapes import CLASSES, make_shapes


def read(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_is_a_coco_data_set_with_boxes_and_masks(tmp_path):
    make_shapes(tmp_path, train=6, val=3, size=96, seed=1)
    for split, count in (("train", 6), ("val", 3)):
        coco = COCO(str(tmp_path / "annotations" / f"instances_{split}.json"))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        assert len(coco.imgs) == count
        for image in coco.imgs.values():
            pixels = cv2.imread(str(tmp_path / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3)
            assert len(coco.getAnnIds(imgIds=image["id"])) >= 1
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            x, y, w, h = annotation["bbox"]
            # pycocotools leaves out the outline of the polygon, and with it tips that the box has.
            assert np.abs([columns[0] - x, rows[0] - y]).max() <= 2
            assert np.abs([columns[-1] + 1 - x - w, rows[-1] + 1 - y - h]).max() <= 2
            polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2)
            outline = cv2.arcLength(polygon, closed=True)
            assert 0 <= annotation["area"] - int(mask.sum()) <= outline
            assert min(x, y) >= 0 and max(x + w, y + h) <= 96


def test_is_the_same_for_the_same_seed_and_differs_between_seeds_and_splits(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_shapes(tmp_path / name, train=2, val=2, size=64, seed=seed)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and all(a[key] != c[key] for key in a)
    images = [content for path, content in a.items() if path.suffix == ".jpg"]
    assert len(set(images)) == 4


def test_keeps_a_complete_split_and_draws_an_incomplete_one_again(tmp_path, capsys):
    make_shapes(tmp_path, train=2, val=2, size=64)
    before = read(tmp_path)
    stamp = (tmp_path / "train" / "000000.jpg").stat().st_mtime_ns
    (tmp_path / "annotations" / "instances_val.json").unlink()  # as after an interruption
    make_shapes(tmp_path, train=2, val=2, size=64)
    assert read(tmp_path) == before
    assert (tmp_path / "train" / "000000.jpg").stat().st_mtime_ns == stamp
    assert "the train split is complete" in capsys.readouterr().out
    make_shapes(tmp_path, train=3, val=2, size=64)
    ann_file = tmp_path / "annotations" / "instances_train.json"
    assert len(json.loads(ann_file.read_text())["images"]) == 3


@pytest.mark.parametrize("bad", [dict(train=0), dict(val=-1), dict(size=63), dict(seed=-1)])
def test_bad_arguments_are_named(tmp_path, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        make_shapes(tmp_path, **bad)
    assert not list(tmp_path.iterdir())
