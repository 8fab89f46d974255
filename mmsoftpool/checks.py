"""Checks of the data sets that mmdet has built, before the first iteration.

What a data set contains (images, boxes that are used, the names of labels) is asked from the data
set, in any of mmdet's formats; an annotation file is read only to say what the data set left out.
"""

import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import BaseDetDataset, CocoDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import Registry
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from ._openmmlab import coco_api
from .coco import check_evaluable
from .errors import UserError
from .files import read_json

#: Number of images of a data set whose size is compared with its annotations.
SAMPLE = 16
_COCO_SOURCE = (
    "download COCO 2017 from https://cocodataset.org/#download and unpack annotations/, train2017/ "
    "and val2017/ there"
)


class DataCheckHook(Hook):
    """Hook that checks the data sets of a run when they are built; it changes nothing.

    Args:
        *splits (str): Any of ``'train'``, ``'val'`` and ``'test'``.
    """

    priority = "VERY_HIGH"

    def __init__(self, *splits: str):
        self.splits = splits

    def before_run(self, runner: Runner) -> None:
        if not is_main_process():
            return
        for split in self.splits:
            loader = getattr(runner, f"{split}_dataloader")
            metrics = [] if split == "train" else getattr(runner, f"{split}_evaluator").metrics
            check_dataset(split, loader.dataset, metrics, runner.model, log=runner.logger.info)
        if any(getattr(hook, "test_out_dir", None) for hook in runner.hooks):
            _check_picture_names(_leaves(runner.test_dataloader.dataset))

    def before_train(self, runner: Runner) -> None:
        loop, schedulers = runner.train_loop, runner.param_schedulers
        if not (isinstance(loop, EpochBasedTrainLoop) and loop.epoch and schedulers):
            return  # not resumed, or nothing to schedule
        if isinstance(schedulers, dict):  # by optimizer
            schedulers = [scheduler for part in schedulers.values() for scheduler in part]
        ends = [
            scheduler.end / (1 if scheduler.by_epoch else len(runner.train_dataloader))
            for scheduler in schedulers
        ]
        if max(ends) < loop.max_epochs and loop.epoch < loop.max_epochs:
            _warn(
                f"the schedules end after {max(ends):g} of {loop.max_epochs} epochs: the learning "
                "rate keeps its last value from there on, because a resumed run has the schedules "
                "of its checkpoint"
            )


@contextmanager
def explain_annotation_errors(node, registry: Registry) -> Iterator[None]:
    """Names the annotation file if mmdet cannot read it.

    An error of mmdet's own data sets or metrics, built from the config ``node``, becomes a
    UserError; errors of others, and any OSError, are passed on.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, UserError):
        raise
    except Exception as error:
        while isinstance(node, dict) and "dataset" in node:
            node = node["dataset"]
        kind = node.get("type") if isinstance(node, dict) else None
        with registry.switch_scope_and_registry(None) as scoped:
            kind = scoped.get(kind) if isinstance(kind, str) else kind
        if not getattr(kind, "__module__", "").startswith("mmdet."):
            raise
        file = node.get("ann_file")
        if isinstance(file, (list, tuple)):
            raise UserError(
                f"ann_file must be one file, got {file}; a ConcatDataset joins several data sets"
            ) from error
        path = os.path.join(node.get("data_root") or "", file or "")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(Exception):
            if not len(registry.build({**node, "serialize_data": False})):
                # mmengine cannot serialize an empty list.
                reason = f"no image is left after filter_cfg={node.get('filter_cfg')}"
        raise UserError(f"mmdet's {kind.__name__} cannot use {path}: {reason}") from error


def advice(cfg: Config, path: str) -> str:
    """Where a missing file of a data set comes from, by the ``data_source`` of the config."""
    options = "set --cfg-options data_root=DIR to use another folder"
    source = cfg.get("data_source")
    if isinstance(source, dict) and str(path).startswith(source["data_root"]):
        return f"{source['advice']}, or {options}"
    if re.fullmatch(r"instances_(train|val)2017\.json", Path(path).name):
        return f"{_COCO_SOURCE}, or {options}"
    return options


def check_dataset(
    split: str, dataset, metrics: list = (), model: nn.Module | None = None, log=print
) -> None:
    """Checks a data set that mmdet has built. Other libraries' data sets pass unchecked.

    Args:
        split: Its name in the messages, such as ``'train'``.
        dataset: The data set, wrapped or not.
        metrics: The metrics that evaluate it. Defaults to none.
        model: The detector. Defaults to None, heads are not checked.
        log: Takes a line with the numbers of images and boxes. Defaults to ``print``.

    Raises:
        UserError: If labels, boxes, images, masks or the metrics' annotations do not fit.
    """
    leaves = _leaves(dataset)
    boxes, dropped, images = Counter(), Counter(), 0
    for leaf in leaves:
        file = read_json(leaf.ann_file, "annotations") if _is_coco(leaf) else None
        _check_labels(split, leaf, file)
        if split == "train" and file:
            dropped += _dropped(file, leaf.cat2label)
        infos = _infos(leaf)
        images += len(infos)
        _check_images(split, leaf, infos)
        instances = [instance for info in infos for instance in info.get("instances", [])]
        boxes.update(i.get("bbox_label") for i in instances if not i.get("ignore_flag"))
        if split == "train" and any(getattr(t, "with_mask", False) for t in _transforms(dataset)):
            lacking = sum("mask" not in instance for instance in instances)
            if lacking:
                raise UserError(
                    f"{lacking} of the {len(instances)} objects in {leaf.ann_file} have no "
                    "segmentation, and the model is trained with masks"
                )
    if not leaves:
        return
    classes = leaves[0].metainfo["classes"]
    log(f"{split} data: {images} images, {sum(boxes.values())} boxes of {len(classes)} classes")
    if split == "train":
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        if not boxes:
            raise UserError(
                f"no box in {leaves[0].ann_file} is used for training"
                + (f": {reasons}" if reasons else f"; the classes are {_listed(classes)}")
            )
        if dropped:
            _warn(f"{dropped.total()} boxes of the train data are not used: {reasons}")
        empty = [name for label, name in enumerate(classes) if not boxes[label]]
        if empty:
            _warn(
                f"{len(empty)} of the {len(classes)} classes have no box in the train data: "
                f"{_listed(empty)}"
            )
    for metric in metrics:
        _check_metric(split, metric, leaves)
    if model is not None:  # the box and mask heads of a panoptic detector know only the things
        _check_heads(split, model, leaves[0].metainfo.get("thing_classes", classes))


def _inside(dataset) -> Iterator:
    """A data set and those that it wraps, if it is one of mmengine's or mmdet's wrappers."""
    yield dataset
    for part in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if part is not None:
            yield from _inside(part)


def _leaves(dataset) -> list[BaseDetDataset]:
    """mmdet's data sets inside of the wrappers."""
    return [leaf for leaf in _inside(dataset) if isinstance(leaf, BaseDetDataset)]


