"""Submissions to the COCO server: the run, its interruption, and the check."""

import json
import zipfile

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from mmsoftpool.config import load_config
from mmsoftpool.evaluation import submission
from mmsoftpool.evaluation.submission import check_submission, detect_test_dev

from ..common import SMALL, config_path

# All detections of random weights, from few proposals.
OPTIONS = {**SMALL, "model.test_cfg.rcnn.score_thr": 0.0, "model.test_cfg.rpn.max_per_img": 20}
NAME = "detections_test-dev2017_test_results"


@pytest.fixture(scope="module")
def mask_rcnn(coco_root, tmp_path_factory):
    """The checkpoint of a Mask R-CNN with random weights, whose detections are noise."""
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope
    from mmengine.runner import save_checkpoint

    cfg = load_config(config_path("mask_rcnn_r34_softpool"))
    init_default_scope("mmdet")
    path = tmp_path_factory.mktemp("weights") / "epoch_1.pth"
    save_checkpoint(dict(state_dict=MODELS.build(cfg.model).state_dict()), str(path))
    return path


@pytest.fixture
def small(coco_root, tmp_path):
    """Loads the config of a small run in ``tmp_path``."""

    def load():
        options = {**OPTIONS, "data_root": str(coco_root)}
        return load_config(config_path("mask_rcnn_r34_softpool"), options, str(tmp_path))

    return load


def test_writes_submissions_that_pass_the_check(run_tool, coco_root, mask_rcnn, tmp_path):
    ann_file = coco_root / "annotations" / "image_info_test-dev2017.json"
    options = [f"{key}={value}" for key, value in OPTIONS.items()]
    arguments = ("--work-dir", tmp_path, "--name", "test")
    command = ("test-dev", config_path("mask_rcnn_r34_softpool"), mask_rcnn, *arguments)
    status, out, _ = run_tool(*command, "--cfg-options", f"data_root={coco_root}", *options)
    assert status == 0
    assert "in 1 of 1 images, but the server's test-dev2017 has 20288 images" in out
    coco = COCO(ann_file)
    for metric, key in (("bbox", "bbox"), ("segm", "segmentation")):
        path = tmp_path / "test-dev" / metric / f"{NAME}.zip"
        assert f"upload for {metric}: {path}" in out
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == [f"{NAME}.json"]
            detections = json.loads(archive.read(f"{NAME}.json"))
        assert 0 < len(detections) <= 100
        assert detections[0].keys() == {"image_id", "category_id", "score", key}
        assert len(coco.loadRes(detections).anns) == len(detections)
        status, checked, _ = run_tool("test-dev", "--check", path, "--ann-file", ann_file)
        assert status == 0 and "in 1 of 1 images, but the server" in checked


def test_resumes_at_the_first_missing_part(coco_root, mask_rcnn, small, tmp_path, monkeypatch):
    val = json.loads((coco_root / "annotations" / "instances_val2017.json").read_text())
    ann_file = tmp_path / "image_info.json"
    info = dict(images=val["images"][:5], categories=val["categories"], info={}, licenses=[])
    ann_file.write_text(json.dumps(info))
    arguments = (str(mask_rcnn), "test", ann_file, coco_root / "val2017")
    keep = submission._keep

    def keep_once(unfinished, part, metric):
        if part.name.startswith("0001"):
            raise KeyboardInterrupt
        keep(unfinished, part, metric)

    monkeypatch.setattr(submission, "_keep", keep_once)
    with pytest.raises(KeyboardInterrupt):
        detect_test_dev(small(), *arguments, part_size=2)
    parts = tmp_path / "test-dev" / "parts"
    assert sorted(p.name for p in parts.iterdir()) == ["0000.bbox.json", "0000.segm.json"]
    first = (parts / "0000.bbox.json").stat().st_mtime_ns

    monkeypatch.setattr(submission, "_keep", keep)
    submissions = detect_test_dev(small(), *arguments, part_size=2)
    assert (parts / "0000.bbox.json").stat().st_mtime_ns == first
    assert len(list(parts.iterdir())) == 6
    for path in submissions.values():
        check_submission(path, ann_file)  # all five images are there

    other = small()
    other.model.test_cfg.rcnn.max_per_img = 7
    with pytest.raises(ValueError, match="has results of a run with another model"):
        detect_test_dev(other, *arguments, part_size=2)


