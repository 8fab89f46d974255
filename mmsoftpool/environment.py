"""Diagnosis of the environment, with suggested fixes, and a self-test of the operator.

Requires only torch. ``mmsoftpool doctor`` prints it; a bug report should contain its output.
"""

import importlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from . import __version__
from .ops import autograd, backends, reference, soft_pool2d
from .ops.backends import Backend
from .ops.pooling import Pooling

#: OpenMMLab's import packages and their distributions, onedl's and upstream's.
OPENMMLAB = {
    "mmengine": ("onedl-mmengine", "mmengine", "mmengine-lite"),
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-lite"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmpretrain": ("onedl-mmpretrain", "mmpretrain"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
}
_REINSTALL = (
    "reinstall against this torch: "
    "pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir mmsoftpool "
    "(in a checkout '.' instead of mmsoftpool)"
)


class Problem(NamedTuple):
    """A problem of the environment and the suggested fix."""

    what: str
    remedy: str


def installed(path: list[str] | None = None) -> dict[str, metadata.Distribution]:
    """Installed distributions by their normalised names; of the folders in ``path``, if given."""
    found = {}
    for distribution in metadata.distributions(path=sys.path if path is None else path):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        found.setdefault(name, distribution)  # Python imports the first one
    return found


def check_versions(distributions: dict[str, metadata.Distribution]) -> Iterator[Problem]:
    """Checks whether the versions of torch, numpy and OpenMMLab's packages are compatible."""
    versions = {name: distribution.version for name, distribution in distributions.items()}
    present = {}  # import package: its distribution
    for package, names in OPENMMLAB.items():
        names = [name for name in names if name in versions]
        if len(names) > 1:
            yield Problem(
                f"{package} is installed by {len(names)} distributions: {', '.join(names)}",
                f"pip uninstall -y {' '.join(names)}, then install one of them",
            )
        if names:
            present[package] = names[0]
    if present.get("mmcv") == "mmcv-lite":
        yield Problem(
            "mmcv-lite lacks mmcv's compiled operators, which mmdet needs",
            "pip uninstall -y mmcv-lite; pip install onedl-mmcv, or 'mim install mmcv'",
        )
    if len({name.startswith("onedl-") for name in present.values()}) == 2:
        names = ", ".join(f"{name} {versions[name]}" for name in present.values())
        yield Problem(
            f"distributions of upstream and onedl are mixed: {names}",
            "install all from one source: onedl-mmengine onedl-mmcv onedl-mmdetection for a recent "
            "torch, or mmengine mmcv==2.1.0 mmdet==3.3.0 for torch 2.1",
        )
    yield from _check_requirements(distributions, present)

    def release(name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"\d+", versions.get(name, ""))[:2])

    torch_version = f"torch {versions.get('torch')}"
    if () < release("torch") < (2, 1):
        yield Problem(f"{torch_version} is too old", "install torch >= 2.1")
    if release("torch") >= (2, 6) and present.get("mmengine") in ("mmengine", "mmengine-lite"):
        yield Problem(
            f"upstream's mmengine {versions[present['mmengine']]} cannot resume from checkpoints "
            f"with {torch_version}, whose torch.load reads only weights",
            "pip uninstall mmengine mmcv mmdet and install onedl-mmengine, onedl-mmcv and "
            "onedl-mmdetection, or use torch < 2.6",
        )
    if () < release("torch") < (2, 3):
        for name, limit, reason in (
            ("setuptools", 70, "mmengine's Runner fails with it"),
            ("numpy", 2, "it was compiled for numpy 1"),
        ):
            if release(name) >= (limit,):
                yield Problem(
                    f"{torch_version} does not go with {name} {versions[name]}: {reason}",
                    f"pip install '{name}<{limit}'",
                )


