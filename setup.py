"""Builds the operator libraries and packages the configs; all else is in pyproject.toml.

Two shared libraries, neither of them a Python extension module: ``libmmsoftpool_cpu.so`` and, where
torch has CUDA and nvcc is found, ``libmmsoftpool_cuda.so``. Both use LibTorch's stable ABI, so one
file serves every Python and every torch from 2.10 on. Built against an older torch they use ATen
instead, work with that version of torch only and have it in their name,
``libmmsoftpool_cpu-torch2.1.so``.
``torch.utils.cpp_extension`` cannot be used: it refuses to compile CUDA for a CPU-only torch, and
before torch 2.3 it cannot be imported with a recent setuptools.

Environment variables: ``CXX`` and ``CXXFLAGS`` (the C++ compiler, ``g++`` or ``ccache g++``, and
additional flags), ``MAX_JOBS`` (the number of compilers at a time, by default one per core),
``CUDA_HOME`` and ``TORCH_CUDA_ARCH_LIST`` (as for any torch extension),
``MMSOFTPOOL_CUDA=0`` (do not build the CUDA library), ``1`` (also for a torch without CUDA) or
``all`` (for every GPU instead of this machine's), ``MMSOFTPOOL_ABI=stable`` or ``aten`` (overrides
the choice by torch version).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

# The oldest torch for the stable ABI and the oldest for ATen.
TORCH_TARGET = (2, 10)
TORCH_OLDEST = (2, 1)
# Programs that run a compiler given as their first argument.
COMPILER_LAUNCHERS = ("ccache", "distcc", "icecc", "sccache")
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    # The code uses neither errno nor traps; without these flags selects are not vectorised.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # Vectors are passed between functions that are always inlined: no ABI is involved.
    "-Wno-psabi",
]


def log(message):
    print(f"mmsoftpool: {message}", file=sys.stderr)


def torch_version():
    """Major and minor version of the torch that is installed, or None."""
    try:
        import torch
    except ImportError:
        return None
    return tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])


def use_aten():
    """Whether the bindings use ATen instead of the stable ABI."""
    choice = os.environ.get("MMSOFTPOOL_ABI")
    if choice not in (None, "", "stable", "aten"):
        raise SystemExit(f"mmsoftpool: MMSOFTPOOL_ABI must be stable or aten, got {choice!r}")
    if choice == "stable" and torch_version() < TORCH_TARGET:
        raise SystemExit(
            "mmsoftpool: MMSOFTPOOL_ABI=stable requires torch 2.10 or later, found "
            + ".".join(map(str, torch_version()))
        )
    return choice == "aten" or (not choice and torch_version() < TORCH_TARGET)


def find_cxx():
    """The C++ compiler as a list of words, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def compiler_only(cxx):
    """The compiler and its flags without a launcher such as ccache, which nvcc's -ccbin refuses."""
    return [word for word in cxx if Path(word).name not in COMPILER_LAUNCHERS]


def number_of_jobs():
    """How many compilers run at a time."""
    jobs = os.environ.get("MAX_JOBS")
    if not jobs:
        return len(os.sched_getaffinity(0))
    if not re.fullmatch(r"[1-9]\d*", jobs):
        raise SystemExit(f"mmsoftpool: MAX_JOBS must be a number of at least 1, got {jobs!r}")
    return int(jobs)


def cuda_choice():
    """MMSOFTPOOL_CUDA: "0", "1" or "all". By default, the CUDA library is for a torch with CUDA."""
    import torch

    choice = os.environ.get("MMSOFTPOOL_CUDA") or ("1" if torch.version.cuda else "0")
    if choice not in ("0", "1", "all"):
        raise SystemExit(f"mmsoftpool: MMSOFTPOOL_CUDA must be 0, 1 or all, got {choice!r}")
    return choice


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    # PATH before the usual folder, as torch has it.
    candidates = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and Path(path).exists()), None)


