"""Helpers of several test modules. Require only torch and pytest."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
#: The command lines: what every user has, and what a checkout has.
SCRIPTS = sorted(
    path
    for folder in ("tools", "benchmarks", "paper")
    for path in (ROOT / folder).glob("*.py")
    # Modules of the others; the command mmsoftpool by another name.
    if path.stem not in ("pooling_methods", "roofline", "tables", "train", "test")
)
#: Real photos and annotations, beside the checkout; tests that use them skip where it is absent.
SHARED = ROOT.parent / "shared"
#: The detectors of Table 8 of the paper.
TABLE_8 = [
    *(f"retinanet_r{d}" for d in (18, 34, 50, 101)),
    *(f"mask_rcnn_r{d}" for d in (34, 50, 101)),
]

#: The networks of Tables 2, 5 and 6 of the paper, with their millions of parameters in Table 2.
CLASSIFIERS = {
    "resnet18": 11.7,
    "resnet34": 21.8,
    "resnet50": 25.6,
    "resnet101": 44.5,
    "resnet152": 60.2,
    "densenet121": 8.0,
    "densenet161": 28.7,
    "densenet169": 14.1,
    "resnext50_32x4d": 25.0,
    "resnext101_32x8d": 88.8,
    "wide_resnet50_2": 68.9,
    "inception_v1": None,
    "inception_v3": None,
}

#: `make fuzz` makes random tests that many times as long, and random each time.
LONGER = int(os.environ.get("MMSOFTPOOL_FUZZ", 1))
#: Options of a run that also keeps its best checkpoint.
BEST = {"default_hooks.checkpoint.save_best": "AP", "default_hooks.checkpoint.rule": "greater"}

#: Options that shrink a detector, with its real pipeline, until a CPU trains it in seconds.
SMALL = {
    "model.backbone.init_cfg": None,
    "train_cfg.max_epochs": 1,
    "default_hooks.logger.interval": 1,
    "model.data_preprocessor.pad_size_divisor": 32,
    **{f"{split}_dataloader.num_workers": 0 for split in ("train", "val", "test")},
    **{f"{split}_dataloader.persistent_workers": False for split in ("train", "val", "test")},
    **{f"{split}_dataloader.dataset.indices": 4 for split in ("train", "val", "test")},
    "train_dataloader.dataset.pipeline.2.scale": (192, 128),
    "val_dataloader.dataset.pipeline.1.scale": (192, 128),
    "test_dataloader.dataset.pipeline.1.scale": (192, 128),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, the same on every call with the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers from 0 to 1, the same on every call with the same arguments."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def quick_and_slow(names, *quick: str) -> list:
    """Parameters of a long test: `make test` runs the quick ones, `make test-slow` the others."""
    assert set(quick) <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def since(*version: int):
    """Marks a test of what torch has from a version on."""
    current = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    return pytest.mark.skipif(
        version > current, reason="torch {}.{} and later have this".format(*version)
    )


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a Markdown page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def config_path(name: str) -> str:
    """The path of one of the project's configs."""
    (path,) = (ROOT / "configs").rglob(f"{name}.py")
    return str(path)


#: OpenVINO's CPU plugin gives the thread that compiles a model another stack for signals, and frees
#: it while in use if models are released in the order in which they were made: the next signal with
#: a handler, SIGCHLD after a DataLoader, ends the process (seen with 2026.4). So not pytest's.
_openvino = ThreadPoolExecutor(1, "openvino")


def in_openvino_thread(function, *args, **kwargs):
    """Calls a function that compiles models with OpenVINO, and returns its result."""
    return _openvino.submit(function, *args, **kwargs).result()


def load_tool(path: Path) -> ModuleType:
    """Imports a script as a module."""
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def execute(*args, cwd=ROOT, check=True, **env) -> subprocess.CompletedProcess:
    """Runs Python with arguments in a fresh process, and fails the test if that fails."""
    result = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    if check and result.returncode != 0:
        pytest.fail(f"{args} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result