def _check_requirements(distributions, present: dict[str, str]) -> Iterator[Problem]:
    """Checks the requirements among OpenMMLab's packages, in extras that pip ignores."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with mmengine
        return
    versions = {name: distributions[name].version for name in present.values()}
    versions |= {package: versions[name] for package, name in present.items()}
    for name in present.values():
        for requirement in map(Requirement, distributions[name].requires or []):
            version, marker = versions.get(requirement.name), requirement.marker
            extras = ("", "mim", "mminstall")
            applies = not marker or any(marker.evaluate({"extra": extra}) for extra in extras)
            fits = version is None or requirement.specifier.contains(version, prereleases=True)
            if applies and not fits:
                needed = f"{requirement.name}{requirement.specifier}"
                yield Problem(
                    f"{name} {versions[name]} needs {needed}, {version} is installed",
                    f"pip install '{needed}'",
                )


def check_libraries(
    backends: dict[str, Backend], has_gpu: bool, cuda_works: bool, cuda_built: bool
) -> Iterator[Problem]:
    """Checks whether the compiled libraries are in use.

    Args:
        backends: The backend of each device type, ``'cuda'`` only if ``cuda_works``.
        has_gpu: Whether the machine has an NVIDIA GPU.
        cuda_works: ``torch.cuda.is_available()``.
        cuda_built: Whether torch was built with CUDA.
    """
    remedies = {
        ("forced", "cpu"): "unset MMSOFTPOOL_BACKEND to use the compiled library",
        ("forced", "cuda"): "unset MMSOFTPOOL_BACKEND to use the compiled library",
        ("not built", "cpu"): "with a C++ compiler (on Debian and Ubuntu: apt-get install g++), "
        + _REINSTALL,
        ("not built", "cuda"): f"with nvcc on PATH or in CUDA_HOME, {_REINSTALL}",
        ("cannot run", "cuda"): "update the NVIDIA driver, or with TORCH_CUDA_ARCH_LIST set to "
        f"this GPU's compute capability, {_REINSTALL}",
    }
    for device, backend in backends.items():
        if backend.path is None:
            remedy = remedies.get((backend.reason, device), _REINSTALL)
            yield Problem(f"SoftPool on {device} is slow: {backend.detail}", remedy)
    if has_gpu and not cuda_built:
        yield Problem(
            "the machine has an NVIDIA GPU, but this torch was built without CUDA",
            "install torch with CUDA: https://pytorch.org/get-started/locally",
        )
    elif has_gpu and not cuda_works:
        yield Problem(
            "the machine has an NVIDIA GPU, but torch cannot use it",
            f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or install a "
            "torch for an older CUDA; see also CUDA_VISIBLE_DEVICES",
        )


def check_derivatives(missing: str | None) -> Iterator[Problem]:
    """Checks for the private names of torch in :data:`mmsoftpool.ops.autograd.MISSING`."""
    if missing is not None:
        yield Problem(
            f"SoftPool has no forward-mode derivative and none under torch.func: {missing}",
            "training is not affected; install a tested version of torch, or report this one",
        )


def check_imports(packages: Iterable[str]) -> Iterator[Problem]:
    """Checks whether OpenMMLab's packages and ``mmsoftpool.registry`` can be imported."""
    remedies = {
        "mmcv.ops": "mmcv has no operators compiled for this torch; build them: "
        "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv"
    }
    imported = {"mmcv": "mmcv.ops", "mmdet": "mmdet.models"}
    modules = [imported.get(package, package) for package in packages]
    for module in [*modules, "mmsoftpool.registry"] if modules else []:
        try:
            importlib.import_module(module)
        except Exception as error:  # AssertionError for versions, OSError for libraries, ...
            text = " ".join(f"{type(error).__name__}: {error}".split())
            remedy = remedies.get(module, f"'python -c \"import {module}\"' shows the traceback")
            yield Problem(f"{module} cannot be imported: {text}", remedy)


