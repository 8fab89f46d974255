"""Training and testing a detector from a config: what the scripts in ``tools/`` call.

mmengine's Runner does the work. Here is what a user needs around it: one option that moves the data
set, and mistakes that are found before any work starts and reported in one line.
"""

import argparse
import errno
import os
import sys
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint

from .engine import find_good_checkpoint

_COCO_SOURCE = (
    "download COCO 2017 from https://cocodataset.org/#download and unpack annotations/, train2017/ "
    "and val2017/ there"
)


class UserError(Exception):
    """A mistake in what the user gave; its text is one line that says how to mend it."""


def run_tool(main: Callable[[], None]) -> None:
    """Runs ``main``; a :class:`UserError` ends the process with one line and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; a training run goes on with --resume", file=sys.stderr)
        sys.exit(130)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what training and testing have in common, with MMDetection's names."""
    parser.add_argument(
        "--work-dir",
        help="where logs and results go; defaults to work_dir of the config, else work_dirs/CONFIG",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="override settings of the config, for example train_dataloader.batch_size=4; lists as "
        "key='[a,b]' or key=a,b. data_root=DIR moves all data sets and evaluators",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes of a distributed run were started (default: %(default)s)",
    )
    # torchrun's predecessor passes it; torchrun itself sets LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a run is trained, with MMDetection's names."""
    parser.add_argument("--amp", action="store_true", help="train in mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by true batch size / auto_scale_lr.base_batch_size",
    )


