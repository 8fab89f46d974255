"""The package builds with and without a C++ compiler, on the stable ABI and on ATen."""

import os
import re
import shutil
import subprocess
import zipfile

import pytest
import torch

from .common import ROOT

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
PIP_WHEEL = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps")


def build_ext(folder):
    """Command line that builds the libraries into ``folder``."""
    return ("setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp")


@pytest.fixture
def build_wheel(run_script, tmp_path):
    def build(**env):
        run_script(*PIP_WHEEL, "-q", "-w", tmp_path, ROOT, PIP_NO_INDEX="1", **env)
        (wheel,) = tmp_path.glob("*.whl")
        return wheel, zipfile.ZipFile(wheel).namelist()

    return build


@pytest.mark.slow
def test_one_wheel_for_every_python(build_wheel, tmp_path):
    wheel, names = build_wheel(TORCH_CUDA_ARCH_LIST="9.0", MMSOFTPOOL_CUDA="1")
    assert (ROOT / "mmsoftpool" / "libmmsoftpool_cpu.so").exists()  # the editable install's
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and "any" not in wheel.name
    assert "mmsoftpool/libmmsoftpool_cpu.so" in names
    assert NVCC is None or "mmsoftpool/libmmsoftpool_cuda.so" in names
    assert {"mmsoftpool/models/resnet.py", "mmsoftpool/py.typed"} <= set(names)
    for path in ("model-index.yml", "configs/retinanet_r50_softpool.py", "tools/train.py"):
        assert f"mmsoftpool/.mim/{path}" in names
    assert not [name for name in names if name.startswith(("tests", "csrc"))]

    # Nothing but torch and the system's own libraries is needed.
    with zipfile.ZipFile(wheel) as files:
        libraries = [files.extract(name, tmp_path) for name in names if ".so" in name]
    for library in libraries:
        header = subprocess.check_output(["readelf", "-d", library], text=True)
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", header))
        own = r"lib(torch\w*|stdc\+\+|gcc_s|gomp|m|c|dl|rt|pthread)\.so.*|ld-linux.*"
        assert not [name for name in needed if not re.fullmatch(own, name)]


def test_only_the_stable_c_functions_of_torch_are_called():
    inspect_extension = pytest.importorskip("torch_abi_audit").inspect_extension  # Python 3.11
    libraries = sorted((ROOT / "mmsoftpool").glob("libmmsoftpool_*.so"))
    assert libraries
    for library in libraries:
        verdict = inspect_extension(library).torch
        assert verdict.stable and not verdict.unknown_shim_symbols, verdict
        assert verdict.min_torch_version == "2.10.0"


