"""Conversion of the authors' ImageNet checkpoints to initial weights of detectors.

Their files have the format of PyTorch's ImageNet example: a dict with ``epoch``, ``arch``,
``state_dict``, ``best_acc1`` and ``optimizer``, saved from ``nn.DataParallel``, so that the keys
are torchvision's after the prefix ``module.``. The converted file has mmpretrain's format, with
keys ``backbone.`` and ``head.fc.``, as pre-training with this project's configs gives it.
"""

import importlib.util
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.registry import MODELS
from yapf.yapflib.yapf_api import FormatCode

from . import __version__
from .errors import UserError
from .files import check_input, check_output, file_hash, write_atomically

#: Positions of the 2x2 windows of the authors' operator, by the time of training.
#:
#: Until April 2022 it padded one element on each side, without weight, and dropped an incomplete
#: last window, so that window p has the inputs [2p-1, 2p]; since then it has [2p, 2p+1].
WINDOWS = {
    "shifted": dict(type="SoftPool2d", kernel_size=2, stride=2, padding=((1, 0), (1, 0))),
    "aligned": dict(type="SoftPool2d", kernel_size=2, stride=2),
}

_RESNEXT = dict(type="SoftPoolResNeXt", groups=32)
#: Backbone configs of the authors' architectures.
ARCHITECTURES = {
    **{f"resnet{n}": dict(type="SoftPoolResNet", depth=n) for n in (18, 34, 50, 101, 152)},
    "resnext50_32x4d": dict(**_RESNEXT, depth=50, base_width=4),
    "resnext101_32x4d": dict(**_RESNEXT, depth=101, base_width=4),
    "resnext101_32x8d": dict(**_RESNEXT, depth=101, base_width=8),
    "wide_resnet50_2": dict(
        type="mmpretrain.ResNet",
        depth=50,
        stem_channels=64,
        base_channels=128,
        expansion=2,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
    ),
    **{
        f"densenet{n}": dict(
            type="mmpretrain.TIMMBackbone",
            model_name=f"densenet{n}",
            features_only=True,
            out_indices=(1, 2, 3, 4),
        )
        for n in (121, 161, 169)
    },
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
# torchvision's prefixes and the converted ones.
_RENAMED = {
    "features.": "backbone.timm_model.features_",
    "classifier.": "head.fc.",
    "fc.": "head.fc.",
    "": "backbone.",
}


def convert_checkpoint(
    source: str, target: str, arch: str | None = None, windows: str = "shifted", trust: bool = False
) -> str:
    """Converts a checkpoint of the authors to weights for this project's configs.

    Args:
        source: The authors' file.
        target: The file to write, with ``meta``, its origin, and ``state_dict``.
        arch: The architecture, one of :data:`ARCHITECTURES`. Defaults to None, the one that the
            file names.
        windows: The windows of the training, one of :data:`WINDOWS`. Defaults to ``'shifted'``,
            those until April 2022, before which the authors published their weights.
        trust: Whether to run code that the file may contain. Defaults to False.

    Returns:
        The lines of a detector's config that initialise it from ``target``.

    Raises:
        FileNotFoundError: If there is no ``source``, or no folder for ``target``.
        UserError: If ``source`` is damaged or not a checkpoint in the authors' format, or an
            argument does not fit it. Nothing is written then.
    """
    if windows not in WINDOWS:
        raise UserError(f"windows must be one of {', '.join(WINDOWS)}, got {windows!r}")
    check_output(target)
    if Path(target).exists() and Path(source).exists() and Path(source).samefile(target):
        raise UserError(f"target must be another file than source, got {target} for both")
    checkpoint = _load(source, trust)
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        content = type(checkpoint).__name__
        if isinstance(checkpoint, Mapping) and checkpoint:
            content = f"keys {', '.join(sorted(map(str, checkpoint))[:5])}"
        raise UserError(
            f"{source} is not a checkpoint in the authors' format: state_dict must hold weights by "
            f"name, got {content}"
        )
    found = checkpoint.get("arch")
    if arch is not None and found is not None and arch != found:
        raise UserError(f"arch must be {found}, the architecture in {source}, got {arch}")
    arch = arch or found
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UserError(
            f"unknown architecture {arch!r} in {source}; arch must be one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    state_dict = {_rename(key.removeprefix("module.")): value for key, value in weights.items()}
    backbone = _build(arch)
    _check(source, arch, state_dict, backbone)

    epoch, accuracy = checkpoint.get("epoch"), checkpoint.get("best_acc1")
    if _is_dense(accuracy) and accuracy.numel() == 1:
        accuracy = accuracy.item()
    meta = dict(
        source=Path(source).name,
        source_sha256=file_hash(source),
        arch=arch,
        epoch=epoch if isinstance(epoch, int) else None,
        best_acc1=accuracy if isinstance(accuracy, (int, float)) else None,
        windows=windows,
        converted_by=f"mmsoftpool {__version__}",
    )
    state_dict = {key: value.detach().cpu().clone() for key, value in state_dict.items()}
    # Through an open file: torch.save would write a path's name into the file.
    with write_atomically(target) as temporary, open(temporary, "wb") as file:
        torch.save(dict(meta=meta, state_dict=state_dict), file)
    return _detector_config(arch, backbone, WINDOWS[windows], target)


def _load(path: str, trust: bool):
    check_input(path, "checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # damaged files make torch.load raise errors of any kind
        reason = " ".join(str(error).split())
        code = re.search(r"unsupported (?:(?:global|class):? )+(\S+)", reason, re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and code:
            raise UserError(
                f"{path} contains code, {code[1]}; trust must be True to run it, for a file from a "
                "source that you trust"
            ) from error
        reason = reason.split(". ")[0] or type(error).__name__
        raise UserError(f"{path} is damaged or not a PyTorch checkpoint: {reason}") from error


def _rename(key: str) -> str:
    old = next(prefix for prefix in _RENAMED if key.startswith(prefix))
    return _RENAMED[old] + key[len(old) :]


def _build(arch: str) -> torch.nn.Module:
    """Builds the backbone of an architecture."""
    cfg = dict(ARCHITECTURES[arch])
    if cfg["type"].startswith("SoftPool"):
        cfg["type"] = f"mmdet.{cfg['type']}"
    else:
        for package in ("mmpretrain", "timm"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"arch {arch} needs {package}: pip install onedl-mmpretrain timm")
    return MODELS.build(cfg)


def _check(source: str, arch: str, state_dict: dict, backbone: torch.nn.Module) -> None:
    """Checks that the weights have an architecture's keys and shapes, and finite values."""
    odd = [key for key, value in state_dict.items() if not _is_dense(value)]
    if odd:
        raise UserError(
            f"{source} must hold dense tensors of real numbers, got {len(odd)} other values "
            f"({', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''})"
        )
    expected = {f"backbone.{key}": value.shape for key, value in backbone.state_dict().items()}
    head = tuple(getattr(state_dict.get("head.fc.weight"), "shape", ())) or (1000,)
    features = _channels(backbone)[-1]
    expected["head.fc.weight"] = torch.Size((head[0], features))
    expected["head.fc.bias"] = torch.Size(head[:1])
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    wrong = {
        "keys are missing": [key for key in expected if key not in shapes],
        "keys are unexpected": [key for key in shapes if key not in expected],
        "shapes differ": [
            f"{key} {shapes[key]}, not {tuple(shape)}"
            for key, shape in expected.items()
            if key in shapes and shapes[key] != tuple(shape)
        ],
        "are not finite": [key for key, value in state_dict.items() if not value.isfinite().all()],
    }
    problems = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in wrong.items()
        if keys
    ]
    if problems:
        raise UserError(f"{source} does not fit {arch}: {'; '.join(problems)}")


def _is_dense(value) -> bool:
    """Whether a value is a dense tensor of real numbers, and not a small one expanded."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
        and value.dtype in _DTYPES
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _channels(backbone: torch.nn.Module) -> list[int]:
    """The channels of a backbone's levels."""
    backbone.eval()
    with torch.no_grad():
        return [level.shape[1] for level in backbone(torch.zeros(1, 3, 32, 32))]


def _detector_config(arch: str, backbone: torch.nn.Module, pool: dict, checkpoint: str) -> str:
    settings = dict(ARCHITECTURES[arch])
    init_cfg = dict(type="Pretrained", checkpoint=checkpoint, prefix="backbone.")
    if settings["type"].startswith("SoftPool"):
        cfg = dict(**settings, stem_pool=pool, init_cfg=init_cfg)
    else:
        wrapped = dict(**settings, init_cfg=init_cfg)
        cfg = dict(_delete_=True, type="SoftPoolBackbone", pool=pool, backbone=wrapped)
    model = dict(backbone=cfg, neck=dict(in_channels=_channels(backbone)))
    lines = f"custom_imports = dict(imports=['mmsoftpool'])\nmodel = {_as_call(model)}\n"
    return FormatCode(lines, style_config="facebook")[0]


def _as_call(value) -> str:
    """The source of a config's value, its dicts as ``dict(key=value)``."""
    if not isinstance(value, dict):
        return repr(value)
    return f"dict({', '.join(f'{key}={_as_call(item)}' for key, item in value.items())})"
