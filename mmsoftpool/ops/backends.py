"""The compiled libraries: which one serves a device, and why none does.

The CPU's is loaded with the package. The CUDA library is loaded when the first CUDA tensor comes:
until then nothing here touches the driver, so that a process can still be forked.
"""

import ctypes
import inspect
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import reference
from .pooling import Pooling

#: Major and minor version of torch.
TORCH_VERSION = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
_FOLDER = Path(__file__).parents[1]


class Backend(NamedTuple):
    """What runs SoftPool on a device type.

    Attributes:
        path: The compiled library, or None where the reference in plain PyTorch runs.
        abi: ``'stable'`` or ``'ATen'``, the C++ interface that the library is built on, or None.
        reason: Why the reference runs: ``'forced'``, ``'not built'``, ``'other torch'``,
            ``'does not load'`` or ``'cannot run'``; None where a library runs.
        detail: That reason in words, for the user, or an empty string.
    """

    path: Path | None
    abi: str | None
    reason: str | None = None
    detail: str = ""


def find_library(device: str) -> Backend:
    """The compiled library for ``'cpu'`` or ``'cuda'`` that fits this torch, not loaded yet.

    One on the stable ABI fits every torch from 2.10 on, one on ATen the version in its name.
    """
    choice = os.environ.get("MMSOFTPOOL_BACKEND", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(
            f"MMSOFTPOOL_BACKEND is {choice!r}; allowed are 'auto' (the compiled library where "
            "there is one) and 'reference' (pure PyTorch)"
        )
    if choice == "reference":
        return Backend(None, None, "forced", "MMSOFTPOOL_BACKEND=reference")
    stable = _FOLDER / f"libmmsoftpool_{device}.so"
    aten = _FOLDER / "libmmsoftpool_{}-torch{}.{}.so".format(device, *TORCH_VERSION)
    if aten.exists():
        return Backend(aten, "ATen")
    if stable.exists():
        if TORCH_VERSION >= (2, 10):
            return Backend(stable, "stable")
        detail = f"{stable.name} needs torch 2.10, this is {torch.__version__}"
        return Backend(None, None, "other torch", detail)
    others = ", ".join(sorted(path.name for path in _FOLDER.glob(f"{stable.stem}-torch*.so")))
    if others:
        detail = f"{others} is for another torch than this, {torch.__version__}"
        return Backend(None, None, "other torch", detail)
    return Backend(None, None, "not built", f"{stable.name} was not built")


# By device type.
_loaded: dict[str, Backend] = {}
# What CUDA says if a library has no code for the GPU, or the driver is too old for it.
_CANNOT_RUN = re.compile("kernel image|invalid device function|PTX|driver")


def load(device: str | torch.device) -> Backend:
    """What runs SoftPool on a device type; loads its library on the first call, and tries it out
    on this device.

    Where that fails the reference runs, with one warning that names the cause.
    """
    device = torch.device(device)
    if device.type not in _loaded:
        _loaded[device.type] = _load(device)
    return _loaded[device.type]


def _load(device: torch.device) -> Backend:
    backend = find_library(device.type)
    if (path := backend.path) is not None:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            detail = f"{path.name} does not load: {error}"
            backend = Backend(None, None, "does not load", detail)
        else:
            try:
                _try_out(device)
            except RuntimeError as error:
                # Memory may have run out: then the library stays, and the caller's call may fail.
                if _CANNOT_RUN.search(str(error)):
                    _use_reference(device.type)
                    detail = f"{path.name} cannot run: {str(error).splitlines()[0]}"
                    backend = Backend(None, None, "cannot run", detail)
    if backend.reason not in (None, "forced"):
        warnings.warn(
            f"mmsoftpool: no compiled library for {device.type}: {backend.detail}; SoftPool on "
            f"{device.type} runs on the pure PyTorch reference: the same results, but slower and "
            "with more memory. 'mmsoftpool doctor' suggests a fix; MMSOFTPOOL_BACKEND=reference "
            "silences this warning.",
            stacklevel=3,
        )
    return backend


def cpu_capability() -> str | None:
    """The instruction set that the CPU's library uses, None where the reference runs.

    ``'default'``, ``'avx2'`` or ``'avx512'``: the widest of the machine, up to what the environment
    variable ``ATEN_CPU_CAPABILITY`` allows. torch's own kernels obey it too; both read it once.
    """
    path = load("cpu").path
    if path is None:
        return None
    function = ctypes.CDLL(str(path)).mmsoftpool_cpu_capability
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def _try_out(device: torch.device) -> None:
    """Runs both operators on a few numbers; raises RuntimeError where they cannot run."""
    # Not on the current device: that would set up a context which the caller may not want.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # a copy to the host would end the capture of a CUDA graph
        x = torch.zeros(1, 1, 2, 2, device=device)
        pooling = Pooling.check(2, 2)
        with torch.no_grad():
            y = torch.ops.mmsoftpool.soft_pool(x, *pooling)
            torch.ops.mmsoftpool.soft_pool_backward(y, x, *pooling).cpu()


_overrides: list[torch.library.Library] = []
#: For ``Library.impl`` in place of a kernel. Later versions than torch 2.6 have the argument; the
#: earlier ones allow it without.
OVERRIDE = (
    {"allow_override": True}
    if "allow_override" in inspect.signature(torch.library.Library.impl).parameters
    else {}
)


def _use_reference(device: str) -> None:
    """Registers the reference in place of a library's kernels."""
    kernels = torch.library.Library("mmsoftpool", "IMPL")
    for name in reference.OPERATORS:
        kernels.impl(name, getattr(reference, name), device.upper(), **OVERRIDE)
    _overrides.append(kernels)  # the registration ends with the object
