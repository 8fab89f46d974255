"""Training and evaluation of a detector from a config, on mmengine's Runner."""

import errno
import io
import logging
import os
import re
import sys
import traceback
import urllib.error
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import CheckpointLoader, Runner

from ..files import check_input, check_output
from .build import build_model, build_optimizer
from .checkpoints import find_intact_checkpoint
from .config import dicts, require
from .data import check_data


def build_runner(cfg: Config) -> Runner:
    """Builds mmengine's Runner; distributed processes without GPUs use gloo.

    Raises:
        ValueError: If the config has only some of the parts for training, validation or testing.
    """
    for split, last in (
        ("train", "optim_wrapper"),
        ("val", "val_evaluator"),
        ("test", "test_evaluator"),
    ):
        names = (f"{split}_dataloader", f"{split}_cfg", last)
        if any(cfg.get(name) is not None for name in names):
            require(cfg, *names)
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
    for node in dicts(*(cfg.get(f"{split}_dataloader") for split in ("train", "val", "test"))):
        if node.get("type") == "LoadImageFromFile":
            node["type"] = "NamingLoadImageFromFile"
    return Runner.from_cfg(cfg)


@contextmanager
def _explain_errors(cfg: Config) -> Iterator[None]:
    """Explains the errors of a run that the user can correct."""
    # On a full disk, logging would print a traceback for every line that it cannot write.
    report, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as error:
        # A worker's error has its traceback in its message.
        image = re.search(r"(?:^|OSError: )(cannot read the image .*)", str(error))
        if image:
            raise OSError(image[1]) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"cannot write {_file_of(error) or cfg.work_dir}: {error.strerror}; free some space, "
            "then resume from the last intact checkpoint"
        ) from error
    finally:
        logging.raiseExceptions = report


def _file_of(error: OSError) -> str | None:
    """The file that could not be written; Python names it if it cannot be opened only."""
    if error.filename:
        return str(error.filename)
    names = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        files = [value for value in frame.f_locals.values() if isinstance(value, io.IOBase)]
        names += [getattr(file, "name", None) for file in files]
    return next((name for name in reversed(names) if isinstance(name, str)), None)


def read_weights(checkpoint: str, what: str = "checkpoint") -> OrderedDict:
    """Reads the weights in a checkpoint.

    Args:
        checkpoint: File or URL.
        what: Its description in the error message. Defaults to ``'checkpoint'``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or not a checkpoint.
    """
    if "://" not in checkpoint:
        check_input(checkpoint, what)
    try:
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
        weights = content.get("state_dict", content)
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise TypeError("state_dict must hold tensors by name")
        metadata = getattr(weights, "_metadata", None)
        weights = OrderedDict((key.removeprefix("module."), v) for key, v in weights.items())
    except Exception as error:  # damaged files make torch.load raise errors of any kind
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(
            f"{checkpoint} is damaged or not a checkpoint: {type(error).__name__}: {reason}"
        ) from error
    weights._metadata = metadata
    return weights


def load_model(cfg: Config, checkpoint: str) -> torch.nn.Module:
    """Builds the model of a config with the weights of a checkpoint; all of them must fit.

    Args:
        cfg: The config, from :func:`load_config`.
        checkpoint: File or URL.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the model cannot be built, or the checkpoint does not fit it or is damaged.
    """
    weights = read_weights(checkpoint)
    model = build_model(cfg)
    wrong, expected = [], {key: value.shape for key, value in model.state_dict().items()}
    other = {k for k in expected.keys() & weights.keys() if weights[k].shape != expected[k]}
    for key in sorted(other):
        shape = tuple(weights.pop(key).shape)
        wrong.append(f"{key} has the shape {shape}, not {tuple(expected[key])}")
    # torch's method, because modules may rename the weights of their earlier versions.
    found = model.load_state_dict(weights, strict=False)
    missing = [key for key in found.missing_keys if key not in other]
    wrong += [f"{key} is missing" for key in missing if "num_batches_tracked" not in key]
    wrong += [f"{key} is unexpected" for key in found.unexpected_keys]
    if wrong:
        raise ValueError(
            f"{checkpoint} does not fit the model of {cfg.filename}: {len(wrong)} mismatches, "
            f"{'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}"
        )
    model.eval()
    return model


def _save_atomically(cfg: Config) -> None:
    """Replaces mmengine's CheckpointHook and, for a loop of iterations, checks its settings."""
    hooks = dict(cfg.get("default_hooks") or {})
    hook = dict(hooks.get("checkpoint", dict(type="CheckpointHook", interval=1)) or {})
    loop = cfg.train_cfg
    by_epoch = loop.get("by_epoch", loop.get("type") != "IterBasedTrainLoop")
    if hook and not by_epoch:
        if hook.get("by_epoch", True):
            raise ValueError(
                f"default_hooks.checkpoint.by_epoch of {cfg.filename} must be False, because "
                "train_cfg counts iterations and would save no checkpoint before the last one"
            )
        # Else the log gives all validations the number 0.
        logger = hooks.get("logger", dict(type="LoggerHook"))
        hooks["logger"] = logger and {"log_metric_by_epoch": False, **logger}
    if hook.get("type") == "CheckpointHook":
        hooks["checkpoint"] = dict(hook, type="AtomicCheckpointHook")
    cfg.default_hooks = hooks


