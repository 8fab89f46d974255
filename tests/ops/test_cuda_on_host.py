"""What the CUDA threads do, run on the host: values and memory accesses without a GPU.

Every tensor stands between margins of NaN: a read outside shows up in the result, a write outside
in the margin.
"""

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mmsoftpool.ops import reference
from mmsoftpool.ops.pooling import AdaptivePooling, Pooling

from ..common import randn

MARGIN = 64
ALPHAS = [0.0, 0.5, 1.0, 4.0, 30.0, 1e30]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # the strips'
ALL_DTYPES = [*DTYPES, torch.float64]
EPSILON = {
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float64: 1e-14,
}
KINDS = ("general", "strips", "rings")


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("build") / "cuda_on_host.so"
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-Og", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"),
            *("-fsanitize=undefined", "-fno-sanitize-recover"),
            *os.environ.get("CXXFLAGS", "").split(),  # make sanitize
            *(str(Path(__file__).with_name("cuda_on_host.cpp")), "-o", str(path)),
        ],
        check=True,
        # Under make sanitize the sanitizers are for the library, not for the compiler.
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    return ctypes.CDLL(str(path))


def framed(like, shift=0):
    """A copy inside a larger tensor of NaN; returns both. ``shift`` moves it off its alignment."""
    whole = torch.full((like.numel() + 2 * MARGIN,), math.nan, dtype=like.dtype)
    inside = whole[MARGIN + shift : MARGIN + shift + like.numel()].view(like.shape)
    inside.copy_(like)
    return whole, inside


def shape_argument(sizes, output_sizes, pooling, last):
    """What ``make_pooling`` in cuda_on_host.cpp reads."""
    spatial = len(sizes) - 2
    if isinstance(pooling, AdaptivePooling):
        kernel_size, stride, padding, dilation = [0] * 3, [1] * 3, [0] * 6, [1] * 3
    else:
        kernel_size, stride, padding, dilation, *_ = pooling
    shape = [int(last), *sizes[:2], *[1, 1, 1, 1, 0, 1] * (3 - spatial)]
    for i in range(spatial):
        shape += [sizes[2 + i], output_sizes[2 + i], kernel_size[i], stride[i]]
        shape += [padding[2 * i], dilation[i]]
    return (ctypes.c_int64 * len(shape))(*shape)


