"""The PTX of the CUDA kernels, run on the CPU with the launch code as it is; needs nvcc, no GPU.

``ptx/`` translates what nvcc makes of csrc/cuda to C++, instruction by instruction, and checks
every access: bounds, alignment, reads of what was never written, and threads that read or write
what another one has written. By default some of the float32 kernels for 8.0; ``make test-ptx``
sets MMSOFTPOOL_PTX to architectures, and all kernels run for them.
"""

import ctypes
import math
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mmsoftpool.ops.pooling import Pooling

from ..common import ROOT, randn
from .ptx.translate import translate
from .test_cuda_on_host import ALL_DTYPES, check, check_rings, run_on_host

FOLDER = Path(__file__).with_name("ptx")
CSRC = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CXX = shutil.which("g++")
ARCHITECTURES = os.environ.get("MMSOFTPOOL_PTX", "").split()
DTYPES = ALL_DTYPES if ARCHITECTURES else [torch.float32]
pytestmark = pytest.mark.skipif(NVCC is None or CXX is None, reason="needs nvcc and g++")


def build(folder, arch, every, change=lambda source: source):
    """Compiles the kernels, translates them and links them with the launch code.

    ``change`` makes another kernel of the source of ring.h, for the tests of the checks.
    """
    source = (CSRC / "soft_pool.cu").read_text()
    # A backward of two steps does so many outputs at once: here in several parts.
    assert source.count("outputs = 1 << 21") == 1
    source = source.replace("outputs = 1 << 21", "outputs = 1 << 9")
    ring = change((CSRC / "ring.h").read_text())
    if not every:
        source = re.sub(r"MMSOFTPOOL_INSTANTIATE\((double|__half|__nv_bfloat16)\)", "", source)
        ring = re.sub(
            r" \|\|\s+run_if_it_fits\(std::integral_constant<int, (7|9|11|13)>\(\)\)", "", ring
        )
    (folder / "soft_pool.cu").write_text(source)
    (folder / "ring.h").write_text(ring.replace('#include "pack.h"', f'#include "{CSRC}/pack.h"'))
    number = arch.replace(".", "")
    nvcc = [NVCC, "-std=c++17", "-O3", "-cudart=static", "--expt-relaxed-constexpr", "-w"]
    nvcc += [f"-gencode=arch=compute_{number},code=compute_{number}", "-Xcompiler=-fPIC"]
    nvcc += ["--keep", f"--keep-dir={folder}", f"-I{folder}", f"-I{CSRC}"]
    nvcc += [] if every else ["-DMMSOFTPOOL_FLOAT_ALONE"]
    driver = folder / "driver.o"
    subprocess.run([*nvcc, "-c", FOLDER / "driver.cu", "-o", driver], check=True, cwd=folder)
    sources = translate((folder / "driver.ptx").read_text(), folder, 8 if every else 2)
    sources.append(FOLDER / "machine.cpp")

    def compile_source(path):
        flags = ["-std=c++17", "-O1", "-fPIC", "-mfma", "-mf16c", "-ffp-contract=off", "-w"]
        flags += [f"-I{FOLDER}", "-fno-strict-aliasing"]
        made = folder / f"{path.stem}.o"
        subprocess.run([CXX, *flags, "-c", path, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2 if every else 1) as pool:
        objects = list(pool.map(compile_source, sources))
    library = folder / "kernels.so"
    # The driver registers its kernels when it is loaded: the machine has to be there.
    link = [CXX, "-shared", "-Wl,-Bsymbolic", "-o", library, *objects, driver]
    subprocess.run(link, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.take_faults.restype = loaded.get_last_kernel.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module", params=ARCHITECTURES or ["8.0"])
def library(request, tmp_path_factory):
    library = build(tmp_path_factory.mktemp("ptx"), request.param, bool(ARCHITECTURES))
    yield library
    assert library.take_faults() == b""


def no_faults(library):
    assert library.take_faults().decode() == ""


STEMS = [(2, 2), (3, 2, 1), (3, 2), (3, 1, 1), (3, 2, 1, 1, True)]
LARGE = [(5, 1, 2), (5, 1, ((2, 1), (2, 2)))] + [(k, 1, k // 2) for k in (7, 9, 11, 13)] * bool(
    ARCHITECTURES
)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", [*STEMS, (3, 3), (4, 1, 2), (5, 2, 2, 2, True)])
def test_values_and_accesses(library, pooling, dtype, layout, gradient):
    for size in ((8, 16), (9, 13), (5, 40), (12, 11)):
        x = randn(2, 8, *size)
        x[0, 0, 1, 1], x[1, 2, 1, 2], x[1, 3, 3, 3] = math.nan, -math.inf, math.inf
        x = x.to(dtype).contiguous(memory_format=layout)
        for descending in (False, True):
            library.set_rounding(0, descending)
            check(library, x, pooling, gradient=gradient)
            no_faults(library)


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
@pytest.mark.parametrize("pooling", LARGE)
def test_large_windows(library, pooling, dtype, layout, gradient):
    for size, alpha in (((20, 20), 1.0), ((17, 30), 4.0), ((31, 12), 0.1)):
        x = randn(2, 5, *size) * 3
        x[0, 0, 1, 1], x[1, 2, 1, 2], x[1, 3, 3, 3] = math.nan, -math.inf, math.inf
        x[0, 4, :8] -= 300
        x = x.to(dtype).contiguous(memory_format=layout)
        library.set_rounding(0, False)
        check_rings(library, x, pooling, gradient=gradient, alpha=alpha)
        no_faults(library)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("pooling", [*STEMS, LARGE[0]])
def test_approximations_may_be_as_wrong_as_documented(library, pooling, seed):
    library.set_rounding(seed, False)
    for layout in LAYOUTS:
        x = randn(1, 4, 16, 20).contiguous(memory_format=layout)
        (check if pooling[0] < 5 else check_rings)(library, x, pooling)
        no_faults(library)


@pytest.mark.parametrize("pooling", [*STEMS, LARGE[0]])
def test_tensors_that_are_not_aligned(library, pooling):
    library.set_rounding(0, False)
    for shift in (1, 2, 4):
        check(library, randn(2, 3, 15, 16), pooling, shift=shift)
        no_faults(library)


# Each was refused by every GPU: the static bytes of shared memory count, too.
@pytest.mark.parametrize(
    ("size", "pooling", "dtype", "layout"),
    [
        ((1, 1, 30, 96), (4, 1, 2), torch.float32, LAYOUTS[0]),
        ((1, 1, 12, 115), (4, 1, 2), torch.float64, LAYOUTS[0]),
        ((1, 8, 28, 28), (6, 1, 3), torch.float64, LAYOUTS[1]),
        ((1, 1, 120, 120), (9, 1, 4), torch.float32, LAYOUTS[0]),
    ],
)
def test_ordinary_maps_that_were_refused(library, size, pooling, dtype, layout):
    if dtype not in DTYPES:
        pytest.skip("make test-ptx has this type")
    library.set_rounding(0, False)
    x = randn(*size).to(dtype).contiguous(memory_format=layout)
    y = torch.ops.mmsoftpool.soft_pool(x.double(), *Pooling.check(2, *pooling))
    value, _, _ = run_on_host(library, x, Pooling.check(2, *pooling), torch.ones_like(y).to(x))
    torch.testing.assert_close(value.double(), y, rtol=1e-6, atol=2e-6)
    no_faults(library)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        # The columns right of a row; the columns of the output; the rows of a thread.
        ("(has(cols), from + cols", "(true, from + cols", "load out of bounds"),
        ("Inside || w + j < a.in_w;", "true;", "store o"),
        ("h - half >= begin && h < last", "h - half >= begin", "store o"),
    ],
)
def test_the_checks_find_a_kernel_without_its_bounds(tmp_path, old, new, fault):
    def change(source):
        assert source.count(old) == 1
        return source.replace(old, new)

    library = build(tmp_path, "8.0", False, change)
    for size in ((1, 2, 5, 16), (1, 2, 40, 9)):
        x = randn(*size)
        run_on_host(library, x, Pooling.check(2, 3, 1, 1), x)
    assert fault in library.take_faults().decode()
