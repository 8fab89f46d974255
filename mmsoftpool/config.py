"""Reading of configs: options that override settings, the data root, the metrics."""

import argparse
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction

from .errors import UserError
from .files import check_input


def load_config(
    path: str,
    cfg_options: dict | list[str] | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Reads a config and overrides settings of it.

    Args:
        path: The config file, or the name of one of this project's, see :func:`find_config`.
        cfg_options: Settings that override the config's, as a dict or as strings ``key=value``.
            ``data_root`` replaces the config's ``data_root`` wherever it occurs: in train, val and
            test data sets and evaluators. Defaults to None.
        work_dir: The folder for logs and results. Defaults to ``work_dir`` of the config, else to
            ``work_dirs/`` and the config's name.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``. Defaults to ``'none'``.

    Raises:
        FileNotFoundError: If there is no such config file.
        UserError: If the config cannot be read or has no ``model``; if ``cfg_options`` do not fit
            it, or have a ``data_root`` and the config has none to replace.
    """
    path = find_config(path)
    cfg = _read(path)
    if not isinstance(cfg.get("model"), dict):
        raise UserError(f"{path} must have a model, a dict, got {cfg.get('model')!r}")
    options = parse_options(cfg_options) if isinstance(cfg_options, list) else cfg_options
    options = dict(options or {})
    if "data_root" in options:
        old, new = cfg.get("data_root"), str(options.pop("data_root"))
        if not new:
            raise UserError("data_root in cfg_options must be a folder, got ''")
        if not (isinstance(old, str) and old.rstrip("/")):
            raise UserError(
                f"cfg_options sets data_root={new}, but {path} has no data_root to replace"
            )
        _move_data_root(cfg._cfg_dict, old.rstrip("/"), new)
    try:
        cfg.merge_from_dict(options)
    except Exception as error:  # such as a key below a number, or an index out of range
        raise UserError(f"cfg_options do not fit {path}: {_describe(error)}") from error
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(path).stem))
    return cfg


def find_config(path: str) -> str:
    """Finds a config file.

    Args:
        path: A file, or the name of one of the configs that come with this package, with or without
            ``.py``: ``retinanet_r50_softpool``.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not Path(path).is_file() and Path(path).name == path:
        shipped = Path(__file__).parent / ".mim" / "configs"
        for found in sorted(shipped.rglob(f"{path.removesuffix('.py')}.py")):
            return str(found.resolve())
    check_input(
        path,
        "config file",
        "; the configs of this project are known by their names, such as retinanet_r50_softpool, "
        "and 'mim download onedl-mmdetection --config NAME --dest .' downloads one of mmdet's",
    )
    return path


def config_names(configs: Sequence[str], names: Sequence[str] | None = None) -> list[str]:
    """What tables and pictures call configs: ``names``, or else the names of their files.

    Raises:
        UserError: If the names are not as many as the configs, and different.
    """
    names = list(names or [Path(config).stem for config in configs])
    if len(names) != len(configs) or len(set(names)) != len(names):
        raise UserError(f"names must be {len(configs)} different ones, one a config, got {names}")
    return names


def _read(path: str) -> Config:
    """Reads a config file; whatever goes wrong in it is the user's to correct."""
    suffixes = (".py", ".json", ".yml", ".yaml")
    if Path(path).suffix not in suffixes:
        raise UserError(f"a config file must end in one of {', '.join(suffixes)}, got {path}")
    try:
        return Config.fromfile(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """An error's message with its kind and, if a config file raised it, the line there."""
    text = str(error) or "no message"
    line = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).suffix == ".py" and frame.name == "<module>":
            line = f" ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {text}{line}"


def parse_options(options: list[str]) -> dict:
    """Parses settings ``key=value`` as MMDetection's ``--cfg-options`` does.

    A path is taken literally, with the spaces, commas and brackets that it may have: the value of
    ``data_root``, and any value with a slash that is not in brackets.

    Raises:
        UserError: If a setting has another form.
    """
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise UserError(f"cfg_options must have the form key=value, got {option!r}")
        if key == "data_root" or ("/" in value and value[:1] not in ("[", "(", "'", '"')):
            parsed[key] = value
            continue
        parser = argparse.ArgumentParser()
        parser.add_argument("options", nargs="*", action=DictAction)
        try:
            parsed |= parser.parse_args(["--", option]).options
        except AssertionError as error:  # brackets that are not closed
            raise UserError(f"cfg_options must have balanced brackets, got {option!r}") from error
    return parsed


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
        UserError: If one is missing, or is neither a dict nor a list.
    """
    for name in names:
        part = cfg
        for key in name.split("."):
            part = part.get(key) if isinstance(part, (dict, Config)) else None
        if not isinstance(part, (dict, list)):
            raise UserError(f"{cfg.filename} must have {name}, a dict, got {part!r}")


def type_name(node: dict) -> str:
    """The name of a config node's ``type``, which may be a class."""
    kind = node.get("type")
    return getattr(kind, "__name__", str(kind)).removeprefix("mmdet.")


def coco_metrics(cfg: Config) -> list[str]:
    """Metrics of a config's ``test_evaluator``: ``'bbox'``, ``'segm'`` or both.

    Raises:
        UserError: If ``test_evaluator`` is not one CocoMetric with these metrics.
    """
    evaluator = cfg.get("test_evaluator")
    if not isinstance(evaluator, dict) or type_name(evaluator) != "CocoMetric":
        raise UserError(
            f"{cfg.filename} must have one test_evaluator, a CocoMetric, got {evaluator}"
        )
    metrics = evaluator.get("metric", "bbox")
    metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
    if not metrics or not all(metric in ("bbox", "segm") for metric in metrics):
        raise UserError(
            f"test_evaluator.metric of {cfg.filename} must be bbox or segm, got {metrics}"
        )
    return metrics