@pytest.mark.parametrize("metric", ["bbox", "segm"])
def test_an_image_keeps_its_best_100_detections(tmp_path, metric):
    found = [
        dict(image_id=image, bbox=[0, 0, 1, 1], score=(7 * i % count) / count)
        for image, count in ((3, 150), (1, 20))
        for i in range(count)
    ]
    unfinished, part = tmp_path / "unfinished.json", tmp_path / "part.json"
    unfinished.write_text(json.dumps(found))
    submission._keep(unfinished, part, metric)
    kept = json.loads(part.read_text())
    assert all(("bbox" in detection) == (metric == "bbox") for detection in kept)
    scores = {image: sorted(d["score"] for d in kept if d["image_id"] == image) for image in (1, 3)}
    assert scores == {1: [i / 20 for i in range(20)], 3: [i / 150 for i in range(50, 150)]}


def test_refuses_data_that_is_not_test_devs(coco_root, mask_rcnn, small, tmp_path):
    annotations = coco_root / "annotations"

    def refusal(ann_file, image_dir=coco_root / "test2017", name="test", checkpoint=mask_rcnn):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            detect_test_dev(small(), str(checkpoint), name, ann_file, image_dir)
        return str(error.value)

    assert "has annotations" in refusal(annotations / "instances_val2017.json")
    assert "9 of the 10 images" in refusal(annotations / "image_info_test-dev2017_10.json")
    assert "no image list of test-dev at" in refusal(tmp_path / "missing.json")
    good = annotations / "image_info_test-dev2017.json"
    assert "name must have only letters" in refusal(good, name="a b")
    assert "no checkpoint at" in refusal(good, checkpoint=tmp_path / "none.pth")
    several = small()
    several.test_evaluator = [several.test_evaluator]
    with pytest.raises(ValueError, match="must have one test_evaluator, a CocoMetric"):
        detect_test_dev(several, str(mask_rcnn), "test", good, coco_root / "test2017")
    info = json.loads(good.read_text())
    info["categories"][0]["name"] = "martian"
    (tmp_path / "other.json").write_text(json.dumps(info))
    assert "classes of the detector must be the 80 of" in refusal(tmp_path / "other.json")


