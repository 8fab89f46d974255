"""The CUDA library as the compiler sees it; needs nvcc, not a GPU."""

import re
import shutil
import subprocess

import pytest

from ..common import ROOT

CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


def test_the_library_was_built():
    assert (ROOT / "mmsoftpool" / "libmmsoftpool_cuda.so").exists()


def test_kernels_compile_without_warnings_and_fast_paths_without_spills(tmp_path):
    flags = [
        *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-Wextra"),
        *("-Xptxas=-v", "-gencode=arch=compute_90,code=sm_90"),
    ]
    result = subprocess.run(
        [NVCC, *flags, "-c", str(CSRC / "cuda/soft_pool.cu"), "-o", str(tmp_path / "soft_pool.o")],
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
    strips = [entry for entry in resources if "strip_kernel" in entry[0]]
    # Forward and backward, four poolings, three dtypes; channels last, packed, not packed.
    assert len(strips) == 2 * 4 * 3 * 3
    assert [entry for entry in strips if entry[1:] != ("0", "0")] == []
