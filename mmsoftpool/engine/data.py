"""Checks of the data sets of a config, before anything is built."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS

from ..datasets.coco import check_evaluable, read_annotations
from ..files import check_input
from .build import build
from .config import dicts

_COCO_SOURCE = (
    "download COCO 2017 from https://cocodataset.org/#download and unpack annotations/, train2017/ "
    "and val2017/ there"
)


def check_data(cfg: Config, *splits: str) -> None:
    """Checks that the data sets of the given splits exist and fit the config.

    Args:
        cfg: The config. Its ``data_source``, a dict with ``data_root`` and ``advice``, tells in the
            error messages where the data set with this ``data_root`` comes from.
        *splits: Any of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If an annotation file is missing, or an image folder is missing or empty.
        ValueError: If an annotation file is not in COCO's format, the categories in it lack one of
            the data set's classes, or a head of the model has another number of classes.
    """
    files = {}  # the val data set and its evaluator have the same file

    def read(path: Path) -> dict:
        if path not in files:
            files[path] = read_annotations(path, "annotation file")
        return files[path]

    for split in splits:
        for node in dicts(cfg.get(f"{split}_dataloader"), cfg.get(f"{split}_evaluator")):
            # mmpretrain's ImageNet has a folder per split, and needs no annotations.
            folders = [node["split"]] if node.get("split") and not node.get("ann_file") else []
            if not (node.get("ann_file") or folders) or node.get("backend_args"):
                continue  # no data set, or one on a remote file server
            root = node.get("data_root") or ""
            if node.get("ann_file"):
                ann_file = Path(root, node["ann_file"])
                check_input(ann_file, f"{split} annotations", f"; {_advice(cfg, node)}")
                folders = (node.get("data_prefix") or {}).values()
            for prefix in folders:
                folder = Path(root, prefix)
                if not folder.is_dir() or not any(folder.iterdir()):
                    raise FileNotFoundError(
                        f"no {split} images in {folder.absolute()}; {_advice(cfg, node)}"
                    )
            if cfg.get("default_scope") != "mmdet":
                continue
            if _is_coco(node, cfg):
                _check_classes(cfg, node, split, read(ann_file), ann_file)
            elif node.get("type") == "CocoMetric" and not node.get("format_only"):
                check_evaluable(read(ann_file), ann_file, "segm" in node.get("metric", "bbox"))
                if any(a["id"] == 0 for a in read(ann_file)["annotations"]):
                    warnings.warn(
                        f"the annotation with id 0 in {ann_file} counts as not found, which lowers "
                        "AP: number the annotations from 1",
                        stacklevel=2,
                    )


@TRANSFORMS.register_module()
class NamingLoadImageFromFile(LoadImageFromFile):
    """mmcv's transform, whose error names the image that cannot be read."""

    def transform(self, results: dict) -> dict | None:
        try:
            return super().transform(results)
        except Exception as error:
            raise OSError(f"cannot read the image {results['img_path']}: {error}") from error


def _advice(cfg: Config, node: dict) -> str:
    """Where to find a missing data set."""
    options = "set cfg_options data_root=DIR to use another folder"
    source = cfg.get("data_source")
    folder = str(node.get("data_root") or node.get("ann_file"))  # an evaluator has only the file
    if isinstance(source, dict) and folder.startswith(source["data_root"]):
        return f"{source['advice']}, or {options}"
    if re.fullmatch(r"instances_(train|val)2017\.json", Path(node.get("ann_file", "")).name):
        return f"{_COCO_SOURCE}, or {options}"
    return options


def _is_coco(node: dict, cfg: Config) -> bool:
    """Whether a part of a config is a data set of mmdet in COCO's format."""
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS as MMDET_DATASETS

    kind = node.get("type")
    if isinstance(kind, str) and not kind.endswith("Metric"):
        kind = MMDET_DATASETS.get(kind) or build(DATASETS, node, cfg, "data set")  # an unknown one
    return isinstance(kind, type) and issubclass(kind, CocoDataset)


def _check_classes(cfg: Config, node: dict, split: str, data: dict, ann_file: Path) -> None:
    """Checks the classes of a data set against its annotations and the model's heads."""
    dataset = build(DATASETS, {**node, "lazy_init": True}, cfg, f"{split} data set")
    classes = dataset.metainfo["classes"]
    if not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes):
        raise ValueError(
            f"metainfo.classes of the {split} data set of {cfg.filename} must be a tuple of names, "
            f"for one class ('name',), got {classes!r}"
        )
    categories = {category["name"]: category["id"] for category in data["categories"]}
    unknown = [name for name in classes if name not in categories]
    if unknown:
        raise ValueError(
            f"metainfo.classes of the {split} data set of {cfg.filename} must be of the categories "
            f"in {ann_file}, which are {_listed(categories)}; it has not {_listed(unknown)}"
        )
    used = {categories[name] for name in classes}
    if split == "train" and not any(a["category_id"] in used for a in data.get("annotations", [])):
        raise ValueError(f"{ann_file} has no annotation of the classes {_listed(classes)}")
    for name, number in _num_classes(cfg.model):
        if number != len(classes):
            raise ValueError(
                f"{name} of {cfg.filename} must be {len(classes)}, the number of classes of the "
                f"{split} data set ({_listed(classes)}), got {number}"
            )


def _listed(names) -> str:
    return ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")


def _num_classes(node, name: str = "model", head: bool = False) -> Iterator[tuple[str, int]]:
    """Names and values of ``num_classes`` of the box and mask heads in a model's config."""
    if isinstance(node, dict):
        if head and "num_classes" in node:
            yield f"{name}.num_classes", node["num_classes"]
        for key, value in node.items():
            yield from _num_classes(value, f"{name}.{key}", key in ("bbox_head", "mask_head"))
    elif isinstance(node, (list, tuple)):  # the stages of a cascade
        for number, value in enumerate(node):
            yield from _num_classes(value, f"{name}.{number}", head)