def test_a_call_into_torch_that_is_not_stable_would_be_found(tmp_path):
    inspect_extension = pytest.importorskip("torch_abi_audit").inspect_extension
    source = 'namespace c10 { void reset(int); } extern "C" void call() { c10::reset(1); }'
    command = ["c++", "-x", "c++", "-shared", "-fPIC", "-o", tmp_path / "lib.so", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    verdict = inspect_extension(tmp_path / "lib.so").torch
    assert not verdict.stable and verdict.unstable_symbols == ("c10::reset(int)",)


def test_without_a_compiler_it_installs_on_the_reference(build_wheel, tmp_path):
    # A PATH without c++, g++, clang++ and nvcc.
    _, names = build_wheel(PATH=str(tmp_path), CXX="")
    assert "mmsoftpool/ops/reference.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_failing_compiler_fails_the_build(run_script, tmp_path):
    command = (*PIP_WHEEL, "-w", tmp_path, ROOT)
    result = run_script(*command, check=False, CXX="false", PIP_NO_INDEX="1")
    assert result.returncode != 0
    assert "mmsoftpool: false failed" in result.stdout + result.stderr


def test_an_unknown_abi_is_named(run_script, tmp_path):
    result = run_script(*build_ext(tmp_path), check=False, MMSOFTPOOL_ABI="unstable")
    assert "MMSOFTPOOL_ABI must be stable or aten, got 'unstable'" in result.stderr


@pytest.mark.parametrize("jobs", ["0", "many"])
def test_a_wrong_number_of_compilers_is_named(run_script, tmp_path, jobs):
    result = run_script(*build_ext(tmp_path), check=False, MAX_JOBS=jobs)
    assert f"MAX_JOBS must be a number of at least 1, got '{jobs}'" in result.stderr


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_clang_accepts_the_cpu_kernels():
    sources = {*(ROOT / "csrc" / "cpu").glob("*.cpp")} - {ROOT / "csrc" / "cpu" / "binding.cpp"}
    flags = ("-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only")
    subprocess.run(["clang++", *flags, *map(str, sorted(sources))], check=True)


@pytest.mark.slow
def test_on_aten_as_for_older_torch_it_passes_the_operators_tests(run_script, tmp_path):
    run_script(*build_ext(tmp_path), MMSOFTPOOL_ABI="aten", MMSOFTPOOL_CUDA="0", CXXFLAGS="-O1")
    version = ".".join(torch.__version__.split(".")[:2])
    (library,) = (tmp_path / "mmsoftpool").iterdir()
    assert library.name == f"libmmsoftpool_cpu-torch{version}.so"
    no_libraries = shutil.ignore_patterns("*.so")
    for folder in ("mmsoftpool", "tests/ops"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=no_libraries, dirs_exist_ok=True)
    for name in ("__init__.py", "conftest.py", "common.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    code = "from mmsoftpool.ops import backends; print(backends.load('cpu').path)"
    assert run_script("-c", code, cwd=tmp_path).stdout.strip() == str(library)
    tests = (
        "raw_operator or threads or TorchFunc or "
        "(compiled and (TestNotFinite or dtypes or channels_last_is or any_other_strides))"
    )
    out = run_script(
        "-m",
        "pytest",
        "-q",
        "tests/ops/test_functional.py",
        "tests/ops/test_autograd.py",
        "-k",
        tests,
        cwd=tmp_path,
    ).stdout
    assert " passed" in out and "skipped" not in out


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_the_cuda_binding_compiles_on_aten(tmp_path):
    include = os.path.join(os.path.dirname(torch.__file__), "include")
    flags = [
        *("-std=c++17", "-O0", "-DUSE_CUDA", "-DMMSOFTPOOL_ATEN"),
        *("-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "--expt-relaxed-constexpr", "-isystem", include),
        *("-arch=sm_90", "-Xcompiler=-fPIC,-Wall", "-o", str(tmp_path / "binding.o")),
    ]
    result = subprocess.run(
        [NVCC, *flags, "-c", str(ROOT / "csrc/cuda/binding.cu")], capture_output=True, text=True
    )
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr


def test_the_compiler_may_have_a_launcher_and_flags(run_script, tmp_path):
    # Stand-ins for ccache and nvcc: they note their arguments and compile an empty file.
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    empty = 'while [ "$1" != -o ]; do shift; done; exec c++ -fPIC -xc++ -c /dev/null -o "$2"'
    scripts = {
        "ccache": 'case "$*" in *" -c "*) ;; *) exec "$@" ;; esac',
        "nvcc": 'case "$1" in --list*) exit ;; esac',
    }
    for name, code in scripts.items():
        lines = ("#!/bin/sh", f'echo "$@" >> {tmp_path}/{name}', code, empty, "")
        (home / "bin" / name).write_text("\n".join(lines))
        (home / "bin" / name).chmod(0o755)
    run_script(
        *build_ext(tmp_path),
        CXX="ccache c++ -O0 -g0",
        CXXFLAGS="-O0",
        CUDA_HOME=str(home),
        TORCH_CUDA_ARCH_LIST="9.0",
        MMSOFTPOOL_CUDA="1",
        PATH=f"{home / 'bin'}:{os.environ['PATH']}",
    )
    for name, given in (("ccache", "c++ -O0 -g0 "), ("nvcc", "-O0,-g0 ")):
        calls = [x for x in (tmp_path / name).read_text().splitlines() if " -c " in x]
        assert calls and all(given in call for call in calls)
        assert name == "ccache" or (len(calls) == 2 and all("-ccbin=c++ " in x for x in calls))
    assert len(list((tmp_path / "mmsoftpool").glob("*.so"))) == 2
