"""The PTX of the CUDA kernels, run on the CPU with the launch code as it is; needs nvcc, no GPU.

``ptx/`` translates what nvcc makes of csrc/cuda to C++, instruction by instruction, and checks
every access: bounds, alignment, reads of what was never written, and threads that read or write
what another one has written. By default some of the float32 kernels for 8.0; ``make test-ptx``
sets MMSOFTPOOL_PTX to architectures, and all kernels run for them.
"""

import ctypes
import math
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mmsoftpool.ops.pooling import Pooling

from ..common import ROOT, randn
from .ptx.translate import translate
from .test_cuda_on_host import ALL_DTYPES, EPSILON, check, check_rings, run_on_host, shape_argument

FOLDER = Path(__file__).with_name("ptx")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CXX = shutil.which("g++")
ARCHITECTURES = os.environ.get("MMSOFTPOOL_PTX", "").split()
DTYPES = ALL_DTYPES if ARCHITECTURES else [torch.float32]
pytestmark = pytest.mark.skipif(NVCC is None or CXX is None, reason="needs nvcc and g++")
needs_every_kernel = pytest.mark.skipif(not ARCHITECTURES, reason="make test-ptx has every kernel")


def replace_once(path, old, new):
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))


def compile_with_nvcc(folder, arch, source, *flags):
    number = arch.replace(".", "")
    nvcc = [NVCC, "-std=c++17", "-O3", "-cudart=static", "--expt-relaxed-constexpr", "-w"]
    nvcc += [f"-gencode=arch=compute_{number},code=compute_{number}", "-Xcompiler=-fPIC"]
    nvcc += [f"-I{folder}/csrc", f"-I{folder}/csrc/cuda", f"-I{FOLDER}", *flags]
    made = folder / f"{source.stem}.o"
    subprocess.run([*nvcc, "-c", source, "-o", made], check=True, cwd=folder)
    return made


