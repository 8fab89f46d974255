"""The metrics against pycocotools, the bootstrap against closed forms."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from make_shapes import CLASSES, make_shapes
from mmsoftpool.errors import UserError
from mmsoftpool.evaluation.comparison import (
    METRICS,
    Comparison,
    DetectionScores,
    compare_detections,
)


def noisy_detections(coco: COCO, seed: int, jitter: float) -> list[dict]:
    """The ground truth, its boxes moved, some missing, some of another class, and false alarms."""
    rng = np.random.default_rng(seed)
    categories = coco.getCatIds()
    detections = []
    for annotation in coco.anns.values():
        if annotation["iscrowd"] or rng.random() < 0.2:
            continue
        category = annotation["category_id"]
        if rng.random() < 0.15:
            category = int(rng.choice(categories))
        box = np.array(annotation["bbox"], float)
        box += rng.normal(scale=jitter, size=4) * np.tile(np.maximum(box[2:], 1), 2)
        detection = dict(
            image_id=annotation["image_id"],
            category_id=category,
            bbox=np.maximum(box, 1).tolist(),
            score=rng.random(),
            segmentation=coco.annToRLE(annotation),
        )
        detection["segmentation"]["counts"] = detection["segmentation"]["counts"].decode()
        detections.append(detection)
    for image in coco.getImgIds():
        for _ in range(3):
            x, y, w, h = rng.uniform(1, 100, size=4).tolist()
            detections.append(
                dict(
                    detections[rng.integers(len(detections))],
                    image_id=image,
                    bbox=[x, y, w, h],
                    score=rng.random() * 0.7,
                )
            )
    size = {i: [image["height"], image["width"]] for i, image in coco.imgs.items()}
    return [d for d in detections if d["segmentation"]["size"] == size[d["image_id"]]]


def pycocotools_scores(coco: COCO, detections: list[dict], iou_type: str) -> list[float]:
    detections = copy.deepcopy(detections)
    if iou_type == "segm":
        for detection in detections:
            del detection["bbox"]
    evaluation = COCOeval(coco, coco.loadRes(detections), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:6]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Annotations of 24 synthetic images."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=1, val=24)
    return root / "annotations" / "instances_val.json"


class TestDetectionScores:
    @pytest.mark.parametrize("iou_type", ["bbox", "segm"])
    def test_are_pycocotools_scores_on_coco_photos(self, coco_root, tmp_path, iou_type):
        coco = COCO(coco_root / "annotations" / "instances_val2017.json")
        detections = noisy_detections(coco, 0, jitter=0.05)
        expected = pycocotools_scores(coco, detections, iou_type)
        scores = DetectionScores(coco, write(tmp_path / "d.json", detections), iou_type)()
        assert 0.05 < expected[0] < 0.95
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)

    def test_a_weight_is_a_number_of_copies(self, shapes, tmp_path):
        coco = COCO(shapes)
        detections = noisy_detections(coco, 1, jitter=0.05)
        weights = np.random.default_rng(0).integers(0, 4, size=24)
        copies = {**coco.dataset, "images": [], "annotations": []}
        copied = []
        for image, weight in zip(coco.getImgIds(), weights, strict=True):
            for _ in range(weight):
                new = len(copies["images"])
                copies["images"].append(dict(coco.imgs[image], id=new))
                for a in coco.imgToAnns[image]:
                    number = len(copies["annotations"]) + 1
                    copies["annotations"].append(dict(a, id=number, image_id=new))
                copied += [dict(d, image_id=new) for d in detections if d["image_id"] == image]
        many = COCO(write(tmp_path / "copies.json", copies))
        expected = pycocotools_scores(many, copied, "bbox")
        scores = DetectionScores(coco, write(tmp_path / "d.json", detections))(weights)
        known = np.array(expected) >= 0  # pycocotools' -1: no such object
        np.testing.assert_allclose(scores[known], np.array(expected)[known], rtol=0, atol=1e-12)
        assert np.isnan(scores[~known]).all()

    def test_no_detections_score_zero(self, shapes, tmp_path):
        scores = DetectionScores(COCO(shapes), write(tmp_path / "d.json", []))()
        assert scores[0] == 0


class TestCompareDetections:
    @pytest.fixture
    def files(self, shapes, tmp_path):
        """Result files of a good, a worse and a bad detector, two runs of each."""
        coco = COCO(shapes)
        return {
            name: [
                write(tmp_path / f"{name}{seed}.json", noisy_detections(coco, seed, jitter))
                for seed in (0, 1)
            ]
            for name, jitter in (("good", 0.02), ("worse", 0.05), ("bad", 0.08))
        }

    @staticmethod
    def choose(files, *names):
        return {name: files[name] for name in names}

    def test_a_model_does_not_differ_from_itself(self, shapes, files):
        results = {"good": files["good"], "same": files["good"]}
        result = compare_detections(shapes, results, resamples=20)
        known = ~np.isnan(result.differences)
        assert (result.differences[known] == 0).all()
        assert (result.intervals.swapaxes(1, 2)[known] == 0).all()

    def test_a_better_model_has_an_interval_above_zero(self, shapes, files):
        result = compare_detections(shapes, self.choose(files, "bad", "good"), resamples=100)
        low, high = result.intervals[0, :, 0]
        assert 0 < low < result.differences[0, 0] < high
        means = [np.mean([s[0] for s in scores]) for scores in result.scores]
        assert result.differences[0, 0] == pytest.approx(means[1] - means[0])

    def test_every_later_model_is_compared_with_the_first(self, shapes, files):
        together = compare_detections(
            shapes, self.choose(files, "bad", "worse", "good"), resamples=20
        )
        for i, name in enumerate(("worse", "good")):
            pair = compare_detections(shapes, self.choose(files, "bad", name), resamples=20)
            np.testing.assert_array_equal(together.differences[i], pair.differences[0])
            np.testing.assert_array_equal(together.intervals[i], pair.intervals[0])

    def test_the_interval_has_the_spread_of_the_mean_over_images(self, shapes, tmp_path):
        # Each image has one object, detected or not, and there are no false positives. AP is then
        # the share of detected objects, so the standard error of a difference is known.
        images = [dict(id=i, height=100, width=100, file_name="") for i in range(200)]
        boxes = [
            dict(id=i + 1, image_id=i, category_id=1, bbox=[9, 9, 50, 50], area=2500, iscrowd=0)
            for i in range(200)
        ]
        categories = [dict(id=1, name="thing")]
        ann_file = write(
            tmp_path / "a.json", dict(images=images, annotations=boxes, categories=categories)
        )
        found = dict(category_id=1, bbox=[9, 9, 50, 50], score=0.5)
        results = {
            f"{n} found": [
                write(tmp_path / f"{n}.json", [dict(found, image_id=i) for i in range(n)])
            ]
            for n in (101, 141)
        }
        result = compare_detections(ann_file, results, resamples=1000)
        # 40 of 200 images differ; precision is read at 101 recalls, hence the tolerance.
        error = 100 * np.sqrt(0.2 * 0.8 / 200)
        assert result.differences[0, 0] == pytest.approx(20, abs=1)
        np.testing.assert_allclose(
            result.intervals[0, :, 0], [20 - 1.96 * error, 20 + 1.96 * error], atol=1
        )

    def test_is_reproducible(self, shapes, files):
        one, two = (
            compare_detections(shapes, self.choose(files, "bad", "good"), resamples=20)
            for _ in range(2)
        )
        np.testing.assert_array_equal(one.intervals, two.intervals)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(resamples=0), "resamples must be at least 1, got 0"),
            (dict(confidence=95), "confidence must be between 0 and 1, got 95"),
        ],
    )
    def test_a_number_out_of_range_is_named(self, shapes, files, arguments, message):
        with pytest.raises(ValueError, match=message):
            compare_detections(shapes, self.choose(files, "bad", "good"), **arguments)

    def test_needs_two_models_with_files(self, shapes, files):
        with pytest.raises(ValueError, match=r"must have at least two models, got \['bad'\]"):
            compare_detections(shapes, self.choose(files, "bad"))
        with pytest.raises(ValueError, match=r"got none for \['good'\]"):
            compare_detections(shapes, {"bad": files["bad"], "good": []})

    def test_a_wrong_file_is_named(self, shapes, files, tmp_path):
        good = files["good"]
        cut = tmp_path / "cut.json"
        cut.write_text(good[0].read_text()[:-50])
        foreign = write(
            tmp_path / "foreign.json",
            [dict(image_id=99999, category_id=1, bbox=[0, 0, 1, 1], score=1)],
        )
        for error, ann_file, a, message in (
            (FileNotFoundError, tmp_path / "no.json", good, "no annotation file at .*no.json"),
            (ValueError, good[0], good, "is not in COCO's annotation format"),
            (FileNotFoundError, shapes, [tmp_path / "no.json"], "no result file at .*no.json"),
            (ValueError, shapes, [cut], "cut.json is not JSON, or is damaged or truncated"),
            (ValueError, shapes, [shapes], "must be a list of detections.*got a dict"),
            (ValueError, shapes, [foreign], "1 of 1 have no image_id in the annotations.*99999"),
        ):
            with pytest.raises(error, match=message):
                compare_detections(ann_file, {"a": a, "good": good})

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("category_id", "1", "category_id in the annotations"),
            ("category_id", 99, "category_id in the annotations"),
            ("score", "0.5", "score, a finite number"),
            ("score", float("nan"), "score, a finite number"),
            ("score", True, "score, a finite number"),
            ("bbox", [1, 2, 3], "bbox of x, y, width, height"),
        ],
    )
    def test_a_wrong_detection_is_named(self, shapes, files, tmp_path, key, value, message):
        detections = json.loads(files["good"][0].read_text())
        detections[3][key] = value
        path = write(tmp_path / "x.json", detections)
        with pytest.raises(
            ValueError, match=f"1 of {len(detections)} have no {message}, the first is number 3"
        ):
            compare_detections(shapes, {"a": [path], "b": files["good"]})

    def test_a_box_of_negative_size_matches_nothing(self, shapes, files, tmp_path):
        """As detectors write them: a box at the border that rounding turns over."""
        detections = json.loads(files["good"][0].read_text())
        beyond = dict(detections[0], bbox=[64, 10, -1e-4, 5], score=1e-9)
        path = write(tmp_path / "x.json", [*detections, beyond])
        result = compare_detections(shapes, {"a": [path], "b": files["good"]}, resamples=1)
        np.testing.assert_array_equal(result.scores[0][0], result.scores[1][0])

    @pytest.mark.parametrize("key", ["area", "iscrowd"])
    def test_annotations_that_cannot_be_evaluated(self, shapes, files, tmp_path, key):
        data = json.loads(shapes.read_text())
        del data["annotations"][2][key]
        path = write(tmp_path / "annotations.json", data)
        with pytest.raises(ValueError, match=f"1 of .* have no {key}.*, the first is number 2"):
            compare_detections(path, {"a": files["good"], "b": files["good"]})

    def test_annotations_numbered_from_0_do_not_lower_ap(self, shapes, tmp_path):
        data = json.loads(shapes.read_text())
        for number, annotation in enumerate(data["annotations"]):
            annotation["id"] = number
        found = [dict(a, score=1.0) for a in data["annotations"]]
        path, perfect = write(tmp_path / "zero.json", data), [write(tmp_path / "d.json", found)]
        result = compare_detections(path, {"a": perfect, "b": perfect}, resamples=1)
        assert result.scores[0][0, 0] == 100


class TestComparison:
    @staticmethod
    def comparison(*runs):
        """Made-up scores of models with the given numbers of runs; no large objects."""
        names = ("first", "second", "third")[: len(runs)]
        scores = []
        for model, count in enumerate(runs):
            values = 10.0 * model + np.arange(count)[:, None] + np.arange(6)
            values[:, 5] = np.nan
            scores.append(values)
        intervals = np.tile(np.array([[-1.0], [1.0]]), (len(runs) - 1, 1, 6))
        intervals[:, :, 5] = np.nan
        return Comparison(names, tuple(scores), intervals, 0.95, 1000, images=7)

    @staticmethod
    def cells(table):
        return [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.splitlines()
            if line.startswith("|")
        ]

    def test_the_table_of_two_models(self):
        table = self.comparison(2, 2).markdown()
        header, _, *rows = self.cells(table)
        assert header == ["", *METRICS]
        assert rows == [
            ["first", "0.5", "1.5", "2.5", "3.5", "4.5", "n/a"],
            ["second", "10.5", "11.5", "12.5", "13.5", "14.5", "n/a"],
            ["difference", *["+10.0"] * 5, "n/a"],
            ["95% interval", *["-1.0 to +1.0"] * 5, "n/a"],
        ]
        assert len({len(line) for line in table.splitlines() if line.startswith("|")}) == 1

    def test_the_table_of_three_models_has_all_differences_to_the_first(self):
        table = self.comparison(1, 1, 1).markdown()
        rows = self.cells(table)[2:]
        assert [row[:2] for row in rows] == [
            ["first", "0.0"],
            ["second", "10.0"],
            ["third", "20.0"],
            ["second: difference", "+10.0"],
            ["second: 95% interval", "-1.0 to +1.0"],
            ["third: difference", "+20.0"],
            ["third: 95% interval", "-1.0 to +1.0"],
        ]
        assert "Differences are to first." in table

    def test_a_confidence_is_not_rounded(self):
        comparison = replace(self.comparison(1, 1), confidence=0.995)
        assert "| 99.5% interval |" in comparison.markdown()

    def test_the_notes_name_the_runs(self):
        text = self.comparison(2, 2).markdown()
        assert "7 images; 2 runs of each model." in text
        assert "1000 paired bootstrap samples of images and runs." in text
        assert "AP of the runs of second: 10.0, 11.0." in text
        assert "leave out" not in text

    def test_one_seed_leaves_out_the_spread_between_runs(self):
        text = self.comparison(1, 1).markdown()
        assert "7 images; 1 run of each model." in text and "bootstrap samples of images." in text
        assert "With one run of each model, the intervals leave out the spread between runs" in text
        text = self.comparison(2, 1).markdown()
        assert "7 images; runs: 2 of first, 1 of second." in text
        assert "With one run of second, the intervals leave out the spread" in text

    @pytest.mark.parametrize("runs", [(2, 2), (1, 1, 1)])
    def test_the_picture_is_drawn_without_a_display(self, tmp_path, runs):
        self.comparison(*runs).plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
        assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("classes", [CLASSES, CLASSES[1:3], CLASSES[3:]])
def test_the_ap_is_that_of_mmdets_evaluation_for_the_same_classes(tmp_path, classes):
    make_shapes(tmp_path, train=1, val=8, size=64)
    ann_file = tmp_path / "annotations" / "instances_val.json"
    metainfo = dict(classes=classes)
    options = dict(metainfo=metainfo, data_prefix=dict(img="val/"), test_mode=True, pipeline=[])
    dataset = CocoDataset(ann_file=str(ann_file), **options)
    metric = CocoMetric(ann_file=str(ann_file), outfile_prefix=str(tmp_path / "found"))
    metric.dataset_meta = dataset.metainfo
    rng = np.random.default_rng(0)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        boxes = np.array([i["bbox"] for i in info["instances"]], np.float32).reshape(-1, 4)
        found = dict(
            bboxes=torch.from_numpy(boxes + rng.normal(0, 3, boxes.shape).astype(np.float32)),
            scores=torch.from_numpy(rng.random(len(boxes))),
            labels=torch.tensor([i["bbox_label"] for i in info["instances"]], dtype=torch.long),
        )
        metric.process({}, [dict(img_id=info["img_id"], ori_shape=(64, 64), pred_instances=found)])
    expected = metric.evaluate(len(dataset))
    files = {name: [tmp_path / "found.bbox.json"] for name in "ab"}
    scores = compare_detections(ann_file, files, classes=classes, resamples=1).scores[0][0] / 100
    for name, score in zip(("", "_50", "_75", "_s", "_m"), scores, strict=False):
        assert expected[f"coco/bbox_mAP{name}"] == round(float(np.nan_to_num(score, nan=-1)), 3)
    assert 0 < scores[0] < 1


def test_unknown_classes_are_named(tmp_path):
    make_shapes(tmp_path, train=1, val=1, size=64)
    ann_file = tmp_path / "annotations" / "instances_val.json"
    (tmp_path / "x.json").write_text("[]")
    files = {name: [tmp_path / "x.json"] for name in "ab"}
    with pytest.raises(UserError, match=r"classes must be categories in .*; got disk"):
        compare_detections(ann_file, files, classes=["disk"])
