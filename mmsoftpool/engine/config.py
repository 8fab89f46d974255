"""Reading of configs: options that override settings, the data root, the metrics."""

import argparse
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, DictAction

from ..files import check_input


def load_config(
    path: str,
    cfg_options: dict | list[str] | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Reads a config and overrides settings of it.

    Args:
        path: The config file.
        cfg_options: Settings that override the config's, as a dict or as strings ``key=value``.
            ``data_root`` replaces the config's ``data_root`` wherever it occurs: in train, val and
            test data sets and evaluators. Defaults to None.
        work_dir: The folder for logs and results. Defaults to ``work_dir`` of the config, else to
            ``work_dirs/`` and the config's name.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``. Defaults to ``'none'``.

    Raises:
        FileNotFoundError: If there is no such config file.
        ValueError: If the config cannot be read, has no ``model`` or needs mmpretrain and it is not
            installed; if ``cfg_options`` do not fit it, or have a ``data_root`` and the config has
            none to replace.
    """
    check_input(
        path,
        "config file",
        "; the configs of this project are in configs/, and 'mim download mmdet --config NAME' "
        "downloads one of mmdet's",
    )
    cfg = _read(path)
    if not isinstance(cfg.get("model"), dict):
        raise ValueError(f"{path} must have a model, a dict, got {cfg.get('model')!r}")
    options = parse_options(cfg_options) if isinstance(cfg_options, list) else cfg_options
    options = dict(options or {})
    if "data_root" in options:
        old, new = cfg.get("data_root"), str(options.pop("data_root"))
        if not new:
            raise ValueError("data_root in cfg_options must be a folder, got ''")
        if not (isinstance(old, str) and old.rstrip("/")):
            raise ValueError(
                f"cfg_options sets data_root={new}, but {path} has no data_root to replace"
            )
        _move_data_root(cfg._cfg_dict, old.rstrip("/"), new)
    try:
        cfg.merge_from_dict(options)
    except Exception as error:  # such as a key below a number, or an index that a list has not
        raise ValueError(f"cfg_options do not fit {path}: {_describe(error)}") from error
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(path).stem))
    return cfg


def _read(path: str) -> Config:
    """Reads a config file; whatever goes wrong in it is the user's to correct."""
    suffixes = (".py", ".json", ".yml", ".yaml")
    if Path(path).suffix not in suffixes:
        raise ValueError(f"a config file must end in one of {', '.join(suffixes)}, got {path}")
    try:
        return Config.fromfile(path)
    except ModuleNotFoundError as error:
        if "mmpretrain" not in str(error):
            raise ValueError(f"{path} cannot be read: {_describe(error)}") from error
        raise ValueError(f"{path} needs mmpretrain: pip install 'mmsoftpool[pretrain]'") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """An error's message with its kind and, if a config file raised it, the line there."""
    text = str(error) or "no message"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).suffix == ".py" and frame.name == "<module>"
    ]
    line = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{line}"


def parse_options(options: list[str]) -> dict:
    """Parses settings ``key=value`` as MMDetection's ``--cfg-options`` does.

    Raises:
        ValueError: If a setting has another form.
    """
    for option in options:
        if not option.partition("=")[0] or "=" not in option:
            raise ValueError(f"cfg_options must have the form key=value, got {option!r}")
    parser = argparse.ArgumentParser()
    parser.add_argument("options", nargs="*", action=DictAction, default={})
    try:
        return parser.parse_args(["--", *options]).options if options else {}
    except AssertionError as error:  # brackets that are not closed
        raise ValueError(f"cfg_options must have balanced brackets, got {options}") from error


def _move_data_root(node, old: str, new: str):
    """Replaces the folder ``old`` by ``new`` in every string of a config, its dicts and lists in
    place; returns the changed node."""
    if isinstance(node, str):
        inside = node == old or node.startswith(old + "/")
        return os.path.join(new, node[len(old) + 1 :]) if inside else node
    if isinstance(node, tuple):
        return tuple(_move_data_root(value, old, new) for value in node)
    if isinstance(node, (dict, list)):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            node[key] = _move_data_root(value, old, new)
    return node


def require(cfg: Config, *names: str) -> None:
    """Checks that a config has the given parts, such as ``'test_dataloader.dataset'``.

    Raises:
        ValueError: If one is missing, or is neither a dict nor a list.
    """
    for name in names:
        part = cfg
        for key in name.split("."):
            part = part.get(key) if isinstance(part, (dict, Config)) else None
        if not isinstance(part, (dict, list)):
            raise ValueError(f"{cfg.filename} must have {name}, a dict, got {part!r}")


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
    metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
    if not metrics or not all(metric in ("bbox", "segm") for metric in metrics):
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