def self_test(device: str) -> str:
    """Compares the operator and its gradient with the reference in float64.

    Args:
        device: ``'cpu'`` or ``'cuda'``.

    Returns:
        The largest differences, for printing.

    Raises:
        RuntimeError: If a difference is too large, or the operator fails.
    """
    tolerances = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.2}
    largest = dict.fromkeys(tolerances, 0.0)
    layouts = (torch.contiguous_format, torch.channels_last)
    for pooling, dtype, layout in product(((3, 2, 1), (2, 2), (3, 1, 1)), tolerances, layouts):
        x = torch.randn(2, 8, 17, 20, generator=torch.Generator().manual_seed(0)) * 4
        leaf = x.to(device, dtype).contiguous(memory_format=layout).requires_grad_()
        value = soft_pool2d(leaf, *pooling)
        slope = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (grad,) = torch.autograd.grad(value, leaf, slope.to(device))
        arguments = Pooling.check(2, *pooling)
        truth = x.to(dtype).double()  # the reference gets the rounded input, too
        for result, expected in (
            (value, reference.soft_pool(truth, *arguments)),
            (grad, reference.soft_pool_backward(slope.double(), truth, *arguments)),
        ):
            error = (result.detach().cpu().double() - expected).abs().max().item()
            largest[dtype] = max(largest[dtype], error)
            if not error <= tolerances[dtype]:
                raise RuntimeError(
                    f"differs by {error:.2g} ({dtype}, kernel and stride {pooling}, {layout}; "
                    f"{tolerances[dtype]} is allowed)"
                )
    return ", ".join(f"{str(d).removeprefix('torch.')} {e:.1e}" for d, e in largest.items())


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or torch.cuda.is_available()


def _first_line(*command: str, pattern: str = ".+") -> str:
    """First line of a program's output that matches a pattern."""
    if shutil.which(command[0]) is None:
        return "not on PATH"
    result = subprocess.run(command, capture_output=True, text=True)
    found = re.search(pattern, result.stdout)
    return found[0] if found else "no output"


def _facts(distributions, libraries: dict[str, Backend]) -> Iterator[tuple[str, str]]:
    yield "mmsoftpool", f"{__version__} in {Path(__file__).parent}"
    for device, backend in libraries.items():
        runs = f"{backend.path.name} ({backend.abi} ABI)" if backend.path else "reference"
        if device == "cpu" and backend.path:
            runs += f", {backends.cpu_capability()}"
        yield f"  on {device}", f"{runs}: {backend.detail}" if backend.detail else runs
    if "cuda" not in libraries:
        yield "  on cuda", "reference: torch sees no GPU"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield f"  GPU {index}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory}"
    if not torch.cuda.is_available():
        yield "  GPU", "not usable by torch" if _has_gpu() else "none"
    yield "  c++", _first_line("c++", "--version")
    yield "  nvcc", _first_line("nvcc", "--version", pattern="release .*")
    for package, names in {**OPENMMLAB, "numpy": ("numpy",)}.items():
        found = [f"{distributions[n].version} ({n})" for n in names if n in distributions]
        if found or package not in ("mmpretrain", "mmseg"):
            yield package, " and ".join(found) or "not installed"


def doctor() -> int:
    """Prints the environment, its problems with suggested fixes, and the self-test.

    Returns:
        The exit status: 1 if the self-test fails, else 0.
    """
    distributions = installed()
    cuda_works = torch.cuda.is_available()
    libraries = {d: backends.load(d) for d in (("cpu", "cuda") if cuda_works else ("cpu",))}
    facts = list(_facts(distributions, libraries))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:{width}}  {value}")

    packages = [p for p, names in OPENMMLAB.items() if any(n in distributions for n in names)]
    problems = [
        *check_libraries(libraries, _has_gpu(), cuda_works, bool(torch.version.cuda)),
        *check_derivatives(autograd.MISSING),
        *check_versions(distributions),
        *check_imports(packages),
    ]
    print("\nProblems and suggested fixes:" if problems else "\nNo problems found.")
    for problem in problems:
        print(f"- {problem.what}\n    -> {problem.remedy}")

    print("\nSelf-test, largest difference from float64:")
    status = 0
    for device, backend in libraries.items():
        runs = "compiled" if backend.path else "reference"
        try:
            print(f"  {device:4}  ok, {runs}: {self_test(device)}")
        except RuntimeError as error:
            print(f"  {device:4}  FAILED, {runs}: {error}")
            status = 1
    if not cuda_works:
        print("  cuda  not tested: no GPU is available to torch")
    return status
