"""The metrics against pycocotools, the bootstrap against what is known of its outcome."""

import copy
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmsoftpool.datasets.shapes import make_shapes
from mmsoftpool.evaluation.comparison import METRICS, DetectionScores, compare_detections


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
    """Annotations of 24 made images."""
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
        """Result files of a good and of a worse detector, two runs of each."""
        coco = COCO(shapes)
        return {
            name: [
                write(tmp_path / f"{name}{seed}.json", noisy_detections(coco, seed, jitter))
                for seed in (0, 1)
            ]
            for name, jitter in (("good", 0.02), ("bad", 0.08))
        }

    def test_a_model_does_not_differ_from_itself(self, shapes, files):
        result = compare_detections(shapes, files["good"], files["good"], resamples=20)
        known = ~np.isnan(result.difference)
        assert (result.difference[known] == 0).all() and (result.interval[:, known] == 0).all()

    def test_a_worse_one_is_surely_worse(self, shapes, files):
        result = compare_detections(shapes, files["bad"], files["good"], resamples=100)
        low, high = result.interval[:, 0]
        assert 0 < low < result.difference[0] < high
        means = [np.mean([s[0] for s in scores]) for scores in result.scores]
        assert result.difference[0] == pytest.approx(means[1] - means[0])

    def test_the_interval_has_the_spread_of_the_mean_over_images(self, shapes, tmp_path):
        # Each image has one object, found or not: AP is the share that is found (no false alarms),
        # so the standard error of a difference is known.
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
        a, b = (
            write(tmp_path / f"{n}.json", [dict(found, image_id=i) for i in range(n)])
            for n in (101, 141)
        )
        result = compare_detections(ann_file, [a], [b], resamples=1000)
        # 40 of 200 images differ; recall is read off at 101 points, hence the tolerance.
        error = 100 * np.sqrt(0.2 * 0.8 / 200)
        assert result.difference[0] == pytest.approx(20, abs=1)
        np.testing.assert_allclose(
            result.interval[:, 0], [20 - 1.96 * error, 20 + 1.96 * error], atol=1
        )

    def test_is_reproducible(self, shapes, files):
        one, two = (
            compare_detections(shapes, files["bad"], files["good"], resamples=20) for _ in range(2)
        )
        np.testing.assert_array_equal(one.interval, two.interval)

    def test_writes_a_table_and_a_picture(self, shapes, files, tmp_path):
        result = compare_detections(
            shapes, files["bad"], files["good"][:1], names=("bad", "good"), resamples=20
        )
        table = result.markdown()
        header, rule, *rows = [line for line in table.splitlines() if line.startswith("|")]
        assert [cell.strip() for cell in header.split("|")[2:-1]] == list(METRICS)
        assert [row.split("|")[1].strip() for row in rows] == [
            "bad", "good", "difference", "95% interval",
        ]  # fmt: skip
        assert len({len(line) for line in (header, rule, *rows)}) == 1
        assert "2 and 1 runs" in table and "AP of the runs of bad: " in table
        assert rows[0].split("|")[7].strip() == "n/a"  # no large object in these images
        result.plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000

    def test_says_what_is_wrong_with_a_file(self, shapes, files, tmp_path):
        good = files["good"]
        cut = tmp_path / "cut.json"
        cut.write_text(good[0].read_text()[:-50])
        foreign = write(
            tmp_path / "foreign.json",
            [dict(image_id=99999, category_id=1, bbox=[0, 0, 1, 1], score=1)],
        )
        for ann_file, a, message in (
            (tmp_path / "no.json", good, "no annotation file at .*no.json"),
            (good[0], good, "is not in COCO's annotation format"),
            (shapes, [tmp_path / "no.json"], "no result file at .*no.json"),
            (shapes, [cut], "cut.json is not JSON, or is cut off"),
            (shapes, [shapes], "is not a list of detections"),
            (shapes, [foreign], "1 images that the annotations do not have, .* 99999"),
        ):
            with pytest.raises(ValueError, match=message):
                compare_detections(ann_file, a, good)
        with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
            compare_detections(shapes, good, good, resamples=0)
        with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
            compare_detections(shapes, good, good, confidence=95)
