"""Training and evaluation of a detector from a config, on mmengine's Runner.

As MMDetection's ``tools/train.py`` and ``tools/test.py``, with the same config and the same files
at the end: nothing is added to the config. What is more than there are checks, whose errors are
one line: of the data sets, of the disk and of the weights.
"""

import errno
import logging
import os
import sys
import urllib.error
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS, METRICS, MODELS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from .checks import DataCheckHook, advice, explain_annotation_errors
from .config import require, type_name
from .errors import UserError
from .files import check_input, check_output
from .hooks import find_intact_checkpoint


class _Runner(Runner):
    """mmengine's Runner, which also runs several processes without GPUs, over gloo."""

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs):
        with explain_annotation_errors(dataloader, DATASETS):
            return Runner.build_dataloader(dataloader, *args, **kwargs)

    def build_evaluator(self, evaluator):
        with explain_annotation_errors(evaluator, METRICS):
            return super().build_evaluator(evaluator)

    def build_param_scheduler(self, scheduler):
        try:
            return super().build_param_scheduler(scheduler)
        except ValueError as error:  # such as an end before begin
            raise UserError(f"param_scheduler does not fit train_cfg: {error}") from error

    def setup_env(self, env_cfg: dict) -> None:
        # mmengine would ask for a CUDA device.
        if self.distributed and not torch.cuda.is_available() and not is_distributed():
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and model_wrapper_cfg is None and not torch.cuda.is_available():
            model_wrapper_cfg = dict(
                type="MMDistributedDataParallel",
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get("find_unused_parameters", False),
            )
        return super().wrap_model(model_wrapper_cfg, model)


def build_runner(cfg: Config) -> Runner:
    """Builds mmengine's Runner for a config, or the config's own ``runner_type``.

    Raises:
        UserError: If a package that the config needs is missing, such as a ``vis_backend``'s.
    """
    try:
        return RUNNERS.build(cfg) if "runner_type" in cfg else _Runner.from_cfg(cfg)
    except ImportError as error:
        raise UserError(f"{cfg.filename} needs a missing package: {error}") from error


@contextmanager
def explain_errors(cfg: Config) -> Iterator[None]:
    """Explains the errors of a run that the user can correct."""
    # On a full disk, logging would print a traceback for every line that it cannot write.
    report, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except urllib.error.URLError as error:
        init_cfg = "model.backbone.init_cfg"
        if type_name(cfg.model.get("backbone") or {}) == "SoftPoolBackbone":  # it wraps what loads
            init_cfg = "model.backbone.backbone.init_cfg"
        what, url = "the pretrained weights are", cfg.get("load_from") or ""
        if "://" in url:
            what = f"load_from={url}, or the pretrained weights, are"
        raise UserError(
            f"{what} unavailable ({error}); set --cfg-options {init_cfg}.checkpoint=FILE to load a "
            f"file, or {init_cfg}=None to start from random weights"
        ) from error
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        reason = error.strerror if error.strerror != os.strerror(errno.ENOENT) else "missing file"
        raise FileNotFoundError(
            f"{reason}: {os.path.abspath(error.filename)}; {advice(cfg, error.filename)}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"cannot write {error.filename or cfg.work_dir}: {error.strerror}; free some space, "
            "then resume from the last intact checkpoint"
        ) from error
    finally:
        logging.raiseExceptions = report


def read_weights(checkpoint: str) -> OrderedDict:
    """Reads the weights in a checkpoint, a file or URL.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is damaged or not a checkpoint.
    """
    if "://" not in checkpoint:
        check_input(os.path.expanduser(checkpoint), "checkpoint")
    try:
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
        weights = content.get("state_dict", content)
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise TypeError("state_dict must hold tensors by name")
        metadata = getattr(weights, "_metadata", None)
        weights = OrderedDict((key.removeprefix("module."), v) for key, v in weights.items())
    except Exception as error:  # damaged files make torch.load raise errors of any kind
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UserError(
            f"{checkpoint} is damaged or not a checkpoint: {type(error).__name__}: {reason}"
        ) from error
    weights._metadata = metadata
    return weights


