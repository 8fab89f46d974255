"""The picture of a run's detections, and how every picture is written."""

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmdet.datasets import CocoDataset

import draw_run as run
from make_shapes import make_shapes
from mmsoftpool.errors import UserError
from mmsoftpool.pictures import save_figure


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    figures = []
    monkeypatch.setattr(run, "save_figure", lambda figure, path: figures.append(figure))
    return figures


@pytest.fixture
def dataset(tmp_path):
    make_shapes(tmp_path, train=1, val=1)
    return CocoDataset(
        metainfo=dict(classes=("disc", "square", "triangle", "star")),
        data_root=str(tmp_path),
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=[],
    )


def predictions(**changes):
    instances = dict(
        bboxes=torch.tensor([[10.0, 20, 40, 60], [1, 2, 3, 4]]),
        scores=torch.tensor([0.9, 0.1]),
        labels=torch.tensor([1, 0]),
    )
    return [dict(img_id=0, pred_instances=instances | changes)]


def test_detections_are_drawn_below_the_ground_truth(drawn, tmp_path, dataset):
    run.draw_detections(dataset, predictions(), tmp_path / "x.png")
    above, below = drawn[0].axes
    objects = dataset.get_data_info(0)["instances"]
    assert len(above.patches) == len(objects) > 0
    names = [dataset.metainfo["classes"][instance["bbox_label"]] for instance in objects]
    assert [text.get_text() for text in above.texts] == names
    (box,) = below.patches  # the other one has a low score
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((10, 20), 30, 40)
    assert [text.get_text() for text in below.texts] == ["square 0.90"]


def test_names_are_those_of_the_data_set_and_taken_literally(drawn, tmp_path, dataset):
    """Not the categories of the file in its order; dollar signs are no formula."""
    dataset._metainfo["classes"] = ("a", "$b$_", "c", "d")
    run.draw_detections(dataset, predictions(), tmp_path / "x.png")
    drawn[0].savefig(tmp_path / "x.png")
    assert [text.get_text() for text in drawn[0].axes[1].texts] == ["$b$_ 0.90"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "a list of dicts with img_id and pred_instances"),
        ([{}], "got another entry number 0"),
        (predictions(labels=torch.tensor([1, 4])), "got another entry number 0"),
        ([dict(predictions()[0], img_id=7)], "it has no image 7"),
    ],
)
def test_other_predictions_are_refused(dataset, tmp_path, found, message):
    with pytest.raises(UserError, match=message):
        run.draw_detections(dataset, found, tmp_path / "x.png")


class TestSaveFigure:
    def test_the_suffix_is_the_format(self, tmp_path):
        figure = Figure((2, 1))
        for suffix, start in (("png", b"\x89PNG"), ("jpg", b"\xff\xd8"), ("pdf", b"%PDF")):
            save_figure(figure, tmp_path / f"x.{suffix}")
            assert (tmp_path / f"x.{suffix}").read_bytes().startswith(start)
        assert cv2.imread(str(tmp_path / "x.png")).shape == (150, 300, 3)
        assert np.all(cv2.imread(str(tmp_path / "x.jpg")) > 250)

    @pytest.mark.parametrize("name", ["x", "x.txt", "x.png.part"])
    def test_another_suffix_is_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"a picture must end in one of .*\.png.*, got .*x"):
            save_figure(Figure(), tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            save_figure(Figure(), tmp_path / "missing" / "x.png")
