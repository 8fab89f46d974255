"""The authors' ImageNet checkpoints, as weights that a detector starts from.

Theirs is the format of PyTorch's ImageNet example: a dict with ``epoch``, ``arch``, ``state_dict``,
``best_acc1`` and ``optimizer``, written from ``nn.DataParallel``, so that every key starts with
``module.``; torchvision's names follow. What is written here is the format of mmpretrain, with keys
``backbone.`` and ``head.fc.``, as pre-training with this project's configs gives it.
"""

import hashlib
import importlib.util
import json
import os
import pickle
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from mmengine.registry import MODELS

#: Where the authors' operator has its 2x2 windows along an axis, by the time of training.
#:
#: Until April 2022 it padded one element on each side, without weight, and dropped what did not
#: fit, so that window p has the inputs [2p-1, 2p]; since then it is [2p, 2p+1].
WINDOWS = {
    "shifted": dict(type="SoftPool2d", kernel_size=2, stride=2, padding=((1, 0), (1, 0))),
    "aligned": dict(type="SoftPool2d", kernel_size=2, stride=2),
}

_RESNEXT = dict(type="SoftPoolResNeXt", groups=32)
#: The authors' architectures, each as a backbone.
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
# torchvision's names, and those here.
_RENAMED = {
    "features.": "backbone.timm_model.features_",
    "classifier.": "head.fc.",
    "fc.": "head.fc.",
    "": "backbone.",
}


def convert_checkpoint(
    source: str, target: str, arch: str | None = None, windows: str = "shifted", trust: bool = False
) -> str:
    """Writes a checkpoint of the authors as weights for this project's configs.

    Args:
        source: Their file.
        target: The file to write: ``meta``, with where it comes from, and ``state_dict``.
        arch: The architecture, one of :data:`ARCHITECTURES`. Defaults to None, what the file says.
        windows: What the weights were trained with, one of :data:`WINDOWS`. Defaults to
            ``'shifted'``, until April 2022, which is before the authors published their weights.
        trust: Whether to run code that the file may contain. Defaults to False.

    Returns:
        The lines of a detector's config that start it from ``target``.

    Raises:
        ValueError: If the file is missing, damaged or another thing than such a checkpoint, or an
            argument does not fit. Nothing is written then.
    """
    if windows not in WINDOWS:
        raise ValueError(f"windows must be one of {', '.join(WINDOWS)}, got {windows!r}")
    if Path(target).is_dir() or not Path(target).absolute().parent.is_dir():
        raise ValueError(f"{target} cannot be written: it must be a file in an existing folder")
    if Path(target).exists() and Path(source).exists() and os.path.samefile(source, target):
        raise ValueError(f"{target} is the file to read; give another one to write")
    checkpoint = _load(source, trust)
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        keys = (
            ", ".join(sorted(map(str, checkpoint))[:5]) if isinstance(checkpoint, Mapping) else ""
        )
        raise ValueError(
            f"{source} is no checkpoint of the authors' format: it holds "
            f"{f'the keys {keys}' if keys else f'a {type(checkpoint).__name__}'} and no weights by "
            "name in state_dict"
        )
    found = checkpoint.get("arch")
    if arch is not None and found is not None and arch != found:
        raise ValueError(f"{source} says that its architecture is {found}, not {arch}")
    arch = arch or found
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ValueError(
            f"{source} says nothing known of its architecture (arch={found!r}); name it with "
            f"--arch, one of {', '.join(ARCHITECTURES)}"
        )
    state_dict = {_rename(key.removeprefix("module.")): value for key, value in weights.items()}
    backbone = _build(arch)
    _check(source, arch, state_dict, backbone)

    epoch, accuracy = checkpoint.get("epoch"), checkpoint.get("best_acc1")
    if isinstance(accuracy, torch.Tensor) and accuracy.numel() == 1:
        accuracy = accuracy.item()
    meta = dict(
        source=Path(source).name,
        source_sha256=hashlib.sha256(Path(source).read_bytes()).hexdigest(),
        arch=arch,
        epoch=epoch if isinstance(epoch, int) else None,
        best_acc1=accuracy if isinstance(accuracy, (int, float)) else None,
        windows=windows,
        converted_by=f"mmsoftpool {version('mmsoftpool')}",
    )
    state_dict = {key: value.detach().cpu().clone() for key, value in state_dict.items()}
    unfinished = f"{target}.part"
    try:
        torch.save(dict(meta=meta, state_dict=state_dict), unfinished)
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return _detector_config(arch, backbone, WINDOWS[windows], target)


def _load(path: str, trust: bool):
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {Path(path).absolute()}")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # torch.load raises whatever the damage leads to
        reason = " ".join(str(error).split())
        code = re.search(r"unsupported (?:(?:global|class):? )+(\S+)", reason, re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and code:
            raise ValueError(
                f"{path} holds more than weights: {code[1]}, which is code. --trust runs it; only "
                "for a file from people that you trust"
            ) from error
        reason = reason.split(". ")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint of PyTorch: {reason}") from error


def _rename(key: str) -> str:
    old = next(prefix for prefix in _RENAMED if key.startswith(prefix))
    return _RENAMED[old] + key[len(old) :]


def _build(arch: str) -> torch.nn.Module:
    """The backbone of an architecture."""
    cfg = ARCHITECTURES[arch]
    if cfg["type"].startswith("mmpretrain."):
        for package in ("mmpretrain", "timm"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{arch} needs {package}: pip install 'mmsoftpool[pretrain]'")
        return MODELS.build(cfg)
    return MODELS.build({**cfg, "type": f"mmdet.{cfg['type']}"})


def _check(source: str, arch: str, state_dict: dict, backbone: torch.nn.Module) -> None:
    """Checks that a file has exactly the keys and shapes of an architecture, and finite values."""
    expected = {f"backbone.{key}": value.shape for key, value in backbone.state_dict().items()}
    head = getattr(state_dict.get("head.fc.weight"), "shape", (1000,))
    features = _channels(backbone)[-1]
    expected["head.fc.weight"] = torch.Size((head[0], features))
    expected["head.fc.bias"] = torch.Size(head[:1])
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    wrong = {
        "keys are missing": [key for key in expected if key not in shapes],
        "keys do not belong to it": [key for key in shapes if key not in expected],
        "shapes differ": [
            f"{key} {shapes[key]}, not {tuple(shape)}"
            for key, shape in expected.items()
            if key in shapes and shapes[key] != tuple(shape)
        ],
        "are not finite": [
            key
            for key, value in state_dict.items()
            if not isinstance(value, torch.Tensor) or not value.isfinite().all()
        ],
    }
    problems = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in wrong.items()
        if keys
    ]
    if problems:
        raise ValueError(f"{source} does not fit {arch}: {'; '.join(problems)}")


def _channels(backbone: torch.nn.Module) -> list[int]:
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
    return f'custom_imports = dict(imports=["mmsoftpool"])\nmodel = {_python(model)}\n'


def _python(value, indent: str = "") -> str:
    """A config as one writes it; short dicts on one line."""
    if isinstance(value, str):
        return json.dumps(value)  # in double quotes
    if not isinstance(value, dict):
        return repr(value)
    inner = indent + "    "
    items = [f"{key}={_python(item, inner)}" for key, item in value.items()]
    line = f"dict({', '.join(items)})"
    if len(indent + line) < 80 and "\n" not in line:
        return line
    return "dict(\n" + "".join(f"{inner}{item},\n" for item in items) + indent + ")"