def train(
    cfg: Config, amp: bool = False, auto_scale_lr: bool = False, resume: bool | str | None = None
) -> Runner:
    """Trains a detector.

    Args:
        cfg: The config, from :func:`load_config`.
        amp: Whether to train in mixed precision; needs a GPU. Defaults to False.
        auto_scale_lr: Whether to scale the learning rate by the true batch size over
            ``auto_scale_lr.base_batch_size`` of the config. Defaults to False.
        resume: True resumes from the latest intact checkpoint in ``work_dir``, if there is one; a
            path resumes from that checkpoint. Defaults to None, a new run.

    Returns:
        The Runner after the training.

    Raises:
        FileNotFoundError: If the data set, a checkpoint or the pretrained weights are missing.
        OSError: If the disk is full.
        ValueError: If ``amp`` or ``auto_scale_lr`` is set where it cannot work.
    """
    require(cfg, "train_dataloader.dataset", "train_cfg", "optim_wrapper")
    check_data(cfg, "train", *(["val"] if cfg.get("val_cfg") else []))
    if amp:
        if not torch.cuda.is_available():
            raise ValueError("amp needs a GPU and torch finds none")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ValueError(f"auto_scale_lr needs auto_scale_lr.base_batch_size in {cfg.filename}")
        cfg.auto_scale_lr.enable = True
    if resume is True:
        latest, skipped = find_intact_checkpoint(cfg.work_dir)
        for path in skipped:
            print(f"skipping damaged or missing checkpoint {path}", file=sys.stderr)
        print(f"resuming from {latest}" if latest else f"nothing to resume in {cfg.work_dir}")
        # The path, because resume alone would load the file that last_checkpoint names.
        cfg.resume, cfg.load_from = latest is not None, latest
    elif resume:
        cfg.resume, cfg.load_from = True, resume
    if cfg.get("load_from") and "://" not in cfg.load_from:
        read_weights(cfg.load_from)
    for node in dicts(cfg.model):
        if node.get("type") == "Pretrained" and "://" not in node.get("checkpoint", "://"):
            read_weights(node["checkpoint"], "pretrained weights")
    build_optimizer(cfg, build_model(cfg))  # mmengine's report is hundreds of lines long
    _save_atomically(cfg)
    hooks = [
        *cfg.get("custom_hooks", []),
        dict(type="EpochSeedHook"),
        dict(type="MissedValidationHook"),
    ]
    if cfg.launcher != "none":
        # The same batch norm statistics in all processes, so that they evaluate the saved model.
        hooks.append(dict(type="SyncBuffersHook"))
    cfg.custom_hooks = hooks
    # New workers, and with them new seeds, for every epoch; see EpochSeedHook.
    cfg.train_dataloader.persistent_workers = False
    cfg.train_dataloader.setdefault("worker_init_fn", dict(type="keep_torch_seed"))
    try:
        with _explain_errors(cfg):
            runner = build_runner(cfg)
            runner.train()
    except (urllib.error.URLError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "torchvision":
            raise
        init_cfg = "model.backbone.init_cfg"
        if cfg.model.backbone.type == "SoftPoolBackbone":  # it wraps the backbone that loads them
            init_cfg = "model.backbone.backbone.init_cfg"
        raise FileNotFoundError(
            f"the pretrained weights are unavailable ({error}); set cfg_options "
            f"{init_cfg}.checkpoint=FILE to load a file, or {init_cfg}=None to start from random "
            "weights"
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
        out: Pickle file for the predictions. Defaults to None, no file.
        show: Whether to show the predictions in a window. Defaults to False.
        show_dir: Folder for pictures of the predictions beside the ground truth. Defaults to None,
            no pictures.
        wait_time: Seconds that each window is shown. Defaults to 2.

    Returns:
        The metrics, such as ``coco/bbox_mAP``.

    Raises:
        FileNotFoundError: If the data set or the checkpoint is missing.
        ValueError: If the checkpoint does not fit the model, or ``out`` is not a pickle file.
    """
    from mmdet.engine.hooks.utils import trigger_visualization_hook
    from mmdet.evaluation import DumpDetResults

    require(cfg, "test_dataloader.dataset", "test_evaluator", "test_cfg")
    check_data(cfg, "test")
    if out is not None and not out.endswith((".pkl", ".pickle")):
        raise ValueError(f"out must end in .pkl or .pickle, got {out}")
    if out is not None:
        check_output(out)
    load_model(cfg, checkpoint)  # mmengine would report a mistake after hundreds of lines
    if show or show_dir:
        # The hook would put a relative folder into work_dir.
        show_dir = os.path.abspath(show_dir) if show_dir else None
        if not cfg.get("default_hooks", {}).get("visualization"):
            raise ValueError(
                f"show and show_dir need default_hooks.visualization in {cfg.filename}"
            )
        if cfg.default_hooks.visualization.type == "VisualizationHook":  # mmpretrain's
            cfg.default_hooks.visualization.update(
                enable=True, interval=1, show=show, out_dir=show_dir, wait_time=wait_time
            )
        else:
            cfg = trigger_visualization_hook(
                cfg, ConfigDict(show=show, show_dir=show_dir, wait_time=wait_time)
            )
    with _explain_errors(cfg):
        runner = build_runner(cfg)
        runner.load_checkpoint(checkpoint, strict=True)
        if out is not None:
            runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=out))
        return runner.test()
