#!/usr/bin/env python
"""Draws detections beside the ground truth, for a few images of the test split.

The predictions are those that mmsoftpool test --out saved. Curves of the loss and the AP: see
MMDetection's tools/analysis_tools/analyze_logs.py.

Example: python tools/draw_run.py configs/demo/demo_retinanet_softpool.py \\
             work_dirs/demo_retinanet_softpool/predictions.pkl
"""

from pathlib import Path

import matplotlib
import mmcv
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.registry import DATASETS, init_default_scope

from mmsoftpool import cli
from mmsoftpool.config import load_config
from mmsoftpool.errors import UserError
from mmsoftpool.files import read_pickle
from mmsoftpool.pictures import save_figure

_COLOURS = matplotlib.colormaps["tab10"].colors


def draw_detections(
    dataset, predictions: list[dict], out, count: int = 6, score_thr: float = 0.4
) -> None:
    """Draws the ground truth (top row) and detections (bottom row) of a few images.

    Args:
        dataset: A detection data set of mmdet.
        predictions: One dict per image, the content of the file that ``mmsoftpool test --out``
            writes.
        out (str | Path): Picture file.
        count: Number of images; those with three or more objects come first. Defaults to 6.
        score_thr: Lowest score of a drawn detection. Defaults to 0.4.

    Raises:
        UserError: If the predictions are something else, or of another data set.
    """
    classes = dataset.metainfo["classes"]
    _check_predictions(predictions, len(classes))
    infos = {info["img_id"]: info for info in map(dataset.get_data_info, range(len(dataset)))}
    unknown = [p["img_id"] for p in predictions if p["img_id"] not in infos]
    if unknown:
        raise UserError(f"predictions must be of the test data set; it has no image {unknown[0]}")
    # The sort is stable: images with three or more objects come first, in their order.
    predictions = sorted(predictions, key=lambda p: -min(3, len(infos[p["img_id"]]["instances"])))
    predictions = predictions[:count]
    figure = Figure((2.4 * len(predictions), 5), layout="constrained")
    grid = figure.subplots(2, len(predictions), squeeze=False)
    for (above, below), prediction in zip(grid.T, predictions, strict=True):
        info, found = infos[prediction["img_id"]], prediction["pred_instances"]
        for axes in (above, below):
            axes.imshow(mmcv.imread(info["img_path"], channel_order="rgb"))
            axes.set(xticks=[], yticks=[])
        for instance in info["instances"]:
            label = instance["bbox_label"]
            _draw_box(above, instance["bbox"], label, classes[label])
        for box, score, label in zip(
            found["bboxes"].tolist(),
            found["scores"].tolist(),
            found["labels"].tolist(),
            strict=True,
        ):
            if score >= score_thr:
                _draw_box(below, box, label, f"{classes[label]} {score:.2f}")
    grid[0, 0].set_ylabel("ground truth")
    grid[1, 0].set_ylabel("detections")
    save_figure(figure, out)


def _check_predictions(predictions, classes: int) -> None:
    keys = ("bboxes", "scores", "labels")
    for number, prediction in enumerate(
        predictions if isinstance(predictions, list) and predictions else [None]
    ):
        found = prediction.get("pred_instances") if isinstance(prediction, dict) else None
        parts = [found.get(key) if isinstance(found, dict) else None for key in keys]
        if (
            not all(isinstance(part, torch.Tensor) for part in parts)
            or "img_id" not in prediction
            or parts[2].dtype is not torch.int64
            or [part.shape for part in parts] != [(len(parts[2]), 4), *[(len(parts[2]),)] * 2]
            or not all(0 <= label < classes for label in parts[2].tolist())
        ):
            raise UserError(
                f"predictions must be a list of dicts with img_id and pred_instances "
                f"({', '.join(keys)}), as mmsoftpool test --out writes; got another entry number "
                f"{number}"
            )


def _draw_box(axes, box, label: int, text: str) -> None:
    """Draws a box (x1, y1, x2, y2) with its text above it, or inside at the image's upper edge."""
    x, y, x2, y2 = box
    colour = _COLOURS[label % len(_COLOURS)]
    axes.add_patch(Rectangle((x, y), x2 - x, y2 - y, fill=False, ec=colour, lw=1.8))
    axes.annotate(
        text,
        (x, y),
        (1, -2 if y < 8 else 2),
        textcoords="offset points",
        va="top" if y < 8 else "bottom",
        color="white",
        fontsize=6.5,
        bbox=dict(facecolor=colour, edgecolor="none", pad=1),
        annotation_clip=False,
        parse_math=False,  # a class name may have dollar signs
    )


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", help="the config file of the run")
    parser.add_argument("predictions", help="the pickle file with the predictions")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the picture to write (default: detections.png beside the predictions)",
    )
    cli.add_cfg_options(parser)
    return parser


def main(args):
    cfg = load_config(args.config, args.cfg_options)
    predictions = read_pickle(args.predictions, "prediction file")
    init_default_scope(cfg.get("default_scope") or "mmdet")
    out = args.out or Path(args.predictions).with_name("detections.png")
    draw_detections(DATASETS.build(cfg.test_dataloader.dataset), predictions, out)
    print(f"drew {out}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
