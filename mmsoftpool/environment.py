"""Diagnosis of the environment, with suggested fixes, and a self-test of the operator.

Requires only torch. ``mmsoftpool doctor`` prints it; a bug report should contain its output.
"""

import importlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from . import __version__
from .ops import autograd, backends, reference, soft_pool2d
from .ops.backends import Backend
from .ops.pooling import Pooling

#: OpenMMLab's import packages and their distributions, upstream's and onedl's.
OPENMMLAB = {
    "mmengine": ("mmengine", "onedl-mmengine"),
    "mmcv": ("mmcv", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
}
_LITE = {"mmengine-lite": "mmengine", "mmcv-lite": "mmcv"}
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
    """Installed distributions by their normalised names.

    Args:
        path: Folders to search. Defaults to None, ``sys.path``.
    """
    found = {}
    for distribution in metadata.distributions(path=sys.path if path is None else path):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        found.setdefault(name, distribution)  # Python imports the first one
    return found


def check_versions(distributions: dict[str, metadata.Distribution]) -> list[Problem]:
    """Checks whether the versions of torch, numpy and OpenMMLab's packages are compatible."""
    problems = []
    present = {}  # import package: (distribution, version)
    for package, (upstream, onedl) in OPENMMLAB.items():
        lite = [name for name, of in _LITE.items() if of == package]
        names = [name for name in (onedl, upstream, *lite) if name in distributions]
        if len(names) > 1:
            problems.append(
                Problem(
                    f"{package} is installed by {len(names)} distributions: {', '.join(names)}",
                    f"pip uninstall -y {' '.join(names)}, then install one of them",
                )
            )
        if names:
            present[package] = (names[0], distributions[names[0]].version)
    if present.get("mmcv", ("",))[0] == "mmcv-lite":
        problems.append(
            Problem(
                "mmcv-lite lacks mmcv's compiled operators, which mmdet needs",
                "pip uninstall -y mmcv-lite; pip install onedl-mmcv, or 'mim install mmcv'",
            )
        )
    sources = {name.startswith("onedl-") for name, _ in present.values()}
    if len(sources) == 2:
        names = ", ".join(f"{name} {version}" for name, version in present.values())
        problems.append(
            Problem(
                f"distributions of upstream and onedl are mixed: {names}",
                "install all from one source: onedl-mmengine onedl-mmcv onedl-mmdetection for a "
                "recent torch, or mmengine mmcv==2.1.0 mmdet==3.3.0 for torch 2.1",
            )
        )
    problems += _check_requirements(distributions, present)
    torch_version = _release(distributions, "torch")
    if torch_version and torch_version < (2, 1):
        problems.append(
            Problem(f"torch {_version(distributions, 'torch')} is too old", "install torch >= 2.1")
        )
    if torch_version >= (2, 6) and present.get("mmengine", ("",))[0] in (
        "mmengine",
        "mmengine-lite",
    ):
        problems.append(
            Problem(
                f"upstream's mmengine {present['mmengine'][1]} cannot resume from checkpoints with "
                f"torch {_version(distributions, 'torch')}, whose torch.load reads only weights",
                "pip uninstall mmengine mmcv mmdet and install onedl-mmengine, onedl-mmcv and "
                "onedl-mmdetection, or use torch < 2.6",
            )
        )
    if torch_version and torch_version < (2, 3) and _release(distributions, "setuptools") >= (70,):
        problems.append(
            Problem(
                f"mmengine's Runner fails with torch {_version(distributions, 'torch')} and "
                f"setuptools {_version(distributions, 'setuptools')}",
                "pip install 'setuptools<70'",
            )
        )
    if torch_version and torch_version < (2, 3) and _release(distributions, "numpy") >= (2,):
        problems.append(
            Problem(
                f"torch {_version(distributions, 'torch')} was compiled for numpy 1, numpy "
                f"{_version(distributions, 'numpy')} is installed",
                "pip install 'numpy<2'",
            )
        )
    return problems


def _check_requirements(distributions, present) -> list[Problem]:
    """Checks the requirements among OpenMMLab's packages, in extras that pip ignores."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with mmengine
        return []
    problems = []
    versions = dict(present.values())
    versions |= {OPENMMLAB[package][0]: version for package, (_, version) in present.items()}
    for name, _ in present.values():
        for line in distributions[name].requires or []:
            requirement = Requirement(line)
            version = versions.get(requirement.name)
            extras = ("", "mim", "mminstall")
            if version is None or not (
                requirement.marker is None
                or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
            ):
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                problems.append(
                    Problem(
                        f"{name} {distributions[name].version} needs {requirement.name}"
                        f"{requirement.specifier}, {version} is installed",
                        f"pip install '{requirement.name}{requirement.specifier}'",
                    )
                )
    return problems


def _version(distributions, name: str) -> str | None:
    return distributions[name].version if name in distributions else None


def _release(distributions, name: str) -> tuple[int, ...]:
    """(major, minor) of a distribution, () if it is not installed."""
    return tuple(int(n) for n in re.findall(r"\d+", _version(distributions, name) or "")[:2])


def check_libraries(
    backends: dict[str, Backend], has_gpu: bool, cuda_works: bool, cuda_built: bool
) -> list[Problem]:
    """Checks whether the compiled libraries are in use.

    Args:
        backends: The backend of each device type, ``'cuda'`` only if ``cuda_works``.
        has_gpu: Whether the machine has an NVIDIA GPU.
        cuda_works: ``torch.cuda.is_available()``.
        cuda_built: Whether torch was built with CUDA.
    """
    problems = []
    for device in ("cpu", "cuda") if cuda_works else ("cpu",):
        backend = backends[device]
        if backend.path is not None:
            continue
        if backend.reason == "forced":
            remedy = "unset MMSOFTPOOL_BACKEND to use the compiled library"
        elif backend.reason == "not built" and device == "cuda":
            remedy = f"with nvcc on PATH or in CUDA_HOME, {_REINSTALL}"
        elif backend.reason == "not built":
            remedy = (
                f"with a C++ compiler (on Debian and Ubuntu: apt-get install g++), {_REINSTALL}"
            )
        elif backend.reason == "cannot run" and device == "cuda":
            remedy = (
                "update the NVIDIA driver, or with TORCH_CUDA_ARCH_LIST set to this GPU's compute "
                f"capability, {_REINSTALL}"
            )
        else:
            remedy = _REINSTALL
        problems.append(Problem(f"SoftPool on {device} is slow: {backend.detail}", remedy))
    if has_gpu and not cuda_built:
        problems.append(
            Problem(
                "the machine has an NVIDIA GPU, but this torch was built without CUDA",
                "install torch with CUDA: https://pytorch.org/get-started/locally",
            )
        )
    elif has_gpu and not cuda_works:
        problems.append(
            Problem(
                "the machine has an NVIDIA GPU, but torch cannot use it",
                f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or install a "
                "torch for an older CUDA; see also CUDA_VISIBLE_DEVICES",
            )
        )
    return problems


def check_derivatives(missing: str | None) -> list[Problem]:
    """Checks whether torch has the private names that the operator's derivatives use.

    Args:
        missing: ``mmsoftpool.ops.autograd.MISSING``.
    """
    if missing is None:
        return []
    return [
        Problem(
            f"SoftPool has no forward-mode derivative and none under torch.func: {missing}",
            "training is not affected; install a tested version of torch, or report this one",
        )
    ]


def check_imports(packages: Iterable[str]) -> list[Problem]:
    """Checks whether OpenMMLab's packages and ``mmsoftpool.registry`` can be imported."""
    remedies = {
        "mmcv.ops": "mmcv has no operators compiled for this torch; build them: "
        "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv"
    }
    imported = {"mmcv": "mmcv.ops", "mmdet": "mmdet.models"}
    modules = [imported.get(package, package) for package in packages]
    problems = []
    for module in [*modules, *(["mmsoftpool.registry"] if modules else [])]:
        try:
            importlib.import_module(module)
        except Exception as error:  # AssertionError for versions, OSError for libraries, ...
            text = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(
                Problem(
                    f"{module} cannot be imported: {text}",
                    remedies.get(module, f"'python -c \"import {module}\"' shows the traceback"),
                )
            )
    return problems


def self_test(device: str) -> str:
    """Compares the operator and its gradient with the reference in float64.

    Args:
        device: ``'cpu'`` or ``'cuda'``.

    Returns:
        The largest differences, for printing.

    Raises:
        RuntimeError: If a difference is too large, or the operator fails.
    """
    largest = {}
    for pooling in ((3, 2, 1), (2, 2), (3, 1, 1)):
        arguments = Pooling.check(2, *pooling)
        x = torch.randn(2, 8, 17, 20, generator=torch.Generator().manual_seed(0)).double() * 4
        y = reference.soft_pool(x, *arguments)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
        for dtype, tolerance in (
            (torch.float32, 1e-5),
            (torch.float16, 2e-2),
            (torch.bfloat16, 0.2),
        ):
            # The operator sees the rounded input, so the reference gets it too.
            rounded, slope = x.to(dtype).double(), g.to(dtype).double()
            truth = (
                reference.soft_pool(rounded, *arguments),
                reference.soft_pool_backward(slope, rounded, *arguments),
            )
            for layout in (torch.contiguous_format, torch.channels_last):
                leaf = x.to(device, dtype).contiguous(memory_format=layout).requires_grad_()
                value = soft_pool2d(leaf, *pooling)
                (grad,) = torch.autograd.grad(value, leaf, g.to(value))
                for result, expected in zip((value, grad), truth, strict=True):
                    error = (result.detach().cpu().double() - expected).abs().max().item()
                    if not error <= tolerance:
                        name = f"{dtype}, kernel and stride {pooling}, {layout}"
                        raise RuntimeError(
                            f"differs by {error:.2g} ({name}; {tolerance} is allowed)"
                        )
                    largest[dtype] = max(largest.get(dtype, 0.0), error)
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


def _facts(distributions, libraries: dict[str, Backend]) -> list[tuple[str, str]]:
    facts = [("mmsoftpool", f"{__version__} in {Path(__file__).parent}")]
    for device, backend in libraries.items():
        runs = f"{backend.path.name} ({backend.abi} ABI)" if backend.path else "reference"
        if device == "cpu" and backend.path:
            runs += f", {backends.cpu_capability()}"
        facts.append((f"  on {device}", f"{runs}: {backend.detail}" if backend.detail else runs))
    if "cuda" not in libraries:
        facts.append(("  on cuda", "reference: torch sees no GPU"))
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    facts += [
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            capability = f"capability {gpu.major}.{gpu.minor}"
            facts.append((f"  GPU {index}", f"{gpu.name}, {capability}, {memory}"))
    else:
        facts.append(("  GPU", "not usable by torch" if _has_gpu() else "none"))
    facts.append(("  c++", _first_line("c++", "--version")))
    facts.append(("  nvcc", _first_line("nvcc", "--version", pattern="release .*")))
    for package, names in OPENMMLAB.items():
        versions = [
            f"{distributions[name].version} ({name})"
            for name in (*names, *(n for n, of in _LITE.items() if of == package))
            if name in distributions
        ]
        if versions or package in ("mmengine", "mmcv", "mmdet"):
            facts.append((package, " and ".join(versions) or "not installed"))
    facts += [(name, _version(distributions, name) or "not installed") for name in ("numpy",)]
    return facts


def doctor() -> int:
    """Prints the environment, its problems with suggested fixes, and the self-test.

    Returns:
        The exit status: 1 if the self-test fails, else 0.
    """
    distributions = installed()
    cuda_works = torch.cuda.is_available()
    libraries = {d: backends.load(d) for d in (("cpu", "cuda") if cuda_works else ("cpu",))}
    facts = _facts(distributions, libraries)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:{width}}  {value}")

    problems = check_libraries(libraries, _has_gpu(), cuda_works, bool(torch.version.cuda))
    problems += check_derivatives(autograd.MISSING)
    problems += check_versions(distributions)
    problems += check_imports(
        package for package, names in OPENMMLAB.items() if any(n in distributions for n in names)
    )
    print()
    print("Problems and suggested fixes:" if problems else "No problems found.")
    for problem in problems:
        print(f"- {problem.what}")
        print(f"    -> {problem.remedy}")

    print()
    print("Self-test, largest difference from float64:")
    status = 0
    for device in ("cpu", "cuda"):
        if device == "cuda" and not cuda_works:
            print("  cuda  not tested: no GPU is available to torch")
            continue
        runs = "compiled" if libraries[device].path else "reference"
        try:
            print(f"  {device:4}  ok, {runs}: {self_test(device)}")
        except RuntimeError as error:
            print(f"  {device:4}  FAILED, {runs}: {error}")
            status = 1
    return status
