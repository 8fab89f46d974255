"""Reading of configs: options that override settings, the data root, the metrics."""

import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config


def load_config(
    path: str,
    cfg_options: dict | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Reads a config and overrides settings of it.

    Args:
        path: The config file.
        cfg_options: Settings that override the config's. ``data_root`` replaces the config's
            ``data_root`` wherever it occurs: in train, val and test data sets and evaluators.
            Defaults to None.
        work_dir: The folder for logs and results. Defaults to ``work_dir`` of the config, else to
            ``work_dirs/`` and the config's name.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``. Defaults to ``'none'``.

    Raises:
        FileNotFoundError: If there is no such config file.
        ValueError: If the config needs mmpretrain and it is not installed, or ``cfg_options`` has a
            ``data_root`` and the config has none to replace.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no config file at {Path(path).absolute()}; the configs of this project are in "
            "configs/, and 'mim download mmdet --config NAME' downloads one of mmdet's"
        )
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:
        if "mmpretrain" not in str(error):
            raise
        raise ValueError(f"{path} needs mmpretrain: pip install 'mmsoftpool[pretrain]'") from error
    options = dict(cfg_options or {})
    if "data_root" in options:
        if "data_root" not in cfg:
            raise ValueError(
                f"cfg_options sets data_root={options['data_root']}, but {path} has no data_root "
                "to replace"
            )
        _move_data_root(cfg._cfg_dict, cfg.data_root, str(options.pop("data_root")))
    cfg.merge_from_dict(options)
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(path).stem))
    return cfg


def _move_data_root(node, old: str, new: str) -> None:
    """Replaces the folder ``old`` by ``new`` in every string of a config, in place."""
    folder = old.rstrip("/")
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            _move_data_root(value, old, new)
        elif isinstance(value, str) and (value == folder or value.startswith(folder + "/")):
            node[key] = os.path.join(new, value[len(folder) + 1 :])


def coco_metrics(cfg: Config) -> list[str]:
    """Metrics of a config's ``test_evaluator``: ``'bbox'``, ``'segm'`` or both.

    Raises:
        ValueError: If ``test_evaluator`` is not one CocoMetric with these metrics.
    """
    evaluator = cfg.get("test_evaluator")
    if not isinstance(evaluator, dict) or evaluator.get("type") != "CocoMetric":
        raise ValueError(
            f"{cfg.filename} must have one test_evaluator, a CocoMetric, got {evaluator}"
        )
    metrics = evaluator.get("metric", "bbox")
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    if not set(metrics) <= {"bbox", "segm"}:
        raise ValueError(
            f"test_evaluator.metric of {cfg.filename} must be bbox or segm, got {metrics}"
        )
    return metrics


def dicts(*nodes) -> Iterator[dict]:
    """All dicts in nested dicts and lists."""
    for node in nodes:
        if isinstance(node, dict):
            yield node
            yield from dicts(*node.values())
        elif isinstance(node, (list, tuple)):
            yield from dicts(*node)