def run_on_host(library, x, pooling, grad_output, *, rows=4, generic=0, shift=0):
    """The value and gradient that the CUDA threads compute, and which kernels, one of KINDS.

    ``generic`` is 32 or 64 for the general kernels with indices of as many bits.

    ``x`` and ``grad_output`` are in the order of memory: channels last if they say so.
    """
    *_, alpha, gradient = pooling
    last = reference.memory_format(x) != torch.contiguous_format
    shape = shape_argument(x.shape, grad_output.shape, pooling, last)
    order = [0, *range(2, x.dim()), 1] if last else [*range(x.dim())]
    back = [order.index(i) for i in range(x.dim())]
    in_memory = [t.permute(order).contiguous() for t in (grad_output, x)]
    frames = [framed(t, shift) for t in (*in_memory, *in_memory)]
    frames[2][1].fill_(math.nan), frames[3][1].fill_(math.nan)
    pointers = [ctypes.c_void_p(inside.data_ptr()) for _, inside in frames]
    kind = library.run_threads(
        *(ALL_DTYPES.index(x.dtype), shape, ctypes.c_double(alpha), gradient == "exact"),
        *(ctypes.c_int64(rows), generic // 32, *pointers),
    )
    assert kind >= 0  # the same ones in the forward and the backward
    for whole, inside in frames[2:]:
        margins = (whole[: MARGIN + shift], whole[MARGIN + shift + inside.numel() :])
        assert all(margin.isnan().all() for margin in margins), "written outside"
    return frames[2][1].permute(back), frames[3][1].permute(back), KINDS[kind]


def check(library, x, pooling, *, alpha=1.0, gradient="exact", **options):
    """Holds value and gradient of the host's run against float64, and returns which kernels ran."""
    pooling = Pooling.check(x.dim() - 2, *pooling, alpha=alpha, gradient=gradient)
    y = torch.ops.mmsoftpool.soft_pool(x.double(), *pooling)
    g = randn(*y.shape, seed=1).to(x)
    grad = torch.ops.mmsoftpool.soft_pool_backward(g.double(), x.double(), *pooling)
    return check_against(library, x, pooling, g, y, grad, **options)


def check_against(library, x, pooling, g, y, grad, **options):
    alpha = pooling.alpha
    value, grad_input, kind = run_on_host(library, x, pooling, g, **options)
    epsilon = EPSILON[x.dtype]
    # An average of large values is as exact as these.
    largest = x[x.isfinite()].abs().amax().item()
    torch.testing.assert_close(
        value.double(), y, rtol=epsilon, atol=max(1e-6, 2**-24 * largest), equal_nan=True
    )
    # alpha (x - y) of the exact gradient makes up for the rounding of x - y.
    atol = 3e-6 * (1 + min(alpha, 100))
    torch.testing.assert_close(
        grad_input.double(), grad, rtol=max(epsilon, 1e-5), atol=atol, equal_nan=True
    )
    return kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_emulated_16_bit_types_round_as_torch_does(host_library, dtype):
    exponents = torch.linspace(-30, 20, 5000).exp2()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65519.0, 65520.0, 2**-25])
    x = torch.cat([exponents * randn(5000), special])
    result = torch.empty_like(x)
    host_library.convert(
        DTYPES.index(dtype),
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, result)),
        ctypes.c_int64(len(x)),
    )
    torch.testing.assert_close(result, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("generic", [0, 32, 64])
def test_adaptive_windows(host_library, dtype, format, generic):
    # Also sizes whose largest windows have the geometry of strips and tiles.
    for size, out in (((7, 9), (3, 4)), ((5, 8), (3, 6)), ((40, 41), (37, 38)), ((3, 4), (7, 5))):
        for gradient in ("exact", "paper"):
            x = (randn(2, 8, *size) * 3).to(dtype).contiguous(memory_format=format)
            pooling = AdaptivePooling(out, 1.0, gradient)
            y = torch.ops.mmsoftpool.adaptive_soft_pool(x.double(), *pooling)
            g = randn(*y.shape, seed=1).to(x)
            backward = torch.ops.mmsoftpool.adaptive_soft_pool_backward
            grad = backward(g.double(), x.double(), *pooling)
            kind = check_against(host_library, x, pooling, g, y, grad, generic=generic)
            assert kind == "general"


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_window_larger_than_the_map_in_ceil_mode(host_library, dtype, format):
    for pooling in ((3, 2, 0, 1, True), (3, 3, 1, 1, True), (9, 9, 0, 1, True), (4, 7, 0, 2, True)):
        for size in ((2, 2), (2, 3), (2, 8)):
            x = randn(2, 8, *size).to(dtype).contiguous(memory_format=format)
            check(host_library, x, pooling)


def kind_of(pooling):
    return "rings" if pooling[1] == 1 else "strips"


STEMS = [(2, 2), (3, 2, 1), (3, 2), (3, 1, 1), (3, 2, 1, 1, True), (2, 2, 0, 1, True)]
ASYMMETRIC = [(3, 2, ((1, 0), (1, 0))), (3, 2, ((0, 1), (0, 1))), (3, 1, ((1, 0), (1, 0)))]
SIZES = [(8, 8), (7, 16), (9, 13), (32, 24), (3, 3), (16, 4), (5, 40), (4, 64), (12, 11)]


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", [*STEMS, *ASYMMETRIC])
def test_strips(host_library, pooling, dtype, rows, gradient):
    options = dict(rows=rows, gradient=gradient)
    for size in SIZES:
        x = randn(2, 3, *size)
        x[0, 0, 1, 1], x[1, 2, 1, 2] = math.nan, -math.inf
        assert check(host_library, x.to(dtype), pooling, **options) == kind_of(pooling)
        last = randn(2, 8, *size)
        last[0, 0, 1, 1], last[1, 2, 1, 2] = math.nan, -math.inf
        last = last.to(dtype, memory_format=torch.channels_last)
        assert check(host_library, last, pooling, **options) == kind_of(pooling)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", STEMS)
def test_strips_of_tensors_that_are_not_aligned(host_library, pooling, dtype):
    for shift in (1, 2, 4):
        x = randn(2, 3, 9, 16).to(dtype)
        assert check(host_library, x, pooling, shift=shift) == kind_of(pooling)


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", STEMS)
def test_strips_and_the_general_way_with_any_sharpness(
    host_library, pooling, dtype, alpha, gradient
):
    options = dict(alpha=alpha, gradient=gradient)
    for shape, format in (
        ((2, 4, 9, 16), torch.contiguous_format),
        ((2, 4, 8, 9), torch.channels_last),
    ):
        x = randn(*shape)
        x[0, 0, 1, 1], x[0, 1, 3, 3], x[1, 2, 2, 2] = math.nan, math.inf, -math.inf
        x[0, 2, :4, :4] = x[1, 0] = -math.inf
        x[1, 3] *= 50
        x = x.to(dtype, memory_format=format)
        # An average of alpha 0 has to leave -inf out, which costs the strips too much.
        kind = kind_of(pooling) if alpha else "general"
        assert check(host_library, x, pooling, **options) == kind
        assert check(host_library, x, pooling, generic=32, **options) == "general"


@pytest.mark.parametrize("alpha", [0.0, 1e-40, 1e-38, 1e-36, 1e-34, 1.0, 1e30, 1e38, 1e300])
@pytest.mark.parametrize("generic", [0, 32])
def test_the_whole_range_of_float32_in_a_window(host_library, generic, alpha):
    high, low = torch.finfo(torch.float32).max, torch.finfo(torch.float32).min
    x = torch.tensor([[high, low, high, 0.0], [high, low, 1.0, low]]).view(1, 1, 2, 4)
    pooling = Pooling.check(2, 2, 2, alpha=alpha)
    g = torch.ones(1, 1, 1, 2)
    value, grad, kind = run_on_host(host_library, x, pooling, g, rows=1, generic=generic)
    assert kind == ("strips" if not generic and alpha > 1e-35 else "general")
    windows = x.double().view(2, 2, 2).transpose(0, 1).flatten(1)
    w = (min(alpha, high) * (windows - windows.amax(1, keepdim=True))).softmax(1)
    expected = (w * windows).sum(1)
    assert grad.isfinite().all()
    torch.testing.assert_close(value.double().flatten() / high, expected / high, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [89.0, -110.0, 3.4e38, -3.4e38, 1e-40, 0.1])
@pytest.mark.parametrize("pooling", STEMS)
def test_windows_of_one_value_give_that_value(host_library, pooling, value):
    x = torch.full((1, 4, 8, 16), value)
    y = torch.ops.mmsoftpool.soft_pool(x, *Pooling.check(2, *pooling))
    result, _, kind = run_on_host(host_library, x, Pooling.check(2, *pooling), torch.ones_like(y))
    assert kind == kind_of(pooling) and (result == torch.tensor(value)).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, 16.0, 64.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_windows_of_stride_1_against_float64(host_library, format, dtype, alpha):
    x = randn(2, 8, 19, 24)
    x[0, 0, 5, 6], x[0, 1, 7, 8], x[0, 2, 2, 2] = math.nan, math.inf, -math.inf
    x[0, 3, 4:9, 4:9], x[0, 4, 3, 3] = -math.inf, -1e9
    x[0, 5], x[0, 6], x[0, 7, 10:] = 0, x[0, 6].relu(), 3.7
    x[1, 0] *= 5
    x[1, 1] *= 50
    x[1, 2] += torch.linspace(0, 40, 19).view(-1, 1)
    x[1, 3] -= torch.linspace(0, 40, 24)
    x[1, 4, 9:] -= 15
    x[1, 5, :, 11:] -= 300
    x[1, 6] += 1000
    x[1, 7] *= 1e-3
    x = x.to(dtype).contiguous(memory_format=format)
    g = randn(*x.shape, seed=1).to(x)
    for gradient in ("exact", "paper"):
        pooling = Pooling.check(2, 3, 1, 1, alpha=alpha, gradient=gradient)
        y = torch.ops.mmsoftpool.soft_pool(x.double(), *pooling)
        grad = torch.ops.mmsoftpool.soft_pool_backward(g.double(), x.double(), *pooling)
        value, grad_input, kind = run_on_host(host_library, x, pooling, g, rows=16)
        assert kind == "rings"
        epsilon = EPSILON[dtype]
        torch.testing.assert_close(value.double(), y, rtol=epsilon, atol=1e-6, equal_nan=True)
        # As in check().
        limits = dict(rtol=max(epsilon, 1e-5), atol=3e-6 * (1 + alpha))
        torch.testing.assert_close(grad_input.double(), grad, equal_nan=True, **limits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_of_one_value_among_others_give_that_value(host_library, dtype):
    values = torch.cat([randn(60), torch.tensor([0.0, 1e-40, 6.1e-5, -8.0])]).to(dtype)
    x = values.view(1, 16, 2, 2).repeat_interleave(6, 2).repeat_interleave(8, 3)
    result, *_ = run_on_host(host_library, x, Pooling.check(2, 3, 1, 1), torch.ones_like(x))
    inside = torch.nn.functional.max_pool2d(x.float(), 3, 1, 1) == -torch.nn.functional.max_pool2d(
        -x.float(), 3, 1, 1
    )
    assert inside.sum() > x.numel() / 2
    assert (result[inside] == x[inside]).all()


@pytest.mark.parametrize("channels", [4, 6])
def test_what_strips_cannot_take_goes_the_general_way(host_library, channels):
    x = randn(1, channels, 8, 8).to(memory_format=torch.channels_last)
    options = dict(rows=4, gradient="exact")
    kind = "strips" if channels == 4 else "general"
    assert check(host_library, x, (3, 2, 1), **options) == kind
    assert check(host_library, x, (3, 2, 1), shift=1, **options) == "general"
    for pooling in ((4, 1, 2), (5, 2, 2), (3, 2, 1, 2), ((3, 2), 2), (3, 3)):
        assert check(host_library, x.contiguous(), pooling, **options) == "general"


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


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize(
    ("size", "pooling", "format"),
    [
        (size, pooling, format)
        for size, pooling in ANY
        for format in (torch.contiguous_format, *FORMATS[len(size)])
    ],
)
def test_any_pooling(host_library, size, pooling, format, gradient, bits):
    x = randn(2, 3, *size)
    x.view(-1)[5], x.view(-1)[-1] = -math.inf, math.inf
    x = x.contiguous(memory_format=format)
    check(host_library, x, pooling, rows=1, gradient=gradient, generic=bits)


@pytest.mark.parametrize("alpha", [0.0, 1e-7])
@pytest.mark.parametrize("kernel_size", [(13, 12), (20, 21)])
def test_the_mean_of_many_taps(host_library, kernel_size, alpha):
    x = randn(1, 2, 24, 25, seed=3) * 10
    assert check(host_library, x, (kernel_size, 1), alpha=alpha) == "general"


GLOBAL = [
    ((40, 41), ((40, 41),)),
    ((40, 41), ((35, 38), (2, 1), (17, 19))),
    ((40, 41), ((15, 16), 7, 0, 2)),
    ((3000,), (2900, 50)),
    ((10, 12, 9), ((10, 12, 9),)),
]


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(
    ("size", "pooling", "format"),
    [
        (size, pooling, format)
        for size, pooling in GLOBAL
        for format in (torch.contiguous_format, *FORMATS[len(size)])
    ],
)
def test_windows_of_very_many_taps_are_divided(
    host_library, size, pooling, format, dtype, gradient
):
    x = (randn(2, 5, *size) * 3).to(dtype)
    x[0, 0].view(-1)[77], x[0, 1].view(-1)[78], x[0, 2] = math.nan, math.inf, -math.inf
    x[0, 3, :9] = -math.inf
    x = x.contiguous(memory_format=format)
    checked = Pooling.check(x.dim() - 2, *pooling)
    y = torch.ops.mmsoftpool.soft_pool(x, *checked)
    last = format != torch.contiguous_format
    assert host_library.count_slices_of(shape_argument(x.shape, y.shape, checked, last)) > 4
    for alpha in (0.0, 1.0, 30.0):
        check(host_library, x, pooling, alpha=alpha, gradient=gradient)


def test_windows_are_not_divided_where_there_are_many(host_library):
    for sizes, taps, slices in (((2, 4, 20, 20), 5, 1), ((8, 256, 100, 168), (100, 168), 128)):
        pooling = Pooling.check(2, taps, 1)
        outputs = (*sizes[:2], *pooling.output_sizes(sizes[2:]))
        shape = shape_argument(sizes, outputs, pooling, False)
        assert host_library.count_slices_of(shape) == slices


@pytest.mark.parametrize(
    ("sizes", "out", "pooling", "fits"),
    [
        ((65536, 32768, 1, 1), (1, 1), (2, 2, 1), False),
        ((65536, 32767, 1, 1), (1, 1), (2, 2, 1), True),
        ((65536, 32767, 1, 1), (2, 1), (2, 2, 1), False),
        ((0, 1, 8, 8), (4, 4), (2, 2), True),
        ((1, 1, 8, 8), (1, 1), (2, 2**31 - 1), False),
        ((1, 1, 2**30, 1), (1, 1), (1, 2**28), False),
    ],
)
def test_indices_have_32_bits_where_all_fit(host_library, sizes, out, pooling, fits):
    pooling = Pooling.check(2, *pooling)
    shape = shape_argument(sizes, (*sizes[:2], *out), pooling, False)
    assert bool(host_library.fits_32(shape)) == fits


LARGE = [
    *((k, 1, k // 2) for k in (5, 7, 9, 11, 13)),
    *((3, 1, 0), (5, 1, 0), (5, 1, (2, 1)), (9, 1, ((4, 1), (0, 3)))),
]


def check_rings(library, x, pooling, *, alpha=1.0, gradient="exact", rows=6, size=1.0):
    """Holds value and gradient of the rings against the operator's in float64.

    ``size`` is that of the gradients.
    """
    pooling = Pooling.check(2, *pooling, alpha=alpha, gradient=gradient)
    y = torch.ops.mmsoftpool.soft_pool(x.double(), *pooling)
    g = (size * randn(*y.shape, seed=1)).to(x.dtype)
    g = g.contiguous(memory_format=reference.memory_format(x))
    grad = torch.ops.mmsoftpool.soft_pool_backward(g.double(), x.double(), *pooling)
    value, grad_input, kind = run_on_host(library, x, pooling, g, rows=rows)
    assert kind == "rings"
    # float32: a sum is wrong by some roundings of its largest term, and in the gradient a
    # difference of logarithms, up to 40, by some of the logarithm.
    rtol = max(EPSILON[x.dtype], 1e-6)
    for result, expected, error in ((value, y, 5e-7), (grad_input, grad, 3e-6)):
        largest = expected[expected.isfinite()].abs().max().item()
        torch.testing.assert_close(
            result.double(), expected, rtol=rtol, atol=largest * error, equal_nan=True
        )


@pytest.mark.parametrize("size", [1e-28, 1e-36])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pooling", LARGE)
def test_small_gradients_keep_their_digits(host_library, pooling, format, size):
    x = randn(1, 4, 20, 16).contiguous(memory_format=format)
    x[:, :, 3:8] += 16  # far from the reference
    check_rings(host_library, x, pooling, size=size)


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", LARGE)
def test_large_windows_in_rings(host_library, pooling, dtype, format, gradient):
    for channels, height, width in ((1, 14, 13), (3, 20, 24), (10, 17, 20)):
        x = (randn(2, channels, height, width) * 3).to(dtype).contiguous(memory_format=format)
        for rows in (5, 20):
            check_rings(host_library, x, pooling, gradient=gradient, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("alpha", [1e-6, 0.5, 4.0, 30.0, 100.0])
@pytest.mark.parametrize("pooling", [(3, 1, 1), (5, 1, 2), (7, 1, 2)])
def test_rings_with_any_sharpness_and_special_values(host_library, pooling, alpha, format, dtype):
    x = randn(2, 9, 16, 18)
    x[0, 0, 1, 1], x[0, 1, 3, 3], x[1, 2, 2, 2] = math.nan, math.inf, -math.inf
    x[0, 2, :9, :9] = x[1, 0] = -math.inf
    x[0, 5, 8, 9], x[0, 6, 8, 9] = math.nan, -math.inf  # the reference
    x[1, 3] *= 50
    x[1, 4, :8] -= 300
    x[1, 5] += 1000
    x = x.to(dtype).contiguous(memory_format=format)
    for gradient in ("exact", "paper"):
        check_rings(host_library, x, pooling, alpha=alpha, gradient=gradient)


@pytest.mark.parametrize("value", [89.0, -110.0, 3.4e38, -3.4e38, 1e-40, 0.1, -math.inf])
@pytest.mark.parametrize("kernel_size", [5, 9, 13])
def test_large_windows_of_one_value_give_that_value(host_library, kernel_size, value):
    x = torch.full((1, 4, 15, 16), value)
    pooling = Pooling.check(2, kernel_size, 1, kernel_size // 2)
    for format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=format)
        result, _, kind = run_on_host(host_library, x, pooling, torch.ones_like(x))
        assert kind == "rings" and (result == torch.tensor(value)).all()


def test_gradients_of_the_output_may_be_tiny_or_huge(host_library):
    x = randn(1, 1, 12, 12)
    for kernel_size in (3, 5):
        pooling = Pooling.check(2, kernel_size, 1, kernel_size // 2)
        _, unit, _ = run_on_host(host_library, x, pooling, torch.ones_like(x))
        for scale in (2.0**-60, 2.0**90, 2.0**120):
            _, grad, kind = run_on_host(host_library, x, pooling, torch.full_like(x, scale))
            assert kind == "rings"
            torch.testing.assert_close(grad / scale, unit, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "alpha"),
    [((5, 2, 2), 1.0), ((5, 1, 2, 2), 1.0), ((4, 1, 2), 1.0), ((15, 1, 7), 1.0), ((5, 1, 2), 0.0)],
)
def test_what_rings_cannot_take_goes_the_general_way(host_library, pooling, alpha):
    assert check(host_library, randn(1, 2, 12, 12), pooling, alpha=alpha) == "general"
    assert check(host_library, randn(1, 2, 12, 12).double(), (5, 1, 2)) == "general"
