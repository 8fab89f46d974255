"""The CPU kernels compiled for aarch64, run by qemu, against those of this machine."""

import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from mmsoftpool.ops import reference
from mmsoftpool.ops.pooling import Pooling

from ..common import ROOT, randn

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Both compute in float32 or float64 and add the lanes of a vector in another order; a 16-bit result
# is rounded at the end, which can go either way.
EPSILON = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}
#: Input shape, kernel_size, stride, padding and dilation.
WINDOWS = {
    "k2 s2": ((2, 19, 10, 22), 2, 2, 0, 1),
    "k3 s2 p1": ((2, 19, 13, 37), 3, 2, 1, 1),
    "k3 s1 p1": ((1, 9, 9, 20), 3, 1, 1, 1),
    "k5 s1 p2": ((1, 20, 11, 18), 5, 1, 2, 1),
    "k9 s1 p4": ((1, 17, 12, 13), 9, 1, 4, 1),
    "k7, the whole map": ((3, 35, 7, 7), 7, 7, 0, 1),
    "dilated": ((1, 5, 11, 30), (3, 2), (1, 3), (1, 1), (2, 3)),
    "1d": ((2, 7, 70), 3, 2, 1, 1),
    "3d": ((1, 6, 5, 8, 9), (3, 2, 2), 2, (1, 0, 1), 1),
}
ALPHAS = [0.0, 1.0, 4.0, 1e30]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {' and no '.join(MISSING)}; make aarch64 says what to install"
    ),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Runs the kernels for a list of cases (dtype, x, pooling, grad_output) as aarch64 code."""
    folder = tmp_path_factory.mktemp("aarch64")
    sources = {Path(__file__).with_name("kernels.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")}
    sources.remove(ROOT / "csrc" / "cpu" / "binding.cpp")  # needs torch
    flags = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Werror"]
    subprocess.run(
        [COMPILER, *flags, "-Wno-psabi", "-static", *sources, "-o", folder / "kernels"], check=True
    )

    def run(cases):
        with (folder / "cases").open("wb") as file:
            for x, pooling, grad_output in cases:
                file.write(_header(x, pooling, grad_output))
                for tensor in (x, grad_output):
                    file.write(_in_memory(tensor).view(torch.uint8).numpy().tobytes())
        subprocess.run(
            [EMULATOR, folder / "kernels", folder / "cases", folder / "results"], check=True
        )
        data = (folder / "results").read_bytes()
        for x, _, grad_output in cases:
            for like in (grad_output, x):
                flat = _in_memory(like)
                size = flat.numel() * flat.element_size()
                part, data = bytearray(data[:size]), data[size:]
                values = torch.frombuffer(part, dtype=like.dtype)
                yield torch.empty_like(like).copy_(_from_memory(values, like))
        assert not data

    return run


def _order(tensor):
    """The axes of a tensor as they lie in memory."""
    last = reference.memory_format(tensor) != torch.contiguous_format
    return [0, *range(2, tensor.dim()), 1] if last else [*range(tensor.dim())]


def _in_memory(tensor):
    return tensor.permute(_order(tensor)).contiguous().flatten()


def _from_memory(values, like):
    order = _order(like)
    return values.view([like.shape[i] for i in order]).permute(
        [order.index(i) for i in range(like.dim())]
    )


def _header(x, pooling, grad_output):
    """What ``main`` in kernels.cpp reads before the data of a case."""
    *grid, alpha, gradient = pooling
    kernel_size, stride, padding, dilation, _ = grid
    missing = 5 - x.dim()
    axes = [1, 1, 1, 1, 0, 1] * missing
    for i in range(x.dim() - 2):
        axes += [x.shape[2 + i], grad_output.shape[2 + i], kernel_size[i], stride[i]]
        axes += [padding[2 * i], dilation[i]]
    kind = 2 * DTYPES.index(x.dtype) + (gradient == "paper")
    last = _order(x)[1] != 1
    return struct.pack("=22qd", kind, last, *x.shape[:2], *axes, alpha)


def case(x, grid, alpha=1.0, gradient="exact"):
    pooling = Pooling.check(x.dim() - 2, *grid, alpha=alpha, gradient=gradient)
    y = torch.ops.mmsoftpool.soft_pool(x, *pooling)
    return x, pooling, torch.empty_like(y).copy_(randn(*y.shape, seed=1))


def check(kernels, cases):
    results = kernels(cases)
    for x, pooling, grad_output in cases:
        alpha, epsilon = pooling[-2], EPSILON[x.dtype]
        value = torch.ops.mmsoftpool.soft_pool(x, *pooling)
        torch.testing.assert_close(next(results), value, rtol=epsilon, atol=epsilon, equal_nan=True)
        grad = torch.ops.mmsoftpool.soft_pool_backward(grad_output, x, *pooling)
        # alpha (x - y) of the exact gradient makes up for the rounding of x - y.
        atol = epsilon * (3 + 3 * min(alpha, 100))
        torch.testing.assert_close(next(results), grad, rtol=4 * epsilon, atol=atol, equal_nan=True)
    assert next(results, None) is None


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_this_machine(kernels, dtype, last):
    cases = []
    for shape, *grid in WINDOWS.values():
        if last and len(shape) < 4:
            continue
        x = randn(*shape).to(dtype)
        if last:
            x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
        cases += [case(x, grid, alpha) for alpha in ALPHAS]
        cases.append(case(x, grid, gradient="paper"))
    check(kernels, cases)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(kernels, dtype, last):
    cases = []
    for shape, *grid in WINDOWS.values():
        if len(shape) != 4:
            continue
        x = randn(*shape)
        x[0, 0, 1, 1], x[0, 1, 3, 3], x[0, 2, 2, 2] = math.nan, math.inf, -math.inf
        x[0, 3, :6, :6] = x[0, 4] = -math.inf
        x = x.to(dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        cases += [case(x, grid, alpha) for alpha in ALPHAS]
    check(kernels, cases)