def gencode_flags(nvcc, every):
    """nvcc's -gencode flags: for every architecture, or for this machine's GPUs (9.0 without).

    The newest architecture is also included as PTX, which later GPUs compile at load time, and for
    every architecture that of 8.0: newer ones below the newest, such as 11.0, have nothing else. A
    GPU newer than nvcc gets the newest PTX that nvcc knows.
    """
    import torch

    known = subprocess.run(
        [nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if given and given != ["native"]:
        wanted = [name.removesuffix("+PTX").removesuffix("a") for name in given]
        if not all(re.fullmatch(r"\d+\.\d", name) for name in wanted):
            raise SystemExit(
                "mmsoftpool: TORCH_CUDA_ARCH_LIST must be native, or numbers such as 8.0;9.0+PTX, "
                f"got {' '.join(given)}"
            )
    elif every:
        wanted = [a for a in CUDA_ARCHITECTURES if "sm_" + a.replace(".", "") in known]
    elif torch.cuda.is_available():
        numbers = [int(code[3:]) for code in known if re.fullmatch(r"sm_\d+", code)]
        wanted = []
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            fitting = [n for n in numbers if n <= 10 * major + minor]
            wanted.append("{}.{}".format(*divmod(max(fitting, default=10 * major + minor), 10)))
    else:
        wanted = ["9.0"]
    numbers = sorted({int(a.replace(".", "")) for a in wanted})
    if not numbers:
        raise SystemExit(
            f"mmsoftpool: no CUDA architecture to compile for: TORCH_CUDA_ARCH_LIST is "
            f"{os.environ.get('TORCH_CUDA_ARCH_LIST')!r}, {nvcc} knows {known}"
        )
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    ptx = sorted({numbers[-1], *({80} & set(numbers) if every else ())})
    return [*flags, *(f"-gencode=arch=compute_{n},code=compute_{n}" for n in ptx)]


class BuildLibraries(build_ext):
    """Compiles each source with one compiler call and links each library with one."""

    def get_ext_filename(self, fullname):
        *package, name = fullname.split(".")
        version = torch_version()  # None while a source distribution is made
        if version and use_aten():
            name += "-torch{}.{}".format(*version)
        return os.path.join(*package, f"lib{name}.so")

    def run(self):
        if torch_version() is None:
            raise SystemExit(
                "mmsoftpool: the build requires torch, which cannot be imported. Install torch, "
                "then run in the checkout: pip install --no-build-isolation ."
            )
        # setuptools clears `inplace` while it builds.
        self.for_this_machine = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        # Libraries of an earlier build must not be mistaken for this one's.
        folders = {library.parent}
        if self.for_this_machine:
            folders.add(Path(__file__).parent / "mmsoftpool")
        for folder in folders:
            for old in folder.glob(f"lib{ext.name.split('.')[-1]}*.so"):
                old.unlink()
        cxx = find_cxx()
        if torch_version() < TORCH_OLDEST:
            return log(
                f"torch {'.'.join(map(str, torch_version()))} is older than 2.1: skipping the "
                "compiled library, SoftPool will run on its slower pure PyTorch reference"
            )
        if cxx is None:
            return log(
                "no C++ compiler found (CXX, c++, g++ or clang++): skipping the compiled library, "
                "SoftPool will run on its slower pure PyTorch reference"
            )
        is_cuda = any(source.endswith(".cu") for source in ext.sources)
        nvcc = find_nvcc()
        if is_cuda and (cuda_choice() == "0" or nvcc is None):
            return log(
                "no nvcc found: skipping the CUDA library"
                if cuda_choice() != "0"
                else "MMSOFTPOOL_CUDA=0: skipping the CUDA library"
                if os.environ.get("MMSOFTPOOL_CUDA")
                else "torch has no CUDA: skipping the CUDA library (MMSOFTPOOL_CUDA=1 builds it)"
            )
        library.parent.mkdir(parents=True, exist_ok=True)
        objects, commands = [], []
        for source in ext.sources:
            object_file = Path(self.build_temp) / ext.name / (source + ".o")
            object_file.parent.mkdir(parents=True, exist_ok=True)
            if source.endswith(".cu"):
                compiler = self.nvcc_command(nvcc, cxx)
            else:
                compiler = cxx + CXX_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
                # at::parallel_for is defined in a header; the stable ABI calls torch's.
                compiler += ["-fopenmp"] if use_aten() else []
            commands.append([*compiler, *self.torch_flags(), "-c", source, "-o", str(object_file)])
            objects.append(str(object_file))
        with ThreadPoolExecutor(number_of_jobs()) as pool:
            list(pool.map(self.call, commands))
        import torch

        # libtorch depends on libtorch_cuda where torch has one, so a CUDA library linked against a
        # CPU-only torch finds its symbols too. --no-as-needed keeps the unused dependency.
        linker = cxx
        if is_cuda:  # nvcc knows where its own runtime is, in every kind of toolkit
            linker = [nvcc, f"-ccbin={compiler_only(cxx)[0]}", "-cudart=static"]
        link = [*linker, "-shared", "-o", str(library), *objects]
        link += ["-Xlinker", "--no-as-needed"]
        link += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch"]
        if use_aten():
            link += ["-lc10"] + (["-lc10_cuda"] if is_cuda and torch.version.cuda else [])
        if not is_cuda:
            link += shlex.split(os.environ.get("CXXFLAGS", ""))
            link += ["-fopenmp"] if use_aten() else []
        self.call(link)

    def torch_flags(self):
        import torch

        if use_aten():
            flags = ["-DMMSOFTPOOL_ATEN", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
            flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        else:
            version = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
            flags = [f"-DTORCH_TARGET_VERSION={version:#018x}", "-DTORCH_STABLE_ONLY"]
        # -isystem: no warnings about torch's headers.
        return [*flags, "-isystem", str(Path(torch.__file__).parent / "include")]

    def nvcc_command(self, nvcc, cxx):
        import torch

        names = compiler_only(cxx)  # nvcc passes the flags of CXX on to it
        host_flags = ["-fPIC", "-fvisibility=hidden", "-Wall", *names[1:]]
        command = [nvcc, "-std=c++17", "-O3", "-DUSE_CUDA", "-cudart=static", f"-ccbin={names[0]}"]
        # numeric_limits in device code.
        command += ["--expt-relaxed-constexpr"]
        command += [f"-Xcompiler={','.join(host_flags)}", f"--threads={number_of_jobs()}"]
        # Where no GPU is, as when an image for containers is built, any may come later.
        elsewhere = not (self.for_this_machine or os.environ.get("MMSOFTPOOL_CUDA"))
        every = cuda_choice() == "all" or (elsewhere and not torch.cuda.is_available())
        return command + gencode_flags(nvcc, every)

    def call(self, command):
        log(shlex.join(command))
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                f"mmsoftpool: {command[0]} failed, see its messages above (pip shows them with "
                "-v). MMSOFTPOOL_CUDA=0 skips the CUDA library, CXX=... sets another compiler."
            )


class ShipConfigs(build_py):
    """Copies the configs and tools into the package, where OpenMMLab's mim looks for them.

    An editable install links to them instead.
    """

    def run(self):
        if not self.editable_mode:  # setuptools packs whatever an earlier build left there
            shutil.rmtree(Path(self.build_lib) / "mmsoftpool", ignore_errors=True)
        super().run()
        root = Path(__file__).parent
        target = (root if self.editable_mode else Path(self.build_lib)) / "mmsoftpool" / ".mim"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in ("configs", "tools", "model-index.yml"):
            if self.editable_mode:
                (target / name).symlink_to(Path("..", "..", name))
            elif (root / name).is_dir():
                shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("*.pyc"))
            else:
                shutil.copy(root / name, target / name)


class Wheel(bdist_wheel):
    """Tags the wheel for its platform and any Python: the libraries do not use Python's ABI."""

    def get_tag(self):
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


def library(name, folder):
    sources = sorted(str(path) for ext in ("cpp", "cu") for path in Path(folder).glob(f"*.{ext}"))
    # optional: a library that was not built (no compiler) is not installed.
    return Extension(f"mmsoftpool.{name}", sources, optional=True) if sources else None


setup(
    ext_modules=[
        lib
        for lib in (library("mmsoftpool_cpu", "csrc/cpu"), library("mmsoftpool_cuda", "csrc/cuda"))
        if lib
    ],
    cmdclass={"build_ext": BuildLibraries, "build_py": ShipConfigs, "bdist_wheel": Wheel},
)