def _transforms(dataset) -> Iterator:
    """The transforms of a data set and of those that it wraps."""
    for part in _inside(dataset):
        pipeline = getattr(part, "pipeline", None)
        yield from getattr(pipeline, "transforms", pipeline if isinstance(pipeline, list) else [])


def _infos(leaf: BaseDetDataset) -> list[dict]:
    """What a data set knows of each image."""
    return [leaf.get_data_info(index) for index in range(len(leaf))]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _listed(names) -> str:
    return ", ".join(map(str, itertools.islice(names, 10))) + (", ..." if len(names) > 10 else "")


def _is_coco(leaf) -> bool:
    """Whether a data set reads a file in COCO's format by CocoDataset's own rules."""
    own = ("load_data_list", "parse_data_info")
    return (
        isinstance(leaf, CocoDataset)
        and all(getattr(type(leaf), name) is getattr(CocoDataset, name) for name in own)
        and not leaf.backend_args
    )


def _check_labels(split: str, leaf: BaseDetDataset, file: dict | None) -> None:
    """Checks that label i is class i, which mmdet takes for granted; ``file`` is COCO's."""
    classes = leaf.metainfo.get("classes")
    if not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes):
        raise UserError(
            f"metainfo.classes of the {split} data set must be a tuple of names, for one class "
            f"('name',), got {classes!r}"
        )
    if file:
        names = {category["id"]: category["name"] for category in file["categories"]}
        labels = [names[number] for number in leaf.cat_ids]
        _compare_labels(f"{split} data set", leaf.ann_file, labels, classes)


def _compare_labels(owner: str, file: str, labels: list[str], classes) -> None:
    """Compares the names of a file's categories, in mmdet's order of labels, with the classes."""
    if labels == list(classes):
        return
    twice = [name for name, count in Counter(labels).items() if count > 1]
    missing = [name for name in classes if name not in labels]
    if twice:
        reason = f"{file} has more than one category of the name {_listed(twice)}; rename them"
    elif missing:
        reason = f"{file} has no category {_listed(missing)}"
    else:
        reason = f"mmdet numbers the labels in the file's order: set classes={tuple(labels)}"
    raise UserError(f"metainfo.classes of the {owner} must be the categories of {file}: {reason}")