class TestCheck:
    """Each fault that the server would refuse or miscount, in an otherwise correct file."""

    @pytest.fixture
    def ann_file(self, tmp_path):
        images = [dict(id=i, height=40, width=60, file_name=f"{i}.jpg") for i in (1, 2)]
        path = tmp_path / "image_info.json"
        path.write_text(json.dumps(dict(images=images, categories=[dict(id=18, name="dog")])))
        return path

    @staticmethod
    def detections():
        mask = mask_utils.frPyObjects([[1, 1, 20, 1, 20, 20]], 40, 60)[0]
        mask["counts"] = mask["counts"].decode()
        return [
            dict(image_id=i, category_id=18, score=0.5, bbox=[0, 1, 60, 39], segmentation=mask)
            for i in (1, 2)
        ]

    def check(self, tmp_path, ann_file, detections, name=NAME, **kwargs):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(detections))
        return check_submission(path, ann_file, **kwargs)

    def test_a_correct_file_passes(self, tmp_path, ann_file, monkeypatch):
        text = self.check(tmp_path, ann_file, self.detections())
        assert text.endswith("in 2 of 2 images, but the server's test-dev2017 has 20288 images")
        monkeypatch.setattr(submission, "TEST_DEV_IMAGES", 2)
        text = self.check(tmp_path, ann_file, self.detections())
        assert text.endswith(
            "2 detections (bbox and segmentation) in 2 of 2 images, ready for the server"
        )

    def test_any_mask_passes(self, tmp_path, ann_file):
        rng = np.random.default_rng(0)
        detections = [
            dict(
                image_id=1 + i % 2,
                category_id=18,
                score=0.5,
                segmentation=mask_utils.encode(np.asfortranarray(mask, np.uint8)),
            )
            for i, mask in enumerate(
                rng.random((20, 40, 60)) < np.linspace(0, 1, 20)[:, None, None]
            )
        ]
        for detection in detections:
            detection["segmentation"]["counts"] = detection["segmentation"]["counts"].decode()
        assert "20 detections (segmentation)" in self.check(tmp_path, ann_file, detections)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("image_id", 3, "1 of 2 have no image_id in test-dev, the first is number 1"),
            ("category_id", 1, "category_id of COCO"),
            ("score", 1.5, "score from 0 to 1"),
            ("score", float("nan"), "score from 0 to 1"),
            ("score", "high", "score from 0 to 1"),
            ("score", True, "score from 0 to 1"),
            ("score", 10**400, "score from 0 to 1"),
            ("image_id", True, "image_id in test-dev"),
            ("image_id", [1], "image_id in test-dev"),
            ("category_id", None, "category_id of COCO"),
            ("bbox", [0, 0, float("inf"), 1], "bbox inside its image"),
            ("bbox", [0, 0, 61, 10], "bbox inside its image"),
            ("bbox", [5, 5, -1, 10], "bbox inside its image"),
            ("bbox", [5, 5, 1], "bbox inside its image"),
            ("segmentation", [[1, 1, 5, 5, 1, 5]], "segmentation, an RLE"),
            ("segmentation", dict(size=[60, 40], counts="P1"), "segmentation, an RLE"),
            ("segmentation", dict(size=[40, 60], counts="P1"), "segmentation, an RLE"),
            ("segmentation", dict(size=[40, 60], counts=""), "segmentation, an RLE"),
            ("segmentation", dict(size=[40, 60], counts="`"), "segmentation, an RLE"),
            ("segmentation", dict(size=[40, 60], counts="é"), "segmentation, an RLE"),
        ],
    )
    def test_a_wrong_value_is_reported(self, tmp_path, ann_file, key, value, message):
        detections = self.detections()
        detections[1][key] = value
        with pytest.raises(ValueError, match=message):
            self.check(tmp_path, ann_file, detections)

    def test_a_mask_is_checked_where_the_first_detection_has_none(self, tmp_path, ann_file):
        one, two = self.detections()
        del one["segmentation"]
        two["segmentation"] = "garbage"
        with pytest.raises(ValueError, match="2 of 2 have no segmentation, an RLE"):
            self.check(tmp_path, ann_file, [one, two])

    @pytest.mark.parametrize(
        "content", [b"[" * 100_000 + b"]" * 100_000, b"[" + b"9" * 5000 + b"]", b"[\xff]"]
    )
    def test_a_file_that_is_not_json_is_named(self, tmp_path, ann_file, content):
        path = tmp_path / f"{NAME}.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{NAME}.json is not JSON, or is damaged"):
            check_submission(path, ann_file)

    # The flag of encryption, the method of compression, the compressed data.
    @pytest.mark.parametrize("place", [6, 8, 100])
    def test_a_damaged_zip_is_named(self, tmp_path, ann_file, place):
        path = tmp_path / f"{NAME}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(f"{NAME}.json", json.dumps(self.detections()))
        content = bytearray(path.read_bytes())
        directory = content.index(b"PK\1\2")
        for start in [place] if place == 100 else [place, directory + place + 2]:
            content[start] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or truncated, or not a plain zip file"):
            check_submission(path, ann_file)

    def test_a_zip_that_unpacks_to_too_much_is_refused(self, tmp_path, ann_file, monkeypatch):
        monkeypatch.setattr(submission, "MAX_BYTES", 1000)
        path = tmp_path / f"{NAME}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(f"{NAME}.json", "[" + " " * 10**6 + "]")
        with pytest.raises(ValueError, match="must unpack to less than 1000 bytes, got 1000002"):
            check_submission(path, ann_file)

    def test_missing_and_excess_content_is_reported(self, tmp_path, ann_file):
        one, two = self.detections()
        del two["score"]
        for detections, message in (
            ([one, two], "1 of 2 have no score"),
            (
                [one],
                "for 1 of 2 images, the first image without is 2; the file may be",
            ),
            (
                [one] * 101 + [two | dict(score=0)],
                "at most 100 detections in an image, got 101 in image 1",
            ),
            ([], "has no detections"),
            ([1], "1 of 1 have no image_id in test-dev, the first is number 0, 1"),
            (dict(a=1), "must be a list of detections, got a dict"),
        ):
            with pytest.raises(ValueError, match=message):
                self.check(tmp_path, ann_file, detections)
        assert "1 of 2 images" in self.check(tmp_path, ann_file, [one], max_empty=1)

    def test_a_damaged_or_misnamed_file_is_reported(self, tmp_path, ann_file):
        with pytest.raises(ValueError, match="must be named detections_test-dev2017_NAME"):
            self.check(tmp_path, ann_file, self.detections(), name="results")
        self.check(tmp_path, ann_file, self.detections())
        path = tmp_path / f"{NAME}.json"
        path.write_text(path.read_text()[:-20])
        with pytest.raises(ValueError, match="is damaged or truncated"):
            check_submission(path, ann_file)
        archive = path.with_suffix(".zip")
        with zipfile.ZipFile(archive, "w") as file:
            file.write(path, "folder/results.json")
        with pytest.raises(ValueError, match=f"must contain only {NAME}.json"):
            check_submission(archive, ann_file)
        archive.write_bytes(archive.read_bytes()[:50])
        with pytest.raises(ValueError, match="is damaged or truncated"):
            check_submission(archive, ann_file)


def test_an_image_of_impossible_size_is_refused(tmp_path):
    image = dict(id=1, file_name="1.jpg", height=10**400, width=1)
    info = dict(images=[image], categories=[dict(id=1, name="disc")])
    (tmp_path / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="height and width, positive integers"):
        submission.read_image_info(tmp_path / "info.json")
