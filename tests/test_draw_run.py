"""Pictures of a run, from its logs and predictions, and how every picture is written."""

import json

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from make_shapes import make_shapes
from mmsoftpool.pictures import run, save_figure


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    figures = []
    monkeypatch.setattr(run, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def write_log(folder, *entries):
    folder = folder / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


class TestCurves:
    def test_the_logs_of_a_resumed_run_are_joined(self, drawn, tmp_path):
        write_log(
            tmp_path / "20260101",
            dict(loss=4.0, loss_cls=3.0, step=10),
            dict(loss=3.0, loss_cls=2.0, step=20),
            {"coco/bbox_mAP": 0.1, "coco/bbox_mAP_50": 0.2, "step": 1},
        )
        write_log(
            tmp_path / "20260102",
            dict(loss=2.0, loss_cls=1.0, step=20),  # again, after the interruption
            {"coco/bbox_mAP": 0.125, "step": 2},
        )
        run.plot_curves(tmp_path, tmp_path / "curves.png")
        loss, scores = drawn[0].axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
        assert lines == {"loss": [[10, 4], [20, 2]], "loss_cls": [[10, 3], [20, 1]]}
        (line,) = scores.lines
        assert line.get_label() == "box AP"
        assert line.get_xydata().tolist() == [[1, 0.1], [2, 0.125]]

    def test_the_ap_axis_starts_at_0_and_fits_the_data(self, drawn, tmp_path):
        write_log(tmp_path / "1", dict(loss=1.0, step=1), {"coco/bbox_mAP": 0.2, "step": 1})
        run.plot_curves(tmp_path, tmp_path / "curves.png")
        bottom, top = drawn[0].axes[1].get_ylim()
        assert bottom == 0 and 0.2 < top < 0.25

    @pytest.mark.parametrize(("entry", "unit"), [(dict(epoch=1), "epoch"), ({}, "iteration")])
    def test_the_ap_axis_has_the_unit_of_the_log(self, drawn, tmp_path, entry, unit):
        write_log(
            tmp_path / "1", dict(loss=1.0, step=9, **entry), {"coco/bbox_mAP": 0.2, "step": 9}
        )
        run.plot_curves(tmp_path, tmp_path / "curves.png")
        assert drawn[0].axes[1].get_xlabel() == unit

    def test_a_folder_without_a_log(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no training log .* in {tmp_path}"):
            run.plot_curves(tmp_path, tmp_path / "curves.png")


def test_detections_are_drawn_below_the_ground_truth(drawn, tmp_path):
    make_shapes(tmp_path, train=1, val=1)
    ann_file = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(ann_file.read_text())
    (image,) = content["images"]
    instances = dict(
        bboxes=torch.tensor([[10.0, 20, 40, 60], [1, 2, 3, 4]]),
        scores=torch.tensor([0.9, 0.1]),
        labels=torch.tensor([1, 0]),
    )
    path = str(tmp_path / "val" / image["file_name"])
    predictions = [dict(img_id=image["id"], img_path=path, pred_instances=instances)]
    run.draw_detections(predictions, ann_file, tmp_path / "x.png")
    above, below = drawn[0].axes
    assert len(above.patches) == len(content["annotations"])
    (box,) = below.patches  # the other one has a low score
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((10, 20), 30, 40)
    assert [text.get_text() for text in below.texts] == ["square 0.90"]


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
