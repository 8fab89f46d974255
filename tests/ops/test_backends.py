"""Which library runs and when it is loaded, and the reference where none does."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmsoftpool
from mmsoftpool.ops import backends, library

from ..common import since

REPORT = (
    "import torch, mmsoftpool; from mmsoftpool.ops import backends; print(backends.load('cpu'));"
    "print(mmsoftpool.soft_pool2d(torch.ones(1, 2, 2), 2).item())"
)
ALONE = """
import sys, torch
for name in ("mmengine", "mmcv", "mmdet"):
    sys.modules[name] = None  # as if it were not installed
"""


def test_the_compiled_library_is_what_runs():
    backend = backends.load("cpu")
    assert re.fullmatch(r"libmmsoftpool_cpu(-torch[\d.]+)?\.so", backend.path.name)
    assert backend.abi == ("ATen" if "-torch" in backend.path.name else "stable")
    assert backend.reason is None


def test_the_reference_can_be_forced(run_script):
    result = run_script("-c", REPORT, MMSOFTPOOL_BACKEND="reference")
    assert "mmsoftpool" not in result.stderr  # no warning: it was asked for
    assert "reason='forced', detail='MMSOFTPOOL_BACKEND=reference')\n1.0" in result.stdout


def test_an_unknown_backend_is_named(run_script):
    result = run_script("-c", REPORT, check=False, MMSOFTPOOL_BACKEND="fast")
    assert "MMSOFTPOOL_BACKEND is 'fast'; allowed are 'auto'" in result.stderr


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_the_library_one_warning_names_the_reason(run_script, tmp_path, content):
    package = tmp_path / "mmsoftpool"
    source = Path(mmsoftpool.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.so", ".mim"))
    if content:
        (package / backends.load("cpu").path.name).write_bytes(content)
    result = run_script("-c", REPORT, cwd=tmp_path)
    reason = "does not load" if content else "not built"
    assert f"reason='{reason}'" in result.stdout and result.stdout.endswith("1.0\n")
    assert re.search(r"no compiled library for cpu: libmmsoftpool_cpu.*so ", result.stderr)
    assert result.stderr.count("runs on the pure PyTorch reference") == 1


# Registers kernels as a library does, which fail with a message; CUDA's if the driver is too old.
BROKEN = """
import torch
from torch.library import Library
kernels = Library("mmsoftpool", "FRAGMENT")
def load_library(path):
    if "libmmsoftpool" not in str(path):  # torchvision has one too
        return
    def fail(*args):
        raise RuntimeError({message!r})
    for name in ("soft_pool", "soft_pool_backward"):
        kernels.impl(name, fail, "CPU")
torch.ops.load_library = load_library
"""


@since(2, 5)  # older ones do not override kernels that, as here, are registered from Python
def test_a_library_that_cannot_run_gives_way_to_the_reference(run_script):
    broken = BROKEN.format(message="no kernel image is available\nmore lines")
    result = run_script("-c", broken + REPORT)
    assert "reason='cannot run'" in result.stdout and result.stdout.endswith("1.0\n")
    assert "libmmsoftpool_cpu.so cannot run: no kernel image is available;" in result.stderr
    assert result.stderr.count("runs on the pure PyTorch reference") == 1


def test_memory_that_runs_out_does_not_turn_the_library_off(run_script):
    broken = BROKEN.format(message="CUDA out of memory. Tried to allocate 2.00 MiB")
    result = run_script("-c", broken + REPORT, check=False)
    assert "libmmsoftpool_cpu" in result.stdout and "reason=None" in result.stdout
    assert "RuntimeError: CUDA out of memory" in result.stderr


def test_the_library_is_tried_out_on_the_tensors_device(monkeypatch):
    devices = []
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(backends, "_try_out", devices.append)
    cuda = backends.Backend(Path("libmmsoftpool_cuda.so"), "stable")
    monkeypatch.setattr(backends, "find_library", lambda device: cuda)
    assert backends.load(torch.device("cuda:1")) == backends.load("cuda") == cuda
    assert devices == [torch.device("cuda:1")]


def test_importing_does_not_touch_the_driver(run_script):
    # A process that has initialised CUDA cannot be forked any more.
    code = (
        ALONE
        + """
def fail(*args):
    raise AssertionError("the driver was asked")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = fail
torch._C._cuda_getDeviceCount = fail
import mmsoftpool
print(mmsoftpool.soft_pool2d(torch.ones(1, 2, 2), 2).item())
"""
    )
    assert run_script("-c", code).stdout == "1.0\n"


def test_the_cuda_library_is_loaded_with_the_first_cuda_tensor(monkeypatch):
    loaded, ran = [], []
    cuda = backends.Backend(Path("libmmsoftpool_cuda.so"), "stable")
    monkeypatch.setattr(backends, "load", lambda device: loaded.append(device) or cuda)
    monkeypatch.setattr(torch.ops.mmsoftpool, "soft_pool", lambda *args: ran.append(args))
    kernel = library._default_kernel("soft_pool")
    assert loaded == []
    tensor = SimpleNamespace(device=torch.device("cuda:1"))
    kernel(tensor)
    assert loaded == [tensor.device] and ran == [(tensor,)]
