"""Checks of the data sets of a config, before anything is built."""

from pathlib import Path

from mmengine.config import Config

from .config import dicts

_COCO_SOURCE = (
    "download COCO 2017 from https://cocodataset.org/#download and unpack annotations/, train2017/ "
    "and val2017/ there"
)


def check_data(cfg: Config, *splits: str) -> None:
    """Checks that the annotations and images of the given splits exist.

    Args:
        cfg: The config. Its ``data_source``, if there is one, says in the error message where the
            data set comes from; COCO's download page is the default.
        *splits: Any of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If an annotation file is missing, or an image folder is missing or empty.
    """
    for split in splits:
        for node in dicts(cfg.get(f"{split}_dataloader"), cfg.get(f"{split}_evaluator")):
            # mmpretrain's ImageNet has a folder per split, and needs no annotations.
            folders = [node["split"]] if node.get("split") and not node.get("ann_file") else []
            if not (node.get("ann_file") or folders) or node.get("backend_args"):
                continue  # no data set, or one on a remote file server
            root = node.get("data_root") or ""
            source = cfg.get("data_source", _COCO_SOURCE)
            advice = f"{source}, or set cfg_options data_root=DIR to use another folder"
            if node.get("ann_file"):
                ann_file = Path(root, node["ann_file"])
                if not ann_file.is_file():
                    raise FileNotFoundError(
                        f"no {split} annotations at {ann_file.absolute()}; {advice}"
                    )
                folders = (node.get("data_prefix") or {}).values()
            for prefix in folders:
                folder = Path(root, prefix)
                if not folder.is_dir() or not any(folder.iterdir()):
                    raise FileNotFoundError(f"no {split} images in {folder.absolute()}; {advice}")
