"""Windows of every size: the definition in float64, whichever way the CPU kernels take."""

import math
from random import Random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsoftpool import soft_pool2d, soft_pool3d

from ..common import rand, randn
from . import definition

inf, nan = math.inf, math.nan
FORMATS = [torch.contiguous_format, torch.channels_last]
EPSILON = {torch.float64: 2e-15, torch.float32: 6e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@st.composite
def cases(draw):
    kernel, stride = (
        draw(st.lists(st.integers(1, high), min_size=2, max_size=2)) for high in (15, 4)
    )
    dilation = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=2, max_size=2))
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    ceil_mode = draw(st.booleans())
    # With small ones among them, where a window covers the map, and rows of several vectors.
    sizes = [
        max(1, (k - 1) * d + 1 - 2 * p) + draw(st.sampled_from([0, 1, 3, 8]))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    sizes[1] += draw(st.sampled_from([0, 0, 40]))
    channels = draw(st.sampled_from([1, 2, 17]))
    x = randn(1, channels, *sizes, seed=draw(st.integers(0, 99))).double()
    x = x * draw(st.sampled_from([1e-3, 1.0, 20.0])) + draw(st.sampled_from([0.0, 0.0, -500.0]))
    x = x.to(draw(st.sampled_from(list(EPSILON))))
    x = x.contiguous(memory_format=draw(st.sampled_from(FORMATS)))
    pooling = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)
    return (
        *(x, pooling, draw(st.sampled_from(definition.ALPHAS))),
        draw(st.sampled_from(["exact", "paper"])),
    )


class Fold(NamedTuple):
    """Value and gradient; the largest tap of each window, and for each input the largest gradient
    of the inputs in the windows around it, as the sum of the magnitudes that it adds up."""

    value: torch.Tensor
    gradient: torch.Tensor
    largest: torch.Tensor
    largest_gradient: torch.Tensor