def _check_images(split: str, leaf: BaseDetDataset, infos: list[dict]) -> None:
    """Checks that the images exist and, for a few of them, that they have the annotated size."""
    if not infos:
        raise UserError(
            f"the {split} data set has no images left; {getattr(leaf, 'ann_file', '')} or "
            f"filter_cfg={leaf.filter_cfg} leaves out all of them"
        )
    if leaf.backend_args:
        return  # on a file server
    paths = [info["img_path"] for info in infos]
    folders = set(map(os.path.dirname, paths))
    # A listing of a folder is faster than a look at each file.
    files = {f: set(os.listdir(f)) if os.path.isdir(f) else () for f in folders}
    missing = [p for p in paths if os.path.basename(p) not in files[os.path.dirname(p)]]
    if missing:
        raise FileNotFoundError(
            2, f"{len(missing)} of the {len(infos)} {split} images are missing", missing[0]
        )
    if not any(isinstance(transform, LoadImageFromFile) for transform in _transforms(leaf)):
        return  # files of another kind, such as arrays
    for index in np.linspace(0, len(infos) - 1, min(SAMPLE, len(infos))).astype(int):
        path, size = infos[index]["img_path"], [infos[index].get(k) for k in ("height", "width")]
        try:
            shape = mmcv.imread(path).shape[:2]
        except Exception as error:  # of OpenCV, for an empty file; None for other damaged ones
            raise UserError(f"cannot read the {split} image {path}") from error
        if None not in size and list(shape) != size:
            raise UserError(
                f"the {split} image {path} has height and width {shape}, its annotations say "
                f"{tuple(size)}"
                + ("; is it turned by its EXIF orientation?" if list(shape) == size[::-1] else "")
            )


def _dropped(file: dict, categories) -> Counter:
    """Counts, by reason, the annotations of categories that mmdet's CocoDataset does not use."""
    dropped = Counter()
    sizes = {image["id"]: (image["width"], image["height"]) for image in file["images"]}
    for box in file.get("annotations", []):
        try:
            if box["category_id"] not in categories:
                continue
            (x, y, w, h), (width, height) = box["bbox"], sizes[box["image_id"]]
            inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        except (KeyError, TypeError, ValueError):
            dropped["are not annotations of an image with a bbox and a category"] += 1
            continue
        for reason, applies in (
            ("have ignore set", box.get("ignore")),
            ("have iscrowd=1", box.get("iscrowd")),
            ("are narrower or lower than a pixel", w < 1 or h < 1),
            ("are outside of their image", not inside),
            ("have no area", box.get("area", 1) <= 0),
        ):
            if applies:
                dropped[reason] += 1
                break
    return dropped


def _check_picture_names(leaves: list[BaseDetDataset]) -> None:
    """Warns of images whose pictures mmdet's hook saves under one name."""
    infos = [info for leaf in leaves for info in _infos(leaf)]
    names = Counter(os.path.basename(info["img_path"]) for info in infos)
    lost = names.total() - len(names)
    if lost:
        _warn(
            f"{lost} pictures will be overwritten: they are named after the image's file, and "
            f"{names.most_common(1)[0][0]} and others are in more than one folder"
        )


def _check_metric(split: str, metric, leaves: list[BaseDetDataset]) -> None:
    """Checks that a metric has annotations of the data set's images and classes."""
    coco = coco_api(metric)
    if coco is None or not isinstance(metric, CocoMetric):  # panoptic metrics have another format
        return
    file = getattr(leaves[0], "ann_file", None)
    known = set(coco.getImgIds())
    ids = [info["img_id"] for leaf in leaves for info in _infos(leaf)]
    missing = sum(number not in known for number in ids)
    if missing:
        raise UserError(
            f"{split}_evaluator.ann_file lacks images of the {split} data set ({file}): "
            f"{missing} of {len(ids)} are missing in it"
        )
    classes = leaves[0].metainfo["classes"]
    names = [coco.cats[number]["name"] for number in coco.get_cat_ids(cat_names=classes)]
    _compare_labels(f"{split} data set", f"{split}_evaluator.ann_file", names, classes)
    if metric.format_only:
        return
    masks = "segm" in metric.metrics
    check_evaluable(coco.dataset, f"{split}_evaluator.ann_file", masks)
    if 0 in coco.anns:
        _warn(
            f"the annotation with id 0 in {split}_evaluator.ann_file counts as not found, which "
            "lowers AP: number the annotations from 1"
        )


def _check_heads(split: str, model: nn.Module, classes) -> None:
    """Checks that the box and mask heads have as many classes as the data set."""
    for name, module in model.named_modules():
        number = getattr(module, "num_classes", None)
        head = re.search(r"(bbox|mask)_head(\.\d+)?$", name)
        if head and isinstance(number, int) and number != len(classes):
            raise UserError(
                f"model.{name.removeprefix('module.')}.num_classes must be {len(classes)}, the "
                f"number of classes of the {split} data set ({_listed(classes)}), got {number}"
            )
