"""The CUDA library as the compiler sees it; no GPU is needed."""

import re
import runpy
import shutil
import subprocess

import pytest
import setuptools
import torch

import roofline

from ..benchmarks.test_roofline import BUDGET, by_case, is_within_budget
from ..common import ROOT

CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@pytest.fixture
def build(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MMSOFTPOOL_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def toolkit(tmp_path):
    """Makes a toolkit in a folder: an nvcc that knows some architectures."""

    def make(name, codes="sm_75 sm_80 sm_90 sm_100 sm_120"):
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {codes}\n")
        nvcc.chmod(0o755)
        return str(nvcc)

    return make


@pytest.mark.parametrize(
    ("gpu", "code"), [((9, 0), 90), ((8, 6), 80), ((12, 1), 120), ((13, 0), 120)]
)
def test_a_gpu_that_nvcc_does_not_know_gets_ptx(build, toolkit, monkeypatch, gpu, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpu)
    flags = build["gencode_flags"](toolkit("cuda"), every=False)
    arch = f"-gencode=arch=compute_{code},code="
    assert flags == [f"{arch}sm_{code}", f"{arch}compute_{code}"]


def codes(flags: list[str]) -> list[str]:
    return [flag.rpartition("code=")[2] for flag in flags]


def test_every_gpu_of_the_machine_has_code(build, toolkit, monkeypatch):
    gpus = [(9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    flags = build["gencode_flags"](toolkit("cuda"), every=False)
    assert codes(flags) == ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert build["gencode_flags"](toolkit("other"), every=False) == flags


def test_architectures_are_numbers(build, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    flags = build["gencode_flags"](toolkit("cuda"), every=False)
    assert codes(flags) == ["sm_80", "sm_90", "sm_120", "compute_120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere;9.0")
    with pytest.raises(SystemExit, match=r"must be native, or numbers such as .* got Ampere 9.0"):
        build["gencode_flags"](toolkit("other"), every=False)


def test_every_architecture_between_the_oldest_and_the_newest_has_code(build, toolkit):
    flags = build["gencode_flags"](toolkit("cuda"), every=True)
    assert [f for f in flags if "code=compute_" in f] == [
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert len([f for f in flags if "code=sm_" in f]) == 5


def test_nvcc_is_that_of_cuda_home_then_of_path(build, toolkit, monkeypatch):
    one, other = toolkit("one"), toolkit("other")
    monkeypatch.setenv("PATH", other.removesuffix("/nvcc"))
    monkeypatch.setattr(build["Path"], "exists", lambda path: True)  # /usr/local/cuda as well
    assert build["find_nvcc"]() == other
    monkeypatch.setenv("CUDA_HOME", one.removesuffix("/bin/nvcc"))
    assert build["find_nvcc"]() == one


@pytest.mark.parametrize(("cuda", "choice"), [(None, "0"), ("13.0", "1")])
def test_the_library_is_for_a_torch_with_cuda_or_on_demand(build, monkeypatch, cuda, choice):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert build["cuda_choice"]() == choice
    for wanted in ("0", "1", "all"):
        monkeypatch.setenv("MMSOFTPOOL_CUDA", wanted)
        assert build["cuda_choice"]() == wanted
    monkeypatch.setenv("MMSOFTPOOL_CUDA", "yes")
    with pytest.raises(SystemExit, match="MMSOFTPOOL_CUDA must be 0, 1 or all, got 'yes'"):
        build["cuda_choice"]()


@needs_nvcc
def test_the_library_was_built():
    assert (ROOT / "mmsoftpool" / "libmmsoftpool_cuda.so").exists()


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["7.5", "8.0", "9.0", "10.0", "12.0"])
def test_kernels_compile_without_warnings_or_spills_and_within_their_budgets(tmp_path, arch):
    number = arch.replace(".", "")
    flags = [
        *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-Wextra"),
        *("-Xptxas=-v", f"-gencode=arch=compute_{number},code=sm_{number}"),
    ]
    result = subprocess.run(
        [NVCC, *flags, "-cubin", str(CSRC / "cuda/soft_pool.cu"), "-o", str(tmp_path / "x.cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    report = result.stdout + result.stderr
    assert "warning" not in report
    resources = re.findall(
        r"Function properties for (\S+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    strips = [entry for entry in resources if "5Strip" in entry[0]]
    # Forward and backward, three poolings, three dtypes; channels last, packed, not packed.
    assert len(strips) == 2 * 3 * 3 * 3
    # Three dtypes, packs or not, six windows; a backward of two kernels but for 3 x 3.
    rings = [entry for entry in resources if "4Ring" in entry[0]]
    assert len(rings) == 3 * 2 * (3 * 6 - 1)
    assert [entry for entry in strips + rings if entry[1:] != ("0", "0")] == []
    try:
        rows = by_case(roofline.disassemble(tmp_path / "x.cubin", arch), arch)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert [case for case in BUDGET if not is_within_budget(rows[case], case)] == []