def build(folder, arch, every, change=None):
    """Compiles the kernels, translates them and links them with the launch code.

    ``change`` is a file of csrc/cuda, a part of its text and another one instead, for the tests of
    the checks.
    """
    csrc = shutil.copytree(ROOT / "csrc", folder / "csrc") / "cuda"
    # A backward of two steps does so many outputs at once: here in several parts.
    replace_once(csrc / "ring.h", "outputs = 1 << 21", "outputs = 1 << 9")
    if change is not None:
        replace_once(csrc / change[0], *change[1:])
    if not every:
        for name, pattern in (
            ("soft_pool.cu", r"MMSOFTPOOL_INSTANTIATE\((double|__half|__nv_bfloat16)\)"),
            ("select.h", r"\|\|\s+run_ring<T, (7|9|11|13)>\(pooling, aligned, run\)"),
        ):
            source, count = re.subn(pattern, "", (csrc / name).read_text())
            assert count > 2
            (csrc / name).write_text(source)
    flags = ["--keep", f"--keep-dir={folder}"] + ["-DMMSOFTPOOL_FLOAT_ALONE"] * (not every)
    driver = compile_with_nvcc(folder, arch, FOLDER / "driver.cu", *flags)
    sources = translate((folder / "driver.ptx").read_text(), folder, 8 if every else 2)
    sources.append(FOLDER / "machine.cpp")

    def compile_source(path):
        flags = ["-std=c++17", "-O0", "-fPIC", "-mfma", "-mf16c", "-ffp-contract=off", "-w"]
        flags += [f"-I{FOLDER}", "-fno-strict-aliasing"]
        made = folder / f"{path.stem}.o"
        subprocess.run([CXX, *flags, "-c", path, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2 if every else 1) as pool:
        objects = list(pool.map(compile_source, sources))
    # The driver registers its kernels when it is loaded: the machine has to be there.
    return link(folder / "kernels.so", [*objects, driver])


def link(library, objects, *flags):
    subprocess.run([CXX, "-shared", "-Wl,-Bsymbolic", "-o", library, *objects, *flags], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.take_faults.restype = loaded.get_last_kernel.restype = ctypes.c_char_p
    loaded.count_launches.restype = ctypes.c_int64
    loaded.folder = library.parent
    return loaded


@pytest.fixture(scope="module", params=ARCHITECTURES or ["8.0"])
def library(request, tmp_path_factory):
    library = build(tmp_path_factory.mktemp("ptx"), request.param, bool(ARCHITECTURES))
    library.arch = request.param
    yield library
    assert library.take_faults() == b""
    kernels, all_kernels = library.count_launched(), library.count_kernels()
    print(f"\n{request.param}: {library.count_launches()} launches of {kernels} kernels")
    # All but those for slices with 64-bit indices, one a type.
    assert kernels == all_kernels - len(ALL_DTYPES) or not ARCHITECTURES


def no_faults(library):
    assert library.take_faults().decode() == ""


# What counts threads, memory or time, or looks into the library of the CPU.
NOT_OF_THIS_BINDING = "not thread and not memory and not fork and not capability and not reference"

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
    for size in ((8, 16), (9, 13), (5, 40)):
        x = randn(2, 8, *size)
        x[0, 0, 1, 1], x[1, 2, 1, 2], x[1, 3, 3, 3] = math.nan, -math.inf, math.inf
        x = x.to(dtype).contiguous(memory_format=layout)
        for descending in (False, True):
            library.set_rounding(0, descending)
            check(library, x, pooling, gradient=gradient)
            no_faults(library)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_that_are_divided(library, dtype, layout):
    library.set_rounding(0, False)
    x = (randn(1, 3, 20, 21) * 3).to(dtype).contiguous(memory_format=layout)
    check(library, x, ((20, 21),))
    no_faults(library)


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
@pytest.mark.parametrize("pooling", LARGE)
def test_large_windows(library, pooling, dtype, layout, gradient):
    for shape, alpha, size in (((20, 20), 1.0, 1), ((17, 30), 4.0, 1e-36), ((31, 12), 0.1, 1)):
        x = randn(2, 5, *shape) * 3
        x[0, 0, 1, 1], x[1, 2, 1, 2], x[1, 3, 3, 3] = math.nan, -math.inf, math.inf
        x[0, 4, :8] -= 300
        x = x.to(dtype).contiguous(memory_format=layout)
        library.set_rounding(0, False)
        size = size if dtype == torch.float32 else 1
        check_rings(library, x, pooling, gradient=gradient, alpha=alpha, size=size)
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


@pytest.mark.parametrize("seed", range(6 if ARCHITECTURES else 1))
def test_random_poolings(library, seed):
    numbers = random.Random(seed)
    for case in range(100 if ARCHITECTURES else 25):
        dims = numbers.choice([1, 2, 2, 2, 3])
        kernel_size = [numbers.choice([1, 2, 3, 3, 4, 5, 6]) for _ in range(dims)]
        stride = [numbers.randint(1, 3) for _ in range(dims)]
        dilation = [numbers.choice([1, 1, 2]) for _ in range(dims)]
        if numbers.random() < 0.5:  # as strips and rings have them
            kernel_size = [numbers.choice([2, 3, 5, 9] if ARCHITECTURES else [2, 3, 5])] * dims
            stride = [1 if kernel_size[0] > 3 else numbers.choice([1, 2])] * dims
            dilation = [1] * dims
        padding = [tuple(numbers.randint(0, k // 2) for _ in range(2)) for k in kernel_size]
        size = [numbers.randint(1, 12 if dims == 3 else 30) for _ in range(dims)]
        pooling = (kernel_size, stride, padding, dilation, numbers.random() < 0.3)
        if min(Pooling.check(dims, *pooling).output_sizes(size)) < 1:
            continue
        x = randn(numbers.choice([1, 2]), numbers.choice([1, 3, 4, 8]), *size, seed=case)
        x *= numbers.choice([1, 3])
        for value in (math.nan, math.inf, -math.inf) if numbers.random() < 0.3 else ():
            x.view(-1)[numbers.randrange(x.numel())] = value
        x = x.to(numbers.choice(DTYPES))
        if dims > 1 and numbers.random() < 0.5:
            x = x.contiguous(
                memory_format=getattr(torch, ["channels_last", "channels_last_3d"][dims - 2])
            )
        library.set_rounding(numbers.choice([0, seed + 1]), numbers.random() < 0.5)
        options = dict(
            gradient=numbers.choice(["exact", "paper"]), alpha=numbers.choice([0.0, 0.3, 1.0, 4.0])
        )
        is_ring = {*kernel_size} <= {5, 9} and {*stride, *dilation} == {1} and dims == 2
        if (
            is_ring
            and len({*kernel_size}) == 1
            and options["alpha"] > 0
            and x.dtype != torch.float64
        ):
            check_rings(library, x, pooling, **options)
        else:
            check(library, x, pooling, shift=numbers.choice([0, 0, 1, 4]), **options)
        no_faults(library)


def sparse(count, dtype):
    """Memory that is 0 and of which only what somebody touches is there."""
    size = count * torch.empty(0, dtype=dtype).element_size()
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype, count=count)


@needs_every_kernel
@pytest.mark.parametrize(
    ("pooling", "dtype"),
    [
        *((pooling, torch.float16) for pooling in [(2, 2), (3, 2, 1), (3, 1, 1), (5, 1, 2)]),
        *(((3, 3), dtype) for dtype in ALL_DTYPES),
    ],
)
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((1, 2, 2**20, 1032), False),
        ((1, 2, 2**20, 1030), False),
        ((2, 8, 2**17 + 2, 1032), True),
    ],
)
def test_more_than_2_31_elements(library, shape, last, pooling, dtype):
    """The last blocks of a grid alone run, on tensors that are 0 but for their last rows."""
    assert math.prod(shape) > 2**31
    *_, height, width = shape
    channels = shape[1] if last else 1
    pooling = Pooling.check(2, *pooling)
    step = pooling.stride[0]
    out_height, out_width = pooling.output_sizes((height, width))
    rows = 304  # a multiple of all strides above the last one
    assert (height - rows) % 6 == 0
    out_rows = out_height - (height - rows) // step
    sizes = {"x": height * width, "y": out_height * out_width}
    planes = shape[0] * shape[1]
    x, grad_x = (sparse(planes * sizes["x"], dtype) for _ in range(2))
    y, grad_y = (sparse(planes * sizes["y"], dtype) for _ in range(2))
    row, out_row = width * channels, out_width * channels
    x[-rows * row :] = randn(rows * row).to(dtype)
    grad_y[-out_rows * out_row :] = randn(out_rows * out_row, seed=1).to(dtype)
    # A backward of two steps needs more than the last windows.
    only_forward = pooling.kernel_size[0] == 5
    library.set_rounding(0, False)
    library.set_last_blocks(40)
    try:
        library.run_threads(
            *(
                ALL_DTYPES.index(dtype),
                shape_argument(shape, (*shape[:2], out_height, out_width), pooling, last),
            ),
            *(ctypes.c_double(1.0), 1, ctypes.c_int64(0), only_forward),
            *(ctypes.c_void_p(t.data_ptr()) for t in (grad_y, x, y, grad_x)),
        )
    finally:
        library.set_last_blocks(0)
    no_faults(library)

    def crop(numbers, height, width):
        numbers = numbers[-height * width * channels :].double().view(height, width, channels)
        return numbers.permute(2, 0, 1)[None]

    part, part_grad = crop(x, rows, width), crop(grad_y, out_rows, out_width)
    expected = torch.ops.mmsoftpool.soft_pool(part, *pooling)
    results = [(y, expected)]
    if not only_forward:
        backward = torch.ops.mmsoftpool.soft_pool_backward
        results.append((grad_x, backward(part_grad, part, *pooling)))
    for result, expected in results:
        in_memory = expected[0].permute(1, 2, 0).flatten()[-4000:]
        torch.testing.assert_close(
            result[-4000:].double(), in_memory, rtol=EPSILON[dtype], atol=EPSILON[dtype]
        )


@pytest.fixture(scope="module")
def package(library, tmp_path_factory):
    """A folder with the package and its tests, where the binding for CUDA serves the CPU.

    It calls the kernels of ``library``, and fails if they do what they must not.
    """
    torch_folder = Path(torch.__file__).parent
    binding = library.folder / "csrc" / "cuda" / "binding.cu"
    for old, new in (
        ('#include "../binding.h"', '#include "cpu_device.h"'),
        ("check(pool_forward(", "check(checked_forward("),
        ("check(pool_backward(", "check(checked_backward("),
        ("(mmsoftpool, CUDA, library)", "(mmsoftpool, CPU, library)"),
        (
            "void check(cudaError_t error) {",
            "void check(cudaError_t error) { error = check_faults(error);",
        ),
    ):
        replace_once(binding, old, new)
    flags = [f"-DTORCH_TARGET_VERSION={2 << 56 | 10 << 48:#x}", "-DTORCH_STABLE_ONLY"]
    compile_with_nvcc(
        library.folder, library.arch, binding, *flags, f"-isystem={torch_folder}/include"
    )
    folder = tmp_path_factory.mktemp("package")
    ignore = shutil.ignore_patterns("*.so", ".mim", "__pycache__")
    # The driver and the binding register kernels when they are loaded: the machine comes first.
    objects = sorted(
        library.folder.glob("*.o"), key=lambda path: path.stem in ("driver", "binding")
    )
    shutil.copytree(ROOT / "mmsoftpool", folder / "mmsoftpool", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "ops", folder / "tests" / "ops", ignore=ignore)
    for path in (*(ROOT / "tests").glob("*.py"), ROOT / "pyproject.toml"):
        if not path.name.startswith("test_"):
            shutil.copy(
                path, folder / (path.name if path.suffix == ".toml" else f"tests/{path.name}")
            )
    libraries = [f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(
        [
            *(CXX, "-shared", "-Wl,-Bsymbolic", f"-Wl,-rpath,{torch_folder}/lib"),
            *("-o", folder / "mmsoftpool" / "libmmsoftpool_cpu.so"),
            *(*objects, *libraries),
        ],
        check=True,
    )
    return folder


def run_in(package, *args):
    result = subprocess.run([sys.executable, *args], cwd=package, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return result.stdout


@needs_every_kernel
def test_the_operators_own_tests_on_the_binding(package):
    tests = ("functional", "windows", "autograd", "adaptive", "properties", "raw_operator")
    out = run_in(
        package,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"),
        *("-k", NOT_OF_THIS_BINDING, "--durations=5"),
        *(f"tests/ops/test_{name}.py" for name in tests),
    )
    print(out[-1500:])


# The tensor's device is the CPU here, which has the number -1.
ON_ITS_DEVICE = """
import ctypes, torch, mmsoftpool
library = ctypes.CDLL("mmsoftpool/libmmsoftpool_cpu.so")
y = None
for run in (lambda: mmsoftpool.soft_pool2d(x, 2), lambda: y.sum().backward()):
    x = torch.ones(1, 1, 4, 4, requires_grad=True) if y is None else x
    library.cudaSetDevice(5)
    y = run()
    print(library.get_launch_device(), end=" ")
"""


@needs_every_kernel
def test_kernels_are_launched_on_the_tensors_device(package):
    assert run_in(package, "-c", ON_ITS_DEVICE).split() == ["-1", "-1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        # The packs beside a row; the columns of the output; the rows of a thread.
        ("walk.h", "(first == 0 || has(first), from", "(true, from", "load out of bounds"),
        ("walk.h", "(Whole > 1 && j == 0) || has(j * count / Channels)", "true", "store o"),
        (
            "ring.h",
            "if (rows.has(turn + k - half)) {",
            "if (turn + k - half >= rows.begin) {",
            "store o",
        ),
    ],
)
def test_the_checks_find_a_kernel_without_its_bounds(tmp_path, file, old, new, fault):
    library = build(tmp_path, "8.0", False, (file, old, new))
    for size in ((1, 2, 5, 16), (1, 2, 40, 9)):
        x = randn(*size)
        run_on_host(library, x, Pooling.check(2, 3, 1, 1), x)
    assert fault in library.take_faults().decode()