def load_config(
    path: str,
    cfg_options: dict | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Reads a config and applies the options of the command line.

    Args:
        path: The config file.
        cfg_options: Settings that override the config's. ``data_root`` replaces the config's
            ``data_root`` wherever it occurs: in train, val and test data sets and evaluators.
            Defaults to None.
        work_dir: Where logs and results go. Defaults to ``work_dir`` of the config, else to
            ``work_dirs/`` and the config's name.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``. Defaults to ``'none'``.

    Raises:
        UserError: If the config is missing, needs mmpretrain that is not installed, or has no
            ``data_root`` to replace.
    """
    if not Path(path).is_file():
        raise UserError(
            f"no config file at {Path(path).absolute()}; this project's configs are in configs/, "
            "mmdet's own can be had with 'mim download mmdet --config NAME'"
        )
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:
        if "mmpretrain" not in str(error):
            raise
        raise UserError(f"{path} needs mmpretrain: pip install 'mmsoftpool[pretrain]'") from error
    options = dict(cfg_options or {})
    if "data_root" in options:
        if "data_root" not in cfg:
            raise UserError(f"{path} has no data_root that --cfg-options data_root=... could set")
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


def check_data(cfg: Config, *splits: str) -> None:
    """Checks that the files of the given splits are there, before anything is built.

    Args:
        cfg: The config.
        *splits: Of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        UserError: If an annotation file or an image folder is missing or empty.
    """
    for split in splits:
        for node in _dicts(cfg.get(f"{split}_dataloader"), cfg.get(f"{split}_evaluator")):
            # mmpretrain's ImageNet has a folder per split, and needs no annotations.
            folders = [node["split"]] if node.get("split") and not node.get("ann_file") else []
            if not (node.get("ann_file") or folders) or node.get("backend_args"):
                continue  # no data set, or one on a remote file server
            root = node.get("data_root") or ""
            source = cfg.get("data_source", _COCO_SOURCE)
            help = f"{source}, or name another folder with --cfg-options data_root=DIR"
            if node.get("ann_file"):
                ann_file = Path(root, node["ann_file"])
                if not ann_file.is_file():
                    raise UserError(f"no {split} annotations at {ann_file.absolute()}; {help}")
                folders = (node.get("data_prefix") or {}).values()
            for prefix in folders:
                folder = Path(root, prefix)
                if not folder.is_dir() or not any(folder.iterdir()):
                    raise UserError(f"no {split} images in {folder.absolute()}; {help}")


def _dicts(*nodes) -> Iterator[dict]:
    """All dicts in nested dicts and lists."""
    for node in nodes:
        if isinstance(node, dict):
            yield node
            yield from _dicts(*node.values())
        elif isinstance(node, (list, tuple)):
            yield from _dicts(*node)


def coco_metrics(cfg: Config) -> list[str]:
    """What a config's ``test_evaluator`` evaluates: ``'bbox'``, ``'segm'`` or both.

    Raises:
        UserError: If it is not one CocoMetric of those.
    """
    evaluator = cfg.get("test_evaluator")
    if not isinstance(evaluator, dict) or evaluator.get("type") != "CocoMetric":
        raise UserError(
            f"{cfg.filename} must have one test_evaluator, a CocoMetric, got {evaluator}"
        )
    metrics = evaluator.get("metric", "bbox")
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    if not set(metrics) <= {"bbox", "segm"}:
        raise UserError(
            f"test_evaluator.metric of {cfg.filename} must be bbox or segm, got {metrics}"
        )
    return metrics


def _check_checkpoint(path: str, what: str) -> None:
    if "://" not in path and not Path(path).is_file():
        raise UserError(f"no {what} at {Path(path).absolute()}")


def build_runner(cfg: Config) -> Runner:
    """mmengine's Runner; distributed processes without GPUs talk through gloo."""
    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        # mmengine would ask for a CUDA device, and DistributedDataParallel for none.
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        cfg.setdefault(
            "model_wrapper_cfg",
            dict(
                type="MMDistributedDataParallel",
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=cfg.get("find_unused_parameters", False),
            ),
        )
    return Runner.from_cfg(cfg)


def load_weights(checkpoint: str, load: Callable) -> None:
    """Loads a checkpoint for evaluation; unlike mmengine's default, every weight must fit.

    Args:
        checkpoint: File or URL.
        load: What loads it, such as the ``load_checkpoint`` of a Runner.

    Raises:
        UserError: If there is no such file, or it does not fit the model.
    """
    _check_checkpoint(checkpoint, "checkpoint")
    try:
        load(checkpoint, map_location="cpu", strict=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{checkpoint} does not fit the model or is damaged: {reason}") from error


def load_model(cfg: Config, checkpoint: str) -> torch.nn.Module:
    """The model of a config with the weights of a checkpoint, in evaluation mode on the CPU.

    Raises:
        UserError: As :func:`load_weights`.
    """
    init_default_scope(cfg.get("default_scope", "mmdet"))
    model = MODELS.build(cfg.model)
    load_weights(checkpoint, partial(load_checkpoint, model))
    model.eval()
    return model


def train(cfg: Config, amp: bool = False, auto_scale_lr: bool = False, resume=None) -> Runner:
    """Trains a detector.

    Args:
        cfg: The config, from :func:`load_config`.
        amp: Whether to train in mixed precision; needs a GPU. Defaults to False.
        auto_scale_lr: Whether to scale the learning rate by the true batch size over
            ``auto_scale_lr.base_batch_size`` of the config. Defaults to False.
        resume (bool | str): True goes on from the last checkpoint in ``work_dir``, if there is one;
            a path from that checkpoint. Defaults to None, a new run.

    Raises:
        UserError: If data or a checkpoint is missing, or an option does not fit.
    """
    check_data(cfg, "train", *(["val"] if cfg.get("val_cfg") else []))
    if amp:
        if not torch.cuda.is_available():
            raise UserError("--amp needs a GPU and torch sees none; leave it out to train in fp32")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(
                f"{cfg.filename} has no auto_scale_lr.base_batch_size, which --auto-scale-lr needs"
            )
        cfg.auto_scale_lr.enable = True
    if resume is True:
        latest, damaged = find_good_checkpoint(cfg.work_dir)
        for path in damaged:
            print(f"{path} is damaged or gone and is passed over", file=sys.stderr)
        print(f"resuming from {latest}" if latest else f"nothing to resume in {cfg.work_dir}")
        # The path, because resume alone would take what the file last_checkpoint names.
        cfg.resume, cfg.load_from = latest is not None, latest
    elif resume:
        cfg.resume, cfg.load_from = True, resume
    if cfg.get("load_from"):
        _check_checkpoint(cfg.load_from, "checkpoint")
    for node in _dicts(cfg.model):
        if node.get("type") == "Pretrained" and "checkpoint" in node:
            _check_checkpoint(node["checkpoint"], "pretrained weights")
    hooks = [*cfg.get("custom_hooks", []), dict(type="EpochSeedHook")]
    if cfg.launcher != "none":
        # One set of batch norm statistics, so that every process evaluates the model that is saved.
        hooks.append(dict(type="SyncBuffersHook"))
    cfg.custom_hooks = hooks
    # Workers live for an epoch, and then get new seeds; see EpochSeedHook.
    cfg.train_dataloader.persistent_workers = False
    cfg.train_dataloader.setdefault("worker_init_fn", dict(type="keep_torch_seed"))
    runner = build_runner(cfg)
    try:
        runner.train()
    except (urllib.error.URLError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "torchvision":
            raise
        raise UserError(
            f"the pretrained weights cannot be had ({error}); name a file with --cfg-options "
            "model.backbone.init_cfg.checkpoint=FILE, or start from random weights with "
            "model.backbone.init_cfg=None"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"cannot write to {cfg.work_dir}: {error.strerror}. Make room, then --resume goes on "
            "from the last whole checkpoint"
        ) from error
    return runner


def test(
    cfg: Config,
    checkpoint: str,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2.0,
) -> dict[str, float]:
    """Evaluates a detector.

    Args:
        cfg: The config, from :func:`load_config`.
        checkpoint: File or URL of the detector's weights; must fit the model exactly.
        out: Pickle file for the predictions. Defaults to None, which keeps none.
        show: Whether to show the predictions in a window. Defaults to False.
        show_dir: Folder for pictures of the predictions beside the ground truth. Defaults to None.
        wait_time: Seconds that a window stays. Defaults to 2.

    Returns:
        The metrics, such as ``coco/bbox_mAP``.

    Raises:
        UserError: If data or checkpoint are missing, or do not fit.
    """
    from mmdet.engine.hooks.utils import trigger_visualization_hook
    from mmdet.evaluation import DumpDetResults

    check_data(cfg, "test")
    if out is not None and not out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out must end in .pkl or .pickle, got {out}")
    if show or show_dir:
        # An absolute path: the hook takes a relative one as a folder inside work_dir.
        show_dir = os.path.abspath(show_dir) if show_dir else None
        if cfg.default_hooks.visualization.type == "VisualizationHook":  # mmpretrain's
            cfg.default_hooks.visualization.update(
                enable=True, interval=1, show=show, out_dir=show_dir, wait_time=wait_time
            )
        else:
            cfg = trigger_visualization_hook(
                cfg, ConfigDict(show=show, show_dir=show_dir, wait_time=wait_time)
            )
    runner = build_runner(cfg)
    load_weights(checkpoint, runner.load_checkpoint)
    if out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=out))
    return runner.test()
