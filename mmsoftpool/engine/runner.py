"""Training and testing a detector from a config. mmengine's Runner does the work."""

import errno
import os
import sys
import urllib.error
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint

from .config import dicts
from .data import check_data
from .resume import find_good_checkpoint


def _check_checkpoint(path: str, what: str) -> None:
    if "://" not in path and not Path(path).is_file():
        raise ValueError(f"no {what} at {Path(path).absolute()}")


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
        ValueError: If there is no such file, or it does not fit the model.
    """
    _check_checkpoint(checkpoint, "checkpoint")
    try:
        load(checkpoint, map_location="cpu", strict=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint} does not fit the model or is damaged: {reason}") from error


def load_model(cfg: Config, checkpoint: str) -> torch.nn.Module:
    """The model of a config with the weights of a checkpoint, in evaluation mode on the CPU.

    Raises:
        ValueError: As :func:`load_weights`.
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
        ValueError: If data or a checkpoint is missing, or an option does not fit.
    """
    check_data(cfg, "train", *(["val"] if cfg.get("val_cfg") else []))
    if amp:
        if not torch.cuda.is_available():
            raise ValueError("--amp needs a GPU and torch sees none; leave it out to train in fp32")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ValueError(
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
    for node in dicts(cfg.model):
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
        init_cfg = "model.backbone.init_cfg"
        if cfg.model.backbone.type == "SoftPoolBackbone":  # it wraps the backbone that loads them
            init_cfg = "model.backbone.backbone.init_cfg"
        raise ValueError(
            f"the pretrained weights cannot be had ({error}); name a file with --cfg-options "
            f"{init_cfg}.checkpoint=FILE, or start from random weights with {init_cfg}=None"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(
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
        ValueError: If data or checkpoint are missing, or do not fit.
    """
    from mmdet.engine.hooks.utils import trigger_visualization_hook
    from mmdet.evaluation import DumpDetResults

    check_data(cfg, "test")
    if out is not None and not out.endswith((".pkl", ".pickle")):
        raise ValueError(f"--out must end in .pkl or .pickle, got {out}")
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
