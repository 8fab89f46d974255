"""The CUDA kernels against the CPU's in float64, which the other tests hold against the definition.

Needs torch, pytest and a GPU, no other package. `make sanitize-cuda` runs it under
compute-sanitizer.
"""

import math

import pytest
import torch

from mmsoftpool import SoftPool2d, soft_pool1d, soft_pool2d, soft_pool3d
from mmsoftpool.ops import backends
from mmsoftpool.ops.pooling import Pooling

from ..common import randn
from .definition import ALPHAS, POOLINGS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
inf, nan = math.inf, math.nan
EPSILON = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def check(pool, x, *args, epsilon=None, alpha=1.0, **kwargs):
    """Compares x on the GPU with float64 on the CPU, value and gradient; two runs bit by bit."""
    results = []
    g = None
    for leaf in (x.double(), x.to("cuda"), x.to("cuda")):
        leaf.requires_grad_()
        y = pool(leaf, *args, alpha=alpha, **kwargs)
        g = randn(*y.shape).to(x.dtype) if g is None else g
        (grad,) = torch.autograd.grad(y, leaf, g.to(y))
        results.append((y, grad))
    epsilon = epsilon or EPSILON[x.dtype]
    # alpha (x - y) of the exact gradient makes up for the rounding of x - y.
    for (truth, first, second), atol in zip(
        zip(*results, strict=True), (4, 1.5 + 1.5 * min(alpha, 100)), strict=True
    ):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())
        assert first.stride() == truth.stride() and first.dtype == x.dtype
        torch.testing.assert_close(
            first.cpu().double(), truth, rtol=epsilon, atol=atol * epsilon, equal_nan=True
        )


def test_the_compiled_library_is_what_runs():
    assert backends.load("cuda").path is not None, backends.load("cuda").detail


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("pooling", [*POOLINGS, (3, 2, 0, 1, False), (2, 2, 0, 1, True)])
@pytest.mark.parametrize("size", [(8, 8), (11, 13), (32, 48)])
def test_agrees_with_the_cpu(size, pooling, dtype, layout, gradient):
    for channels in (3, 8):
        x = randn(2, channels, *size) * 3
        x = x.to(dtype).contiguous(memory_format=layout)
        check(soft_pool2d, x, *pooling, gradient=gradient)


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("pooling", [(4, 1, 2), (5, 1, 2), (9, 1, 4), (13, 1, 6)])
@pytest.mark.parametrize("size", [(20, 20), (40, 40), (101, 130)])
def test_large_windows(size, pooling, dtype, layout, gradient):
    x = randn(2, 10, *size) * 3
    x[1, 2, 3:6] -= 200  # beyond the range of powers
    x = x.to(dtype).contiguous(memory_format=layout)
    # Errors of sums over many windows.
    check(soft_pool2d, x, *pooling, gradient=gradient, epsilon=10 * EPSILON[dtype])


@pytest.mark.parametrize("alpha", [*ALPHAS, 1e30])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("pooling", [(2, 2), (3, 2, 1), (3, 1, 1)])
def test_agrees_with_the_cpu_over_alpha(pooling, dtype, layout, alpha):
    x = randn(2, 8, 32, 48).to(dtype).contiguous(memory_format=layout)
    check(soft_pool2d, x, *pooling, alpha=alpha)


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_one_and_three_dimensions(dtype):
    check(soft_pool1d, torch.randn(2, 3, 17).to(dtype), 3, 2, 1)
    x = torch.randn(2, 4, 5, 8, 9).to(dtype)
    check(soft_pool3d, x, 3, 2, 1)
    check(soft_pool3d, x.contiguous(memory_format=torch.channels_last_3d), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", [(2, 2), (3, 2, 1), (3, 1, 1), (5, 1, 2)])
def test_special_values(pooling, layout):
    x = torch.randn(1, 4, 12, 16)
    x[0, 0, 3, 4], x[0, 1, 5, 5], x[0, 2, 1, 1] = nan, inf, -inf
    x[0, 3] = -inf
    check(soft_pool2d, x.contiguous(memory_format=layout), *pooling)
    for value in (89.0, -110.0, 3.4e38, -3.4e38):
        y = soft_pool2d(torch.full((1, 1, 8, 8), value, device="cuda"), *pooling)
        assert (y == value).all()


def test_misaligned_and_strided_inputs():
    x = torch.randn(2, 4, 9, 17, device="cuda")[..., 1:]
    assert soft_pool2d(x, 3, 2, 1).equal(soft_pool2d(x.contiguous(), 3, 2, 1))
    whole = torch.randn(1 + 2 * 4 * 8 * 16, device="cuda")
    x = whole[1:].view(2, 4, 8, 16)
    assert soft_pool2d(x, 3, 2, 1).equal(soft_pool2d(x.clone(), 3, 2, 1))


def test_empty_batch():
    assert soft_pool2d(torch.empty(0, 3, 8, 8, device="cuda"), 2).shape == (0, 3, 4, 4)


def test_runs_on_the_callers_stream():
    x = torch.randn(8, 64, 256, 256, device="cuda")
    expected = soft_pool2d(x + 1, 3, 2, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = soft_pool2d(x + 1, 3, 2, 1)
    torch.cuda.current_stream().wait_stream(stream)
    assert y.equal(expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_runs_on_the_inputs_device():
    x = torch.randn(2, 3, 16, 16, device="cuda:1")
    assert soft_pool2d(x, 2).device == x.device
    torch.testing.assert_close(soft_pool2d(x, 2).cpu(), soft_pool2d(x.cpu(), 2))


def test_cuda_graph():
    x = torch.randn(2, 8, 32, 32, device="cuda")
    soft_pool2d(x, 3, 2, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = soft_pool2d(x, 3, 2, 1)
    x.copy_(torch.randn(2, 8, 32, 32))
    graph.replay()
    assert y.equal(soft_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    arguments = Pooling.check(2, 3, 2, 1)
    x = torch.randn(2, 4, 8, 12, device="cuda").contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.mmsoftpool.soft_pool.default, (x, *arguments))


def test_autocast_and_compile():
    pool = SoftPool2d(3, 2, 1)
    x = torch.randn(2, 4, 16, 16, device="cuda", dtype=torch.float16)
    with torch.autocast("cuda"):
        assert pool(x).dtype == torch.float16
    assert torch.compile(pool, fullgraph=True)(x).equal(pool(x))


def test_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(1, 2, 32768, 32780, device="cuda", dtype=torch.float16)
    x[0, -1, -2:, -2:] = 1
    for pooling in ((2, 2), (3, 1, 1), (2, 3)):  # the strips and the general path
        y = soft_pool2d(x, *pooling)
        assert y[0, -1, -1, -1] > 0.4 and y[0, 0].max() == 0
