"""Pictures of a run: its loss and AP curves, its detections beside the ground truth."""

import contextlib
import io
from pathlib import Path

import cv2
import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO

from ..datasets.coco import read_annotations
from ..files import is_number, parse_json, read_text
from . import save_figure

_INSTANCES = ("bboxes", "scores", "labels")
_COLOURS = matplotlib.colormaps["tab10"].colors


def plot_curves(work_dir, out) -> None:
    """Draws a run's training loss by iteration, and its validation AP by epoch, or by iteration
    where the log counts no epochs.

    Args:
        work_dir (str | Path): Work directory of the run; the logs of a resumed run are joined.
        out (str | Path): Picture file.

    Raises:
        FileNotFoundError: If no log there has a training loss.
    """
    losses, scores = {}, {}
    for log in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        lines = read_text(log, "training log").split("\n")
        for number, line in enumerate(lines[:-1], 1):  # the last one is empty, or cut by a kill
            entry = parse_json(line, f"line {number} of {log}")
            if not isinstance(entry, dict) or not is_number(entry.get("step", 0)):
                raise ValueError(f"line {number} of {log} must be a dict with a step, got {line}")
            entry = {k: v for k, v in entry.items() if is_number(v) or v != v}  # a loss may be NaN
            if "step" not in entry:
                continue  # a test
            if "loss" in entry:
                losses[entry["step"]] = entry
            else:  # a validation; `step` is its epoch, or its iteration
                for key, value in entry.items():
                    if key.endswith("_mAP"):
                        scores.setdefault(key.split("/")[-1], {})[entry["step"]] = value
    if not losses:
        raise FileNotFoundError(f"no training log (*/vis_data/scalars.json) in {work_dir}")

    figure = Figure((9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = sorted(losses)
    for key in [k for k in losses[steps[-1]] if k.startswith("loss")]:
        left.plot(steps, [losses[s].get(key) for s in steps], label=key, lw=1.5)
    left.set(xlabel="iteration", ylabel="training loss", yscale="log")
    for key, values in scores.items():
        steps = sorted(values)
        label = {"bbox_mAP": "box AP", "segm_mAP": "mask AP"}.get(key, key)
        right.plot(steps, [values[s] for s in steps], "o-", ms=3, label=label)
    by_epoch = any("epoch" in entry for entry in losses.values())
    right.set(xlabel="epoch" if by_epoch else "iteration", ylabel="AP@[.50:.95], val")
    right.set_ylim(bottom=0)  # the top fits the data
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    save_figure(figure, out)


def draw_detections(
    predictions: list[dict], ann_file, out, count: int = 6, score_thr: float = 0.4
) -> None:
    """Draws the ground truth (top row) and detections (bottom row) of a few images.

    Args:
        predictions: One dict per image, the content of the file that ``tools/test.py --out``
            writes.
        ann_file (str | Path): The images' COCO annotations.
        out (str | Path): Picture file.
        count: Number of images; those with three or more objects come first. Defaults to 6.
        score_thr: Lowest score of a drawn detection. Defaults to 0.4.

    Raises:
        OSError: If the annotations or an image cannot be read.
        ValueError: If the predictions are something else, or of other images or classes.
    """
    coco = COCO()
    coco.dataset = read_annotations(ann_file, "annotation file")
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    names = [category["name"] for category in coco.loadCats(coco.getCatIds())]
    _check_predictions(predictions, len(names))
    index = {category: i for i, category in enumerate(coco.getCatIds())}
    # The sort is stable: images with three or more objects come first, in their order.
    predictions = sorted(
        predictions, key=lambda p: -min(3, len(coco.getAnnIds(imgIds=p["img_id"])))
    )[:count]
    figure = Figure((2.4 * len(predictions), 5), layout="constrained")
    grid = figure.subplots(2, len(predictions), squeeze=False)
    for (above, below), prediction in zip(grid.T, predictions, strict=True):
        image = cv2.imread(prediction["img_path"])
        if image is None:
            raise OSError(f"cannot read the image {prediction['img_path']}")
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        for axes in (above, below):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=prediction["img_id"])):
            label = index[annotation["category_id"]]
            _draw_box(above, annotation["bbox"], label, names[label])
        found = prediction["pred_instances"]
        for box, score, label in zip(
            found["bboxes"], found["scores"], found["labels"], strict=True
        ):
            if score >= score_thr:
                x1, y1, x2, y2 = box.tolist()
                text = f"{names[label]} {score:.2f}"
                _draw_box(below, (x1, y1, x2 - x1, y2 - y1), int(label), text)
    grid[0, 0].set_ylabel("ground truth")
    grid[1, 0].set_ylabel("detections")
    save_figure(figure, out)


def _check_predictions(predictions, classes: int) -> None:
    for number, prediction in enumerate(
        predictions if isinstance(predictions, list) and predictions else [None]
    ):
        found = prediction.get("pred_instances") if isinstance(prediction, dict) else None
        parts = [found.get(k) if isinstance(found, dict) else None for k in _INSTANCES]
        if (
            not isinstance(found, dict)
            or not isinstance(prediction.get("img_path"), str)
            or type(prediction.get("img_id")) is not int
            or not all(isinstance(part, torch.Tensor) for part in parts)
            or parts[2].dtype is not torch.int64
            or parts[2].ndim != 1
            or [part.shape for part in parts[:2]] != [(len(parts[2]), 4), (len(parts[2]),)]
            or not all(0 <= label < classes for label in parts[2].tolist())
        ):
            raise ValueError(
                "predictions must be a list of dicts with img_path, img_id and pred_instances "
                f"({', '.join(_INSTANCES)}), as tools/test.py --out writes; got another entry "
                f"number {number}"
            )


def _draw_box(axes, box, label: int, text: str) -> None:
    x, y, width, height = box
    colour = _COLOURS[label % len(_COLOURS)]
    axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour, lw=1.8))
    style = dict(facecolor=colour, edgecolor="none", pad=1)
    axes.annotate(
        text,
        (x, y),
        (1, -2 if y < 8 else 2),  # above the box, or inside it at the upper edge of the image
        textcoords="offset points",
        va="top" if y < 8 else "bottom",
        color="white",
        fontsize=6.5,
        bbox=style,
        annotation_clip=False,
    )
