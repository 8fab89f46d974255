"""Builds the operator libraries; everything else about the package is in pyproject.toml.

Two shared libraries, neither of them a Python extension module: ``libmmsoftpool_cpu.so`` and, where
nvcc is found, ``libmmsoftpool_cuda.so``. Both use LibTorch's stable ABI, so one file serves every
Python and every torch from 2.10 on. ``torch.utils.cpp_extension`` is of no use for that: it refuses
to compile CUDA for a CPU-only torch.

Environment variables: ``CXX`` and ``CXXFLAGS`` (the C++ compiler, more flags), ``CUDA_HOME`` and
``TORCH_CUDA_ARCH_LIST`` (as for any torch extension), ``MMSOFTPOOL_CUDA=0`` (do not build the CUDA
library).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The oldest torch with all of the stable ABI that the bindings use.
TORCH_TARGET = (2, 10)
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    # Nothing reads errno or traps; without these the compiler does not vectorise selects.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # Vectors are passed between functions that are always inlined: no ABI is involved.
    "-Wno-psabi",
]


def say(message):
    print(f"mmsoftpool: {message}", file=sys.stderr)


def find_cxx():
    """The C++ compiler as a list of words, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_nvcc():
    if os.environ.get("MMSOFTPOOL_CUDA") == "0":
        return None
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def gencode_flags(nvcc, every):
    """nvcc's -gencode flags: for every architecture, or for the GPU at hand (9.0 without one).

    The newest architecture is added as PTX, which later GPUs compile when they load it.
    """
    import torch

    known = subprocess.run(
        [nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        wanted = re.findall(r"\d+\.\d", os.environ["TORCH_CUDA_ARCH_LIST"])
    elif every:
        wanted = [a for a in CUDA_ARCHITECTURES if "sm_" + a.replace(".", "") in known]
    elif torch.cuda.is_available():
        wanted = ["{}.{}".format(*torch.cuda.get_device_capability())]
    else:
        wanted = ["9.0"]
    numbers = sorted({int(a.replace(".", "")) for a in wanted})
    if not numbers:
        raise SystemExit(
            f"mmsoftpool: no CUDA architecture to compile for: TORCH_CUDA_ARCH_LIST is "
            f"{os.environ.get('TORCH_CUDA_ARCH_LIST')!r}, {nvcc} knows {known}"
        )
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


class BuildLibraries(build_ext):
    """Compiles each library with one compiler call per source and one to link."""

    def get_ext_filename(self, fullname):
        *package, name = fullname.split(".")
        return os.path.join(*package, f"lib{name}.so")

    def run(self):
        try:
            import torch
        except ImportError:
            raise SystemExit(
                "mmsoftpool: torch cannot be imported while building. Install torch first and "
                "then build against it: pip install --no-build-isolation mmsoftpool"
            ) from None
        self.torch_version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
        super().run()

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        # A library of an earlier build must not be taken for this one's.
        library.unlink(missing_ok=True)
        if self.inplace or self.editable_mode:
            (Path(__file__).parent / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        cxx = find_cxx()
        if self.torch_version < TORCH_TARGET:
            return say(
                f"torch {'.'.join(map(str, self.torch_version))} is older than 2.10: nothing is "
                "compiled, SoftPool will run on its slower pure PyTorch reference"
            )
        if cxx is None:
            return say(
                "no C++ compiler found (CXX, c++, g++ or clang++): nothing is compiled, SoftPool "
                "will run on its slower pure PyTorch reference"
            )
        is_cuda = any(source.endswith(".cu") for source in ext.sources)
        nvcc = find_nvcc()
        if is_cuda and nvcc is None:
            return say("no nvcc found: the CUDA library is not built")
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in ext.sources:
            object_file = Path(self.build_temp) / ext.name / (source + ".o")
            object_file.parent.mkdir(parents=True, exist_ok=True)
            if source.endswith(".cu"):
                compiler = self.nvcc_command(nvcc, cxx)
            else:
                compiler = cxx + CXX_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
            self.call([*compiler, *self.torch_flags(), "-c", source, "-o", str(object_file)])
            objects.append(str(object_file))
        import torch
        from torch.utils.cpp_extension import library_paths

        link = [*cxx, "-shared", "-o", str(library), *objects]
        link += [] if is_cuda else shlex.split(os.environ.get("CXXFLAGS", ""))
        link += [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu"]
        if is_cuda:
            # A CPU-only torch has no libtorch_cuda: its symbols are then looked up at load time.
            link += ["-ltorch_cuda"] if torch.version.cuda else []
            link += [f"-L{Path(nvcc).resolve().parent.parent / 'lib64'}", "-lcudart_static"]
            link += ["-ldl", "-lrt", "-lpthread"]
        self.call(link)

    def torch_flags(self):
        from torch.utils.cpp_extension import include_paths

        version = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
        flags = [f"-DTORCH_TARGET_VERSION={version:#018x}", "-DTORCH_STABLE_ONLY"]
        # -isystem: torch's headers are not warned about.
        return flags + [word for path in include_paths() for word in ("-isystem", path)]

    def nvcc_command(self, nvcc, cxx):
        command = [nvcc, "-std=c++17", "-O3", "-DUSE_CUDA", "-cudart=static", f"-ccbin={cxx[0]}"]
        # numeric_limits in device code.
        command += ["--expt-relaxed-constexpr"]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--threads=0"]
        return command + gencode_flags(nvcc, every=not (self.inplace or self.editable_mode))

    def call(self, command):
        say(shlex.join(command))
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                f"mmsoftpool: {command[0]} failed, see its messages above (pip shows them with "
                "-v). MMSOFTPOOL_CUDA=0 builds without the CUDA library, CXX=... takes another "
                "compiler."
            )


class Wheel(bdist_wheel):
    """Tags the wheel for its platform but for any Python: the libraries do not use Python's ABI."""

    def get_tag(self):
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


def library(name, folder):
    sources = sorted(str(path) for ext in ("cpp", "cu") for path in Path(folder).glob(f"*.{ext}"))
    # optional: a library that was not built (no compiler) is left out of the installation.
    return Extension(f"mmsoftpool.{name}", sources, optional=True) if sources else None


setup(
    ext_modules=[
        lib
        for lib in (library("mmsoftpool_cpu", "csrc/cpu"), library("mmsoftpool_cuda", "csrc/cuda"))
        if lib
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