def build_model(cfg: Config) -> nn.Module:
    """Builds the model of a config in the config's scope."""
    init_default_scope(cfg.get("default_scope") or "mmdet")
    return MODELS.build(cfg.model)


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Loads the weights of a checkpoint, a file or URL, into a model; all of them must fit.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        UserError: If it does not fit the model or is damaged.
    """
    model = model.module if is_model_wrapper(model) else model
    weights = read_weights(checkpoint)
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
        raise UserError(
            f"{checkpoint} does not fit the model of the config: {len(wrong)} mismatches, "
            f"{'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}"
        )


def load_model(cfg: Config, checkpoint: str) -> nn.Module:
    """Builds the model of a config with the weights of a checkpoint; all of them must fit.

    Args:
        cfg: The config, from :func:`~mmsoftpool.config.load_config`.
        checkpoint: File or URL.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError, UserError: See :func:`load_weights`.
    """
    model = build_model(cfg)
    load_weights(model, checkpoint)
    return model.eval()


def train(
    cfg: Config, amp: bool = False, auto_scale_lr: bool = False, resume: bool | str | None = None
) -> Runner:
    """Trains a detector.

    Args:
        cfg: The config, from :func:`~mmsoftpool.config.load_config`.
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
        UserError: If the data set does not fit the config, a file is damaged, or ``amp`` or
            ``auto_scale_lr`` is set where it cannot work.
    """
    require(cfg, "train_dataloader.dataset", "train_cfg", "optim_wrapper")
    if amp:
        if not torch.cuda.is_available():
            raise UserError("amp needs a GPU and torch finds none")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(f"auto_scale_lr needs auto_scale_lr.base_batch_size in {cfg.filename}")
        cfg.auto_scale_lr.enable = True
    if resume is True:
        latest, skipped = find_intact_checkpoint(cfg.work_dir)
        for path in skipped:
            print(f"skipping damaged or missing checkpoint {path}", file=sys.stderr)
        print(f"resuming from {latest}" if latest else f"nothing to resume in {cfg.work_dir}")
        cfg.resume = latest is not None
        if latest:  # the path, because resume alone would load the file that last_checkpoint names
            cfg.load_from = latest
    elif resume:
        cfg.resume, cfg.load_from = True, resume
    if cfg.get("load_from") and "://" not in cfg.load_from:
        read_weights(cfg.load_from)
    with explain_errors(cfg):
        runner = build_runner(cfg)
        runner.register_hook(DataCheckHook("train", *["val"] * bool(cfg.get("val_cfg"))))
        runner.train()
    return runner


def evaluate(
    cfg: Config,
    checkpoint: str,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2.0,
) -> dict[str, float]:
    """Evaluates a detector.

    Args:
        cfg: The config, from :func:`~mmsoftpool.config.load_config`.
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
        UserError: If the checkpoint does not fit the model, the data set does not fit the config,
            or ``out`` is not a pickle file.
    """
    require(cfg, "test_dataloader.dataset", "test_evaluator", "test_cfg")
    if out is not None:
        if not out.endswith((".pkl", ".pickle")):
            raise UserError(f"out must end in .pkl or .pickle, got {out}")
        check_output(out)
    if show or show_dir:
        if not cfg.get("default_hooks", {}).get("visualization"):
            raise UserError(f"show and show_dir need default_hooks.visualization in {cfg.filename}")
        # The hook would put a relative folder into work_dir.
        show_dir = os.path.abspath(show_dir) if show_dir else None
        options = ConfigDict(show=show, show_dir=show_dir, wait_time=wait_time)
        hook = cfg.default_hooks.visualization
        if hook.type == "VisualizationHook":  # mmpretrain's
            options["out_dir"] = options.pop("show_dir")
            hook.update(enable=True, interval=1, **options)
        else:
            cfg = trigger_visualization_hook(cfg, options)
    if "://" not in checkpoint:
        check_input(checkpoint, "checkpoint")
    cfg.load_from = checkpoint
    with explain_errors(cfg):
        runner = build_runner(cfg)
        load_weights(runner.model, checkpoint)  # mmengine only logs what does not fit
        runner.register_hook(DataCheckHook("test"))
        if out is not None:
            runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=out))
        return runner.test()
