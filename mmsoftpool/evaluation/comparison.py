"""Two detectors compared: the metrics of COCO, their differences, and how sure these are."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.progress import track

#: The columns of Table 8 of the paper, in the order of pycocotools' summary.
METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL")


class DetectionScores:
    """The COCO metrics of one result file, for any choice of the images.

    Detections are matched with the ground truth once, by pycocotools. What is left for each choice
    of images is to count: an image drawn n times is counted n times, as if it were there n times.

    Args:
        ground_truth (COCO): The annotations.
        result_file (str | Path): Detections in COCO's result format.
        iou_type (str): ``'bbox'`` or ``'segm'``. Defaults to ``'bbox'``.

    Raises:
        ValueError: If the file is not a result file for these annotations.
    """

    def __init__(self, ground_truth: COCO, result_file, iou_type: str = "bbox"):
        detections = _load_results(ground_truth, result_file, iou_type)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
            evaluation = COCOeval(ground_truth, detections, iou_type)
            evaluation.evaluate()
        params = evaluation.params
        self.num_images = len(params.imgIds)
        self._recall_thresholds = params.recThrs
        areas, images = len(params.areaRng), self.num_images
        #: by area, then by category; areas are all, small, medium, large
        self._cells = [[] for _ in range(areas)]
        for start in range(0, len(evaluation.evalImgs), images):
            cell = _join(evaluation.evalImgs[start : start + images])
            self._cells[start // images % areas].append(cell)

    def __call__(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Computes the metrics.

        Args:
            weights (np.ndarray | None): (images,) how often each image is there, in the order of
                their ids. Defaults to None, once each.

        Returns:
            np.ndarray: (6,) the :data:`METRICS`, from 0 to 1; NaN where no object has the size.
        """
        if weights is None:
            weights = np.ones(self.num_images, np.int64)
        by_area = []
        for cells in self._cells:
            precision = [self._precision(*cell, weights) for cell in cells]
            precision = [p for p in precision if p is not None]
            # (categories, IoU thresholds)
            by_area.append(np.array(precision) if precision else np.full((1, 10), np.nan))
        every, *sizes = by_area
        return np.array(
            [every.mean(), every[:, 0].mean(), every[:, 5].mean(), *(s.mean() for s in sizes)]
        )

    def _precision(self, objects, image, true, false, weights):
        """(thresholds,) average precision of a category, or None where it has no object."""
        total = weights @ objects
        if total == 0:
            return None
        if not len(image):
            return np.zeros(len(true))
        times = weights[image]
        true = np.cumsum(true * times, axis=1)
        false = np.cumsum(false * times, axis=1)
        # As in pycocotools: precision at a recall is the best at this recall or a higher one.
        precision = true / np.maximum(true + false, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # a recall that is not reached
        return np.array(
            [
                p[np.searchsorted(recall, self._recall_thresholds, side="left")].mean()
                for p, recall in zip(precision, true / total, strict=True)
            ]
        )


def _join(per_image: list):
    """One category and size over all images, its detections by falling score.

    Returns:
        tuple: (images,) objects that count, (detections,) image index, (thresholds, detections)
        whether it is a true positive, and whether it is a false one.
    """
    objects = np.zeros(len(per_image), np.int64)
    image, scores, matched, ignored = [], [], [], []
    for i, entry in enumerate(per_image):
        if entry is None:
            continue
        objects[i] = np.count_nonzero(entry["gtIgnore"] == 0)
        image.append(np.full(len(entry["dtScores"]), i))
        scores.append(entry["dtScores"])
        matched.append(entry["dtMatches"] != 0)
        ignored.append(entry["dtIgnore"] != 0)
    if not image:
        return objects, np.zeros(0, np.int64), *np.zeros((2, 10, 0), bool)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    image = np.concatenate(image)[order]
    ignored = np.concatenate(ignored, axis=1)[:, order]
    matched = np.concatenate(matched, axis=1)[:, order]
    true, false = matched & ~ignored, ~matched & ~ignored
    # What comes after the last true positive changes nothing.
    end = np.flatnonzero(true.any(axis=0)).max(initial=-1) + 1
    return objects, image[:end], true[:, :end], false[:, :end]


def _load_annotations(ann_file) -> COCO:
    path = Path(ann_file)
    if not path.is_file():
        raise ValueError(f"no annotation file at {path.absolute()}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth = COCO(str(path))
    except (json.JSONDecodeError, AssertionError) as error:
        raise ValueError(f"{path} is not in COCO's annotation format: {error}") from error
    if not ground_truth.anns:
        raise ValueError(f"{path} has no annotations; detections are compared with ground truth")
    return ground_truth


def _load_results(ground_truth: COCO, result_file, iou_type: str) -> COCO:
    path = Path(result_file)
    if not path.is_file():
        raise ValueError(f"no result file at {path.absolute()}")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or is cut off: {error}") from error
    key = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
    if not isinstance(results, list) or not all(
        isinstance(r, dict) and {"image_id", "category_id", "score", key} <= r.keys()
        for r in results
    ):
        raise ValueError(
            f"{path} is not a list of detections with image_id, category_id, score and {key}, as "
            "CocoMetric writes with outfile_prefix"
        )
    foreign = {r["image_id"] for r in results} - ground_truth.imgs.keys()
    if foreign:
        raise ValueError(
            f"{path} has detections in {len(foreign)} images that the annotations do not have, "
            f"for example image_id {min(foreign)}"
        )
    if iou_type == "segm":  # with a box, pycocotools would take its area for the mask's
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    if not results:  # pycocotools cannot load an empty list
        empty = COCO()
        empty.dataset = {**ground_truth.dataset, "annotations": []}
        empty.createIndex()
        return empty
    with contextlib.redirect_stdout(io.StringIO()):
        return ground_truth.loadRes(results)


@dataclass
class Comparison:
    """What :func:`compare_detections` found; all metrics in percent, as in Table 8.

    Attributes:
        names: Of the two models.
        scores: (runs, 6) :data:`METRICS` of every run, for each model.
        interval: (2, 6) lower and upper end of the confidence interval of the difference.
        confidence: Of the interval, such as 0.95.
        resamples: Number of bootstrap samples.
        images: Number of images.
    """

    names: tuple[str, str]
    scores: tuple[np.ndarray, np.ndarray]
    interval: np.ndarray
    confidence: float
    resamples: int
    images: int

    @property
    def difference(self) -> np.ndarray:
        """(6,) second model minus first, means over the runs."""
        return self.scores[1].mean(0) - self.scores[0].mean(0)

    def markdown(self) -> str:
        """The table, aligned, so that it reads well on a screen too."""

        def cell(value, sign=""):
            return "n/a" if np.isnan(value) else f"{value:{sign}.1f}"

        rows = [["", *METRICS], []]
        for name, scores in zip(self.names, self.scores, strict=True):
            rows.append([name, *map(cell, scores.mean(0))])
        rows.append(["difference", *(cell(d, "+") for d in self.difference)])
        interval = [
            "n/a" if np.isnan(low) else f"{low:+.1f} to {high:+.1f}"
            for low, high in self.interval.T
        ]
        rows.append([f"{self.confidence:.0%} interval", *interval])
        widths = [max(len(row[i]) for row in rows if row) for i in range(len(METRICS) + 1)]
        rows[1] = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
        lines = [
            "| "
            + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            + " |"
            for row in rows
        ]
        runs = [len(scores) for scores in self.scores]
        drawn = "images" if max(runs) == 1 else "images and runs"
        lines += [
            "",
            f"{self.images} images; {runs[0]} and {runs[1]} runs, of which the means are shown. "
            f"Intervals: {self.resamples} paired bootstrap samples of {drawn}.",
        ]
        if max(runs) > 1:
            for name, scores in zip(self.names, self.scores, strict=True):
                each = ", ".join(f"{score:.1f}" for score in scores[:, 0])
                lines.append(f"AP of the runs of {name}: {each}.")
        return "\n".join(lines) + "\n"

    def plot(self, out) -> None:
        """Draws the differences with their intervals into the picture file ``out``."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(5.2, 3), layout="constrained")
        rows = np.arange(len(METRICS))[::-1]
        axes.axvline(0, color="0.6", lw=1)
        axes.hlines(rows, *self.interval, color="C0", lw=2)
        axes.plot(self.difference, rows, "o", color="C0")
        axes.set(
            yticks=rows,
            yticklabels=METRICS,
            ylim=(-0.6, len(METRICS) - 0.4),
            xlabel=f"{self.names[1]} minus {self.names[0]}, points",
            title=f"Differences with {self.confidence:.0%} intervals",
        )
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out, dpi=150)
        plt.close(figure)


def compare_detections(
    ann_file,
    first: list,
    second: list,
    *,
    names: tuple[str, str] = ("A", "B"),
    iou_type: str = "bbox",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares the detections of two models on the same images, by COCO's metrics.

    The confidence intervals are percentiles of a paired bootstrap: every sample draws as many
    images as there are, with replacement, the same ones for both models. Where there are several
    runs (seeds) of the models, it draws among these too, in pairs if both have equally many.

    Args:
        ann_file (str | Path): The annotations, in COCO's format.
        first: Result files of the first model's runs, in COCO's result format.
        second: Result files of the second model's runs; the i-th is paired with the i-th of
            ``first`` (same seed) if there are equally many.
        names: What to call the models. Defaults to ``('A', 'B')``.
        iou_type: ``'bbox'`` or ``'segm'``. Defaults to ``'bbox'``.
        resamples: Number of bootstrap samples, at least 1. Defaults to 1000.
        confidence: Of the intervals, between 0 and 1. Defaults to 0.95.
        seed: Of the bootstrap. Defaults to 0.

    Raises:
        ValueError: If a file does not fit, or a number is out of its range.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if not first or not second:
        raise ValueError("both models need at least one result file")
    ground_truth = _load_annotations(ann_file)
    models = [
        [
            DetectionScores(ground_truth, path, iou_type)
            for path in track(files, description=f"matching {name}")
        ]
        for name, files in zip(names, (first, second), strict=True)
    ]
    images = models[0][0].num_images
    rng = np.random.default_rng(seed)
    differences = np.empty((resamples, len(METRICS)))
    for sample in track(differences, description="bootstrap"):
        weights = rng.multinomial(images, np.full(images, 1 / images))
        runs = rng.integers(len(first), size=len(first))
        paired = len(first) == len(second)
        other_runs = runs if paired else rng.integers(len(second), size=len(second))
        means = []
        for model, drawn in zip(models, (runs, other_runs), strict=True):
            times = np.bincount(drawn, minlength=len(model))
            scores = [n * run(weights) for run, n in zip(model, times, strict=True) if n]
            means.append(np.sum(scores, axis=0) / len(model))
        sample[:] = means[1] - means[0]
    tail = 50 * (1 - confidence)
    interval = np.full((2, len(METRICS)), np.nan)
    known = ~np.isnan(differences).all(axis=0)
    interval[:, known] = np.nanpercentile(100 * differences[:, known], [tail, 100 - tail], axis=0)
    return Comparison(
        names=names,
        scores=tuple(100 * np.array([run() for run in model]) for model in models),
        interval=interval,
        confidence=confidence,
        resamples=resamples,
        images=images,
    )
