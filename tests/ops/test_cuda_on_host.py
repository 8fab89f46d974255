"""What the CUDA threads do, run on the host: windows, tiles and memory accesses without a GPU.

Every tensor stands between margins of NaN: a read outside shows up in the result, a write outside
in the margin.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mmsoftpool.ops import reference
from mmsoftpool.ops.pooling import Pooling

from ..common import randn

MARGIN = 64
ALPHAS = [0.0, 0.5, 1.0, 4.0, 30.0, 1e30]


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("build") / "cuda_on_host.so"
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"),
            *("-fsanitize=undefined", "-fno-sanitize-recover"),
            *(str(Path(__file__).with_name("cuda_on_host.cpp")), "-o", str(path)),
        ],
        check=True,
    )
    return ctypes.CDLL(str(path))


def framed(shape, like=None, shift=0):
    """A tensor inside a larger one of NaN; returns both. ``shift`` moves it off its alignment."""
    count = math.prod(shape)
    whole = torch.full((count + 2 * MARGIN,), math.nan)
    inside = whole[MARGIN + shift : MARGIN + shift + count].view(shape)
    if like is not None:
        inside.copy_(like)
    return whole, inside


def shape_argument(sizes, output_sizes, pooling, last):
    """What ``make_pooling`` in cuda_on_host.cpp reads."""
    kernel_size, stride, padding, dilation, *_ = pooling
    spatial = len(kernel_size)
    shape = [int(last), *sizes[:2], *[1, 1, 1, 1, 0, 1] * (3 - spatial)]
    for i in range(spatial):
        shape += [sizes[2 + i], output_sizes[2 + i], kernel_size[i], stride[i]]
        shape += [padding[2 * i], dilation[i]]
    return (ctypes.c_int64 * len(shape))(*shape)


def run_on_host(library, x, pooling, grad_output, *, rows, variant="auto", shift=0):
    """The value and gradient that the CUDA threads compute, and whether they worked in strips.

    ``x`` and ``grad_output`` are in the order of memory: channels last if they say so.
    """
    *_, alpha, gradient = pooling
    last = reference.memory_format(x) != torch.contiguous_format
    shape = shape_argument(x.shape, grad_output.shape, pooling, last)
    order = [0, *range(2, x.dim()), 1] if last else [*range(x.dim())]
    back = [order.index(i) for i in range(x.dim())]
    in_memory = [t.permute(order).contiguous() for t in (grad_output, x)]
    frames = [framed(t.shape, t, shift) for t in (*in_memory, *in_memory)]
    frames[2][1].fill_(math.nan), frames[3][1].fill_(math.nan)
    pointers = [ctypes.c_void_p(inside.data_ptr()) for _, inside in frames]
    arguments = (
        shape,
        ctypes.c_double(alpha),
        gradient == "exact",
        ctypes.c_int64(rows),
    )
    if variant == "wide":
        library.run_wide(*arguments, *pointers)
        strip = True
    else:
        strip = bool(library.run(*arguments, variant == "generic", *pointers))
    for whole, inside in frames[2:]:
        margins = (whole[: MARGIN + shift], whole[MARGIN + shift + inside.numel() :])
        assert all(margin.isnan().all() for margin in margins), "written outside"
    return frames[2][1].permute(back), frames[3][1].permute(back), strip


def check(library, x, pooling, *, alpha=1.0, gradient="exact", **options):
    """Holds value and gradient of the host's run against the CPU's; returns whether in strips."""
    pooling = Pooling.check(x.dim() - 2, *pooling, alpha=alpha, gradient=gradient)
    y = torch.ops.mmsoftpool.soft_pool(x, *pooling)
    g = randn(*y.shape, seed=1)
    grad = torch.ops.mmsoftpool.soft_pool_backward(g, x, *pooling)
    value, grad_input, strip = run_on_host(library, x, pooling, g, **options)
    torch.testing.assert_close(value, y, rtol=1e-6, atol=1e-6, equal_nan=True)
    # alpha (x - y) of the exact gradient makes up for the rounding of x - y.
    atol = 3e-6 * (1 + min(alpha, 100))
    torch.testing.assert_close(grad_input, grad, rtol=1e-5, atol=atol, equal_nan=True)
    return strip


STEMS = [(2, 2), (3, 2, 1), (3, 2), (3, 2, 1, 1, True), (2, 2, 0, 1, True)]


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("pooling", STEMS)
@pytest.mark.parametrize("size", [(8, 8), (7, 16), (9, 13), (32, 24), (3, 3), (16, 4), (5, 40)])
def test_strips(host_library, size, pooling, rows, gradient):
    x = randn(2, 3, *size)
    x[0, 0, 1, 1], x[1, 2, 2, 2] = math.nan, -math.inf
    options = dict(rows=rows, gradient=gradient)
    assert check(host_library, x, pooling, **options)
    assert check(host_library, x, pooling, variant="wide", **options)
    assert check(host_library, x, pooling, shift=1, **options)
    last = randn(2, 8, *size).to(memory_format=torch.channels_last)
    assert check(host_library, last, pooling, **options)


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("pooling", [(2, 2), (3, 2, 1), (3, 2)])
def test_strips_with_any_sharpness(host_library, pooling, alpha, gradient):
    x = randn(2, 3, 9, 16)
    x[0, 0, 1, 1], x[0, 1, 3, 3], x[1, 2, 2, 2] = math.nan, math.inf, -math.inf
    x[1, 0] = -math.inf
    options = dict(rows=2, alpha=alpha, gradient=gradient)
    assert check(host_library, x, pooling, **options)
    last = randn(1, 4, 8, 9).to(memory_format=torch.channels_last)
    assert check(host_library, last, pooling, **options)
    assert not check(host_library, x, pooling, variant="generic", **options)


@pytest.mark.parametrize("alpha", [0.0, 1e-40, 1e-38, 1e-36, 1.0, 1e30, 1e38, 1e300])
@pytest.mark.parametrize("variant", ["auto", "generic"])
def test_the_whole_range_of_float32_in_a_window(host_library, variant, alpha):
    high, low = torch.finfo(torch.float32).max, torch.finfo(torch.float32).min
    x = torch.tensor([[high, low, high, 0.0], [high, low, 1.0, low]]).view(1, 1, 2, 4)
    pooling = Pooling.check(2, 2, 2, alpha=alpha)
    g = torch.ones(1, 1, 1, 2)
    value, grad, strip = run_on_host(host_library, x, pooling, g, rows=1, variant=variant)
    assert strip == (variant == "auto")
    windows = x.double().view(2, 2, 2).transpose(0, 1).flatten(1)
    w = (min(alpha, high) * (windows - windows.amax(1, keepdim=True))).softmax(1)
    expected = (w * windows).sum(1)
    assert grad.isfinite().all()
    torch.testing.assert_close(value.double().flatten() / high, expected / high, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [4, 6])
def test_what_strips_cannot_take_goes_the_general_way(host_library, channels):
    x = randn(1, channels, 8, 8).to(memory_format=torch.channels_last)
    options = dict(rows=4, gradient="exact")
    assert check(host_library, x, (3, 2, 1), **options) == (channels == 4)
    assert not check(host_library, x, (3, 2, 1), shift=1, **options)
    for pooling in ((3, 1, 1), (5, 2, 2), (3, 2, 1, 2), ((3, 2), 2), (3, 3)):
        assert not check(host_library, x.contiguous(), pooling, **options)


@pytest.mark.parametrize(("channels", "strip"), [(65535, True), (65537, False)])
def test_more_threads_than_32_bits_count_go_the_general_way(host_library, channels, strip):
    pooling = Pooling.check(2, 2)
    shape = shape_argument((65536, channels, 2, 2), (65536, channels, 1, 1), pooling, False)
    assert bool(host_library.has_strip(shape)) == strip


ANY = [
    ((17,), (3, 2, 1)),
    ((9, 11), (3, 1, 1)),
    ((9, 11), ((3, 2), (1, 3), (1, 0), (2, 1), True)),
    ((9, 11), (3, 5, 1)),
    ((12, 10), (5, 2, 2, 2, True)),
    ((1, 1), (2, 1, 1, 2)),
    ((9, 11), (3, 2, ((1, 0), (0, 1)))),
    ((5, 6, 7), (3, 2, 1)),
    ((5, 6, 7), (2, 2, 0, 1, True)),
    ((4, 6, 5), ((1, 3, 2), (1, 2, 1), (0, 1, 1), (1, 2, 3))),
]
FORMATS = {1: [], 2: [torch.channels_last], 3: [torch.channels_last_3d]}


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize(
    ("size", "pooling", "format"),
    [
        (size, pooling, format)
        for size, pooling in ANY
        for format in (torch.contiguous_format, *FORMATS[len(size)])
    ],
)
def test_any_pooling(host_library, size, pooling, format, gradient):
    x = randn(2, 3, *size)
    x.view(-1)[5], x.view(-1)[-1] = -math.inf, math.inf
    x = x.contiguous(memory_format=format)
    check(host_library, x, pooling, rows=1, gradient=gradient, variant="generic")
