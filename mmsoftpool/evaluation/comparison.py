"""Comparison of detectors: COCO's metrics, their differences and confidence intervals."""

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.progress import track

from ..coco import (
    RLE,
    check_entries,
    check_evaluable,
    is_box,
    is_number,
    is_one_of,
    is_rle,
    read_annotations,
)
from ..errors import UserError
from ..files import read_json
from ..pictures import colours, save_figure

#: The columns of Table 8 of the paper, in the order of pycocotools' summary.
METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL")


class DetectionScores:
    """COCO's metrics of one result file, for any selection of the images.

    pycocotools matches the detections with the ground truth once. For each selection of images
    only counting is left: an image that is drawn n times counts n times.

    Args:
        ground_truth (COCO): The annotations.
        result_file (str | Path): Detections in COCO's result format.
        iou_type (str): ``'bbox'`` or ``'segm'``. Defaults to ``'bbox'``.
        classes (Sequence[str] | None): Names of the categories to evaluate. Defaults to None, all.

    Raises:
        FileNotFoundError: If there is no such result file.
        UserError: If it is not a result file for these annotations.
    """

    def __init__(self, ground_truth: COCO, result_file, iou_type: str = "bbox", classes=None):
        detections = _load_results(ground_truth, result_file, iou_type)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
            evaluation = COCOeval(ground_truth, detections, iou_type)
            if classes is not None:
                evaluation.params.catIds = ground_truth.getCatIds(catNms=classes)
            evaluation.evaluate()
        params = evaluation.params
        self.num_images = len(params.imgIds)
        self._recall_thresholds = params.recThrs
        areas, images = len(params.areaRng), self.num_images
        #: by area (all, small, medium, large), then by category
        self._cells = [[] for _ in range(areas)]
        for start in range(0, len(evaluation.evalImgs), images):
            cell = _join(evaluation.evalImgs[start : start + images])
            self._cells[start // images % areas].append(cell)

    def __call__(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Computes the metrics.

        Args:
            weights (np.ndarray | None): (images,) how often each image counts, in the order of the
                image ids. Defaults to None, once each.

        Returns:
            np.ndarray: (6,) the :data:`METRICS`, from 0 to 1; NaN where no object has this size.
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
        """Computes the average precision of a category, (thresholds,); None if it has no object."""
        total = weights @ objects
        if total == 0:
            return None
        times = weights[image]
        true = np.cumsum(true * times, axis=1)
        false = np.cumsum(false * times, axis=1)
        # As in pycocotools: the precision at a recall is the highest at this or a larger recall.
        precision = true / np.maximum(true + false, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # for a recall that is not reached
        return np.array(
            [
                p[np.searchsorted(recall, self._recall_thresholds, side="left")].mean()
                for p, recall in zip(precision, true / total, strict=True)
            ]
        )


def _join(per_image: list):
    """Joins the matches of all images, for one category and size, in order of falling score.

    Returns:
        tuple: (images,) number of objects; (detections,) index of the image; (thresholds,
        detections) whether it is a true positive; the same for false positives.
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
    # Detections after the last true positive do not change the precision.
    end = np.flatnonzero(true.any(axis=0)).max(initial=-1) + 1
    return objects, image[:end], true[:, :end], false[:, :end]


def _index(data: dict) -> COCO:
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        coco.createIndex()
    return coco


def _load_results(ground_truth: COCO, result_file, iou_type: str) -> COCO:
    results = read_json(result_file, "result file")
    if not isinstance(results, list):
        raise UserError(
            f"{result_file} must be a list of detections, as CocoMetric writes with "
            f"outfile_prefix, got a {type(results).__name__}"
        )
    key = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
    is_image, is_category = is_one_of(ground_truth.imgs), is_one_of(ground_truth.cats)
    rules = {
        "image_id in the annotations": lambda r: is_image(r["image_id"]),
        "category_id in the annotations": lambda r: is_category(r["category_id"]),
        "score, a finite number": lambda r: is_number(r["score"]),
        "bbox of x, y, width, height": lambda r: is_box(r["bbox"]),
    }
    if iou_type == "segm":
        del rules["bbox of x, y, width, height"]
        rules |= {RLE: lambda r: is_rle(r["segmentation"], ground_truth.imgs[r["image_id"]])}
    check_entries(f"{result_file} is not a result file for these annotations", results, rules)
    if not results:  # pycocotools cannot load an empty list
        return _index({**ground_truth.dataset, "annotations": []})
    # Without the box, whose area pycocotools would use for the mask; without all that it ignores.
    results = [{k: r[k] for k in ("image_id", "category_id", "score", key)} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        return ground_truth.loadRes(results)


@dataclass
class Comparison:
    """Result of :func:`compare_detections`; all metrics in percent, as in Table 8 of the paper.

    Attributes:
        names: Names of the models; the first one is the baseline.
        scores: For each model, (runs, 6) the :data:`METRICS` of its runs.
        intervals: (models - 1, 2, 6) lower and upper ends of the confidence intervals of the
            differences.
        confidence: Confidence of the intervals, such as 0.95.
        resamples: Number of bootstrap samples.
        images: Number of images.
    """

    names: tuple[str, ...]
    scores: tuple[np.ndarray, ...]
    intervals: np.ndarray
    confidence: float
    resamples: int
    images: int

    @property
    def differences(self) -> np.ndarray:
        """(models - 1, 6) every later model minus the first, means over the runs."""
        means = np.array([scores.mean(0) for scores in self.scores])
        return means[1:] - means[0]

    def markdown(self) -> str:
        """Formats the table as Markdown, with aligned columns for reading it as text."""

        def cell(value, sign=""):
            return "n/a" if np.isnan(value) else f"{value:{sign}.1f}"

        rows = [["", *METRICS]]
        for name, scores in zip(self.names, self.scores, strict=True):
            rows.append([name, *map(cell, scores.mean(0))])
        for name, difference, interval in zip(
            self.names[1:], self.differences, self.intervals, strict=True
        ):
            prefix = f"{name}: " if len(self.names) > 2 else ""
            rows.append([f"{prefix}difference", *(cell(d, "+") for d in difference)])
            ends = [
                "n/a" if np.isnan(low) else f"{low:+.1f} to {high:+.1f}" for low, high in interval.T
            ]
            rows.append([f"{prefix}{100 * self.confidence:g}% interval", *ends])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        lines = []
        for name, *cells in rows:
            aligned = [name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
            lines.append(f"| {' | '.join(aligned)} |")
        return "\n".join([*lines, "", *self._notes()]) + "\n"

    def _notes(self) -> list[str]:
        """Lines below the table: number of images and runs, coverage of the intervals."""
        runs = dict(zip(self.names, map(len, self.scores), strict=True))
        if len(set(runs.values())) == 1:
            (count,) = set(runs.values())
            means = f"{count} {'run' if count == 1 else 'runs'} of each model"
        else:
            means = "runs: " + ", ".join(f"{count} of {name}" for name, count in runs.items())
        drawn = "images" if max(runs.values()) == 1 else "images and runs"
        notes = [
            f"{self.images} images; {means}. Differences are to {self.names[0]}. Intervals: "
            f"{self.resamples} paired bootstrap samples of {drawn}."
        ]
        single = [name for name, count in runs.items() if count == 1]
        if single:
            notes.append(
                f"With one run of {'each model' if len(single) == len(runs) else ', '.join(single)}"
                ", the intervals leave out the spread between runs (seeds)."
            )
        for name, scores in zip(self.names, self.scores, strict=True):
            if len(scores) > 1:
                each = ", ".join(f"{score:.1f}" for score in scores[:, 0])
                notes.append(f"AP of the runs of {name}: {each}.")
        return notes

    def plot(self, out) -> None:
        """Draws the differences with their intervals into the picture file ``out``."""
        others = self.names[1:]
        figure = Figure(figsize=(5.2, 2.4 + 0.6 * len(others)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="0.6", lw=1)
        rows = np.arange(len(METRICS))[::-1]
        offsets = np.linspace(0.22, -0.22, len(others)) if len(others) > 1 else [0.0]
        for i, name in enumerate(others):
            y, color = rows + offsets[i], colours(self.names)[name]
            axes.hlines(y, *self.intervals[i], color=color, lw=2)
            axes.plot(self.differences[i], y, "o", color=color, ms=5, label=name)
        if len(others) > 1:
            figure.legend(loc="outside lower center", frameon=False)
        axes.set(
            yticks=rows,
            yticklabels=METRICS,
            ylim=(-0.6, len(METRICS) - 0.4),
            xlabel=f"{others[0] if len(others) == 1 else 'model'} minus {self.names[0]}, points",
            title=f"Differences with {100 * self.confidence:g}% intervals",
        )
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        save_figure(figure, out)


def compare_detections(
    ann_file,
    results: dict[str, list],
    *,
    classes=None,
    iou_type: str = "bbox",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares the detections of two or more models on the same images, by COCO's metrics.

    Every later model is compared with the first. The confidence intervals are percentiles of a
    paired bootstrap: every sample draws as many images as there are, with replacement, the same
    ones for all models. Where a model has several runs (seeds), the sample draws among these too;
    a model with as many runs as the first is drawn in pairs with it.

    Args:
        ann_file (str | Path): The annotations, in COCO's format.
        results: The result files of each model's runs, in COCO's result format, by the name of the
            model. The i-th file of a model is paired with the i-th of the first (same seed) if they
            have equally many.
        classes (Sequence[str] | None): Names of the categories to evaluate, those that the models
            know. Defaults to None, all categories in ``ann_file``.
        iou_type: ``'bbox'`` or ``'segm'``. Defaults to ``'bbox'``.
        resamples: Number of bootstrap samples, at least 1. Defaults to 1000.
        confidence: Confidence of the intervals, between 0 and 1. Defaults to 0.95.
        seed: Seed of the bootstrap. Defaults to 0.

    Raises:
        FileNotFoundError: If a file is missing.
        UserError: If a file is not in COCO's format or does not fit the annotations, or an
            argument is out of its range.
    """
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, got {confidence}")
    if len(results) < 2:
        raise UserError(f"results must have at least two models, got {list(results)}")
    empty = [name for name, files in results.items() if not files]
    if empty:
        raise UserError(f"results must have at least one file for each model, got none for {empty}")
    data = read_annotations(ann_file, "annotation file")
    check_evaluable(data, ann_file, masks=iou_type == "segm")
    # pycocotools takes an object of id 0 for one that no detection matches.
    for number, annotation in enumerate(data["annotations"], 1):
        annotation["id"] = number
    ground_truth = _index(data)
    names = {category["name"] for category in ground_truth.cats.values()}
    unknown = [name for name in classes or () if name not in names]
    if unknown:
        raise UserError(
            f"classes must be categories in {ann_file}, which are {', '.join(sorted(names))}; got "
            f"{', '.join(unknown)}"
        )
    models = [
        [
            DetectionScores(ground_truth, path, iou_type, classes)
            for path in track(files, description=f"matching {name}")
        ]
        for name, files in results.items()
    ]
    images, first = models[0][0].num_images, len(models[0])
    rng = np.random.default_rng(seed)
    samples = np.empty((resamples, len(models) - 1, len(METRICS)))
    for sample in track(samples, description="bootstrap"):
        weights = rng.multinomial(images, np.full(images, 1 / images))
        runs = rng.integers(first, size=first)
        means = []
        for model in models:
            count = len(model)
            drawn = runs if count == first else rng.integers(count, size=count)
            times = np.bincount(drawn, minlength=count)
            scores = [n * run(weights) for run, n in zip(model, times, strict=True) if n]
            means.append(np.sum(scores, axis=0) / count)
        sample[:] = np.array(means[1:]) - means[0]
    tail = 50 * (1 - confidence)
    intervals = np.full((len(models) - 1, 2, len(METRICS)), np.nan)
    known = ~np.isnan(samples).all(axis=0)
    intervals.swapaxes(1, 2)[known] = np.nanpercentile(
        100 * samples[:, known], [tail, 100 - tail], axis=0
    ).T
    return Comparison(
        names=tuple(results),
        scores=tuple(100 * np.array([run() for run in model]) for model in models),
        intervals=intervals,
        confidence=confidence,
        resamples=resamples,
        images=images,
    )