def fold(x, pooling, alpha, grad_output, gradient):
    """The pooling in float64 by indexing, faster than the loop of the definition."""
    kernel, stride, padding, dilation, ceil_mode = pooling
    x = x.detach().double().contiguous()
    out = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode).shape[2:]
    grid = [
        torch.arange(o)[:, None] * s - p + torch.arange(k) * d
        for o, s, p, k, d in zip(out, stride, padding, kernel, dilation, strict=True)
    ]
    rows, columns = grid
    place = rows[:, None, :, None] * x.shape[3] + columns[None, :, None, :]
    inside = ((rows >= 0) & (rows < x.shape[2]))[:, None, :, None]
    inside = inside & ((columns >= 0) & (columns < x.shape[3]))[None, :, None, :]
    place, inside = place.flatten(2), inside.flatten(2)
    taps = x.flatten(2)[..., place.clamp(0, x.shape[2] * x.shape[3] - 1)]
    taps = taps.masked_fill(~inside, -inf)
    largest = taps.amax(-1, keepdim=True)
    weights = ((taps - largest) * alpha).exp().masked_fill(taps == -inf, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    below = (taps - largest).masked_fill(taps == -inf, 0)
    mean = (weights * below).sum(-1, keepdim=True)
    y = (largest + mean)[..., 0]
    slope = 1 + alpha * (below - mean) if gradient == "exact" else 1
    share = grad_output.double()[..., None] * weights * slope
    grad = torch.zeros_like(x).flatten(2)
    at = place.clamp(0, grad.shape[2] - 1).flatten()
    grad.index_add_(2, at, share.flatten(2))
    size = torch.zeros_like(grad).index_add_(2, at, share.abs().flatten(2))
    size = size[..., at].view_as(share).masked_fill(~inside, 0).amax(-1, keepdim=True)
    around = torch.zeros_like(grad).scatter_reduce_(
        2, at.expand(*x.shape[:2], -1), size.expand_as(share).flatten(2), "amax"
    )
    return Fold(y, grad.view_as(x), largest[..., 0], around.view_as(x))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_windows_up_to_15_are_the_definition(case):
    x, pooling, alpha, gradient = case
    kernel, *_ = pooling
    x.requires_grad_()
    y = soft_pool2d(x, *pooling, alpha=alpha, gradient=gradient)
    g = randn(*y.shape, seed=1).to(x.dtype)
    (grad,) = torch.autograd.grad(y, x, g)
    value, slope, *_ = fold(x, pooling, alpha, g, gradient)
    outside = value.isnan()  # a dilated window can lie in the padding as a whole
    assert (y[outside] == -inf).all()
    epsilon, scale = EPSILON[x.dtype], x.detach().abs().amax().item()
    torch.testing.assert_close(
        y[~outside].double(), value[~outside], rtol=epsilon, atol=epsilon * scale
    )
    if outside.any():
        return
    # Of the sum over an input's windows of g w (1 + alpha (x - y)).
    spread = (x.detach().amax() - x.detach().amin()).item()
    magnitude = 1 + alpha * min(spread, 8 / max(alpha, 1e-9))
    torch.testing.assert_close(
        grad.double(), slope, rtol=epsilon, atol=4 * epsilon * magnitude * math.prod(kernel) ** 0.5
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernel_size", [3, 5, 13])
def test_value_of_one_sign_is_right_to_1e_6(format, kernel_size):
    x = (rand(2, 17, 21, 37) * 6).contiguous(memory_format=format)
    pooling = (kernel_size, 1, kernel_size // 2, 1, False)
    y, _ = definition.soft_pool2d(x[:1, :1], pooling)
    torch.testing.assert_close(soft_pool2d(x, *pooling)[:1, :1].double(), y, rtol=1e-6, atol=0)


#: Poolings of every kernel: the networks' windows; windows that share exponentials; large windows,
#: dilated ones, and one window over the map.
ACCURACY = {
    "k2 s2": (2, 2, 0, 1),
    "k3 s2": (3, 2, 1, 1),
    "k3 s1": (3, 1, 1, 1),
    "k5 s1": (5, 1, 2, 1),
    "k13 s1": (13, 1, 6, 1),
    "k5 s4 d2": (5, 4, 2, 2),
    "map": ((22, 38), 1, 0, 1),
}
#: What docs/operator.md promises of float32; 16-bit types round at the end.
VALUE_ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
GRADIENT_ERROR = {**VALUE_ERROR, torch.float32: 3e-6}
#: Of windows that share exponentials.
SHARED_GRADIENT_ERROR = 2e-5


@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
@pytest.mark.parametrize("pooling", ACCURACY.values(), ids=list(ACCURACY))
def test_accuracy_beside_an_outlier(dtype, pooling):
    kernel, stride, padding, dilation = pooling
    grid = (*((n, n) if isinstance(n, int) else n for n in pooling), False)
    shares = isinstance(kernel, int) and kernel > 2 * stride and dtype != torch.float64
    for outlier, scale in ((2, 1.0), (20, 1e-3), (40, 1.0), (60, 1e-3), (60, 1.0)):
        # After a ReLU, as most maps that are pooled; 17 channels: a vector and a rest of them.
        x = (randn(1, 17, 22, 38) * scale).relu()
        x[..., 7::16] = outlier
        x = x.to(dtype)
        shape = soft_pool2d(x, kernel, stride, padding, dilation).shape
        g = rand(*shape, seed=1).to(dtype)
        truth = fold(x, grid, 1.0, g, "exact")
        tiny = 2**-25 if dtype == torch.float16 else 0  # the rounding of a subnormal number
        allowed = max(SHARED_GRADIENT_ERROR if shares else 0, GRADIENT_ERROR[dtype])
        for format in FORMATS:
            ours = x.detach().contiguous(memory_format=format).requires_grad_()
            y = soft_pool2d(ours, kernel, stride, padding, dilation)
            (grad,) = torch.autograd.grad(y, ours, g)
            error = (y.double() - truth.value).abs() - tiny
            assert (error <= VALUE_ERROR[dtype] * truth.largest).all(), (outlier, scale, format)
            error = (grad.double() - truth.gradient).abs() - tiny
            assert (error <= allowed * truth.largest_gradient).all(), (outlier, scale, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("alpha", [0.5, 4.0, 30.0, 1e20])
@pytest.mark.parametrize("pooling", [(2, 2, 0, 1), (3, 2, 1, 1)], ids=["k2", "k3"])
def test_gradients_of_large_values_are_right_to_1e_6(format, gradient, alpha, pooling):
    x = (randn(1, 17, 22, 38) * 60).contiguous(memory_format=format).requires_grad_()
    y = soft_pool2d(x, *pooling, alpha=alpha, gradient=gradient)
    g = randn(*y.shape, seed=1)
    (grad,) = torch.autograd.grad(y, x, g)
    truth = fold(x, (*((n, n) for n in pooling), False), alpha, g, gradient)
    error = (grad.double() - truth.gradient).abs()
    assert (error <= 1e-6 * truth.largest_gradient).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pooling", [(2, 2, 0), (3, 2, 1), (3, 3, 0)])
def test_a_window_of_one_value_gives_it_beside_an_outlier(format, pooling):
    for value in (0.1, 1e-3, 7.7):
        x = torch.full((1, 17, 12, 40), value)
        x[..., 7::12] = 20.0
        y = soft_pool2d(x.contiguous(memory_format=format), *pooling)
        alone = F.max_pool2d(x, *pooling) == x[0, 0, 0, 0]
        assert alone.any() and (y[alone] == x[0, 0, 0, 0]).all()
        y = soft_pool2d(x.contiguous(memory_format=format), 5, 1, 2)  # shares exponentials
        alone = F.max_pool2d(x, 5, 1, 2) == x[0, 0, 0, 0]
        assert alone.any() and ((y[alone] - x[0, 0, 0, 0]).abs() <= 5e-7 * value).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("size", "channels"), [(300, 70), (1024, 17), (2048, 2)])
def test_accuracy_of_one_window_over_a_large_map(format, size, channels):
    x = (rand(1, channels, size, size) * 6).contiguous(memory_format=format).requires_grad_()
    y = soft_pool2d(x, size)
    (grad,) = torch.autograd.grad(y.sum(), x)
    for c in {0, channels - 1}:  # in a vector of channels; in the rest
        taps = x[0, c].detach().double()
        weights = taps.flatten().softmax(0).view_as(taps)
        value = (weights * taps).sum()
        slope = weights * (1 + taps - value)
        assert (y[0, c].item() - value).abs() <= 1e-6 * value
        assert ((grad[0, c] - slope).abs() <= 3e-6 * slope.abs().max()).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(32, 32), (9, 40), (1, 1)])
def test_a_kernel_larger_than_the_map_has_the_windows_of_one_that_just_covers_it(format, shape):
    x = randn(2, 17, *shape).contiguous(memory_format=format).requires_grad_()
    covering = [2 * n - 1 for n in shape]  # at stride 1 every window is the whole map
    results = []
    for kernel in (covering, [n + 2 * 20 for n in covering], [n + 2**26 for n in covering]):
        y = soft_pool2d(x, kernel, 1, [k // 2 for k in kernel])
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for y, grad in results[1:]:
        assert y.equal(results[0][0]) and grad.equal(results[0][1])


def test_kernels_that_reach_beyond_the_map_are_the_definition():
    random = Random(0)
    for _ in range(100):
        kernel, stride, dilation = random.randint(1, 25), random.randint(1, 4), random.randint(1, 3)
        size, padding = random.randint(1, 9), random.randint(0, kernel // 2)
        if size + 2 * padding < (kernel - 1) * dilation + 1:
            continue
        x = randn(1, 1, size, 1, seed=kernel).double().requires_grad_()
        pooling = ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1), False)
        y = soft_pool2d(x, *pooling)
        value, slope = definition.soft_pool2d(x, pooling)
        torch.testing.assert_close(y, value)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slope)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize(
    ("pooling", "windows", "inputs"),
    [
        ((5, 1, 2), (slice(2, 7), slice(8, 13)), (slice(0, 9), slice(6, 15))),
        ((3, 2, 1), (slice(2, 3), slice(5, 6)), (slice(3, 6), slice(9, 12))),
    ],
    ids=["k5", "k3"],
)
def test_nan_and_infinity_stay_in_their_windows(format, gradient, bad, pooling, windows, inputs):
    x = randn(1, 17, 19, 40)
    x[0, 3, 4, 10] = bad
    x = x.contiguous(memory_format=format).requires_grad_()
    y = soft_pool2d(x, *pooling, gradient=gradient)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[(0, 3, *windows)] = True
    assert y.isnan().equal(expected)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[(0, 3, *inputs)] = True
    assert grad.isnan().equal(expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("pooling", "rows", "columns"),
    [((5, 1, 2), slice(4, 10), slice(7, 18)), ((3, 2, 1), slice(2, 6), slice(3, 10))],
    ids=["k5", "k3"],
)
def test_minus_infinity_has_no_weight_in_overlapping_windows(format, pooling, rows, columns):
    x = randn(1, 17, 19, 40)
    x[..., 2:12, 5:20] = -inf
    x = x.contiguous(memory_format=format).requires_grad_()
    y = soft_pool2d(x, *pooling)
    assert (y[..., rows, columns] == -inf).all() and y[..., : rows.start, :].isfinite().all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad[x == -inf] == 0).all()
    assert grad.sum().item() == pytest.approx((y > -inf).sum().item(), rel=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("alpha", [1.0, 30.0])
@pytest.mark.parametrize("pooling", [(5, 1, 2, 1, False), (3, 2, 1, 1, False)], ids=["k5", "k3"])
def test_a_wide_range_of_values_in_neighbouring_windows(format, alpha, pooling):
    # No number of float32 reaches from the weights of one side to those of the other.
    x = randn(1, 17, 19, 40)
    x = x + torch.linspace(-300, 3000, 40)
    x[..., 8:12, :] *= 1e30
    x = x.contiguous(memory_format=format).requires_grad_()
    y = soft_pool2d(x, *pooling, alpha=alpha)
    value, slope = definition.soft_pool2d(x[:, :2], pooling, alpha=alpha)
    torch.testing.assert_close(y[:, :2].double(), value, rtol=2e-6, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # Where the inputs are not larger than 1e4; a difference of those is exact to 1e-3 only.
    torch.testing.assert_close(grad[:, :2].double(), slope, rtol=0, atol=4e-3 * alpha)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pooling", [(3, 2, 1), (5, 1, 2), (13, 1, 6), (9, 4, 4)])
def test_the_same_bits_for_every_number_of_threads(format, pooling):
    x = (randn(3, 70, 33, 90) * 3).contiguous(memory_format=format).requires_grad_()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = soft_pool2d(x, *pooling)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    finally:
        torch.set_num_threads(before)
    for y, grad in results[1:]:
        assert y.equal(results[0][0]) and grad.equal(results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel_size"),
    [((6, 14), 2), ((6, 2), 2), ((4, 46), (1, 2)), ((6, 57), 3), ((4, 6, 14), 2), ((6, 4, 38), 2)],
)
def test_disjoint_windows_do_not_mix(shape, kernel_size, dtype):
    # Vectors reach beyond short rows, and several rows are worked on together.
    axes = len(shape)
    pool = soft_pool2d if axes == 2 else soft_pool3d
    kernel = [kernel_size] * axes if isinstance(kernel_size, int) else list(kernel_size)
    x = randn(2, 3, *shape).to(dtype)
    x[0, 1] = nan
    x[1, 2] *= 20
    x.requires_grad_()
    y = pool(x, kernel_size)
    g = randn(*y.shape, seed=1).to(dtype)
    (grad,) = torch.autograd.grad(y, x, g)
    value, slope = definition.soft_pool(
        x.detach(), y.shape[2:], kernel, kernel, [0] * axes, [1] * axes, grad_output=g
    )
    rtol = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}[dtype]
    for got, wanted in ((y.detach(), value), (grad, slope)):
        close = (got.double() - wanted).abs() <= rtol * 4 * wanted.abs().clamp(min=1)
        assert (close | (got.isnan() & wanted.isnan())).all()


def test_windows_that_overlap_in_three_dimensions():
    x = rand(1, 17, 9, 9, 20) * 6
    value, slope = definition.soft_pool(x[:, :1], x.shape[2:], [5] * 3, [1] * 3, [2] * 3, [1] * 3)
    for format in (torch.contiguous_format, torch.channels_last_3d):
        ours = x.detach().contiguous(memory_format=format).requires_grad_()
        y = soft_pool3d(ours, 5, 1, 2)
        torch.testing.assert_close(y[:, :1].double(), value, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(y.sum(), ours)
        torch.testing.assert_close(grad[:, :1].double(), slope, rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("pooling", [(3, 1, 1), (3, 2, 1), ((5, 3, 3), (1, 2, 2), (2, 1, 1))])
def test_windows_that_overlap_in_depth_are_the_definition(format, pooling):
    x = randn(2, 17, 9, 8, 10).contiguous(memory_format=format).requires_grad_()
    y = soft_pool3d(x, *pooling)
    grid = [[n] * 3 if isinstance(n, int) else list(n) for n in pooling]
    g = rand(*y.shape, seed=1)
    (grad,) = torch.autograd.grad(y, x, g)
    value, slope = definition.soft_pool(
        x.detach()[1:, 16:], y.shape[2:], *grid, [1] * 3, grad_output=g[1:, 16:]
    )
    torch.testing.assert_close(y[1:, 16:].double(), value, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad[1:, 16:].double(), slope, rtol=0, atol=1e-5)
