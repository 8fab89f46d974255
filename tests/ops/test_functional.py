"""The functions against their definition, closed forms and torch's own pools.

With the fixture ``backend`` a test runs on the compiled kernels and on the reference.
"""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mmsoftpool import (
    SoftPool2d,
    soft_pool1d,
    soft_pool2d,
    soft_pool3d,
)
from mmsoftpool.ops.pooling import Pooling

from ..common import rand, randn
from . import definition

# torch warns that the reference takes the compiled kernel's place; see the fixture `backend`.
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

inf, nan = math.inf, math.nan
X = torch.zeros(1, 1, 8, 8)


class TestValue:
    @pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 13)])
    @pytest.mark.parametrize("pooling", definition.POOLINGS)
    def test_float32_is_the_definition_to_1e_6(self, backend, pooling, size):
        # Relative: for inputs of one sign, as after a ReLU, nothing cancels.
        x = rand(2, 3, *size, seed=0) * 6
        y, _ = definition.soft_pool2d(x, pooling)
        torch.testing.assert_close(soft_pool2d(x, *pooling).double(), y, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("pooling", definition.POOLINGS)
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 30.0, 1e30])
    def test_mixed_signs_and_magnitudes(self, backend, pooling, scale):
        x = randn(2, 2, 7, 9, seed=1) * scale
        y, _ = definition.soft_pool2d(x, pooling)
        torch.testing.assert_close(soft_pool2d(x, *pooling).double(), y, rtol=0, atol=1e-6 * scale)

    @pytest.mark.parametrize(
        ("dtype", "rtol"),
        [(torch.float64, 1e-13), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
    )
    def test_other_dtypes_to_their_rounding(self, backend, dtype, rtol):
        x = (rand(2, 3, 7, 9, seed=2) * 6).to(dtype)
        y = soft_pool2d(x, 3, 2, 1)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double(), definition.soft_pool2d(x, (3, 2, 1, 1, False))[0], rtol=rtol, atol=0
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_16_bit_types_round_once_and_keep_their_special_values(self, backend, dtype, format):
        limits = torch.finfo(dtype)
        subnormal = limits.smallest_normal / 4
        values = [0.0, -0.0, limits.max, limits.min, limits.tiny, -subnormal, inf, -inf, nan, 1.0]
        values += randn(38, seed=2).tolist()
        x = torch.tensor(values).to(dtype).reshape(1, 16, 1, 3).contiguous(memory_format=format)
        same = x.masked_fill(x == inf, nan)  # inf in a window gives NaN
        torch.testing.assert_close(soft_pool2d(x, 1), same, rtol=0, atol=0, equal_nan=True)
        # The float32 result, rounded to nearest even by torch.
        x = randn(2, 19, 9, 11, seed=3).to(dtype)
        x = (x * torch.logspace(-6, 3, 19)[:, None, None].to(dtype)).contiguous(
            memory_format=format
        )
        assert soft_pool2d(x, 3, 2, 1).equal(soft_pool2d(x.float(), 3, 2, 1).to(dtype))
        g = randn(2, 19, 5, 6, seed=4).to(dtype)
        arguments = Pooling.check(2, 3, 2, 1)
        backward = torch.ops.mmsoftpool.soft_pool_backward
        assert backward(g, x, *arguments).equal(
            backward(g.float(), x.float(), *arguments).to(dtype)
        )

    def test_a_window_of_equal_values_gives_that_value(self, backend):
        for value in (0.0, -3.25, 1e-38, 3.4e38, -3.4e38):
            x = torch.full((1, 1, 6, 6), value)
            assert (soft_pool2d(x, 3, 2, 1) == value).all()

    def test_two_taps_in_closed_form(self, backend):
        a, b = 0.3, -1.2
        y = soft_pool1d(torch.tensor([[a, b]], dtype=torch.float64), 2)
        assert y.item() == pytest.approx((a + b * math.exp(b - a)) / (1 + math.exp(b - a)), 1e-14)

    def test_lies_between_average_and_max(self, backend):
        x = randn(2, 3, 16, 16, seed=3)
        y = soft_pool2d(x, 2)
        assert (y <= F.max_pool2d(x, 2) + 1e-6).all() and (y >= F.avg_pool2d(x, 2) - 1e-6).all()

    def test_padding_is_absent_not_zero(self, backend):
        x = torch.full((1, 1, 4, 4), -5.0)
        assert (soft_pool2d(x, 3, 2, 1) == -5).all()

    def test_padding_per_side(self, backend):
        x = randn(1, 2, 6, 6, seed=4)
        framed = F.pad(x, (1, 0, 0, 1), value=-inf)  # left 1, right 0, top 0, bottom 1
        y = soft_pool2d(x, 2, 2, padding=((0, 1), (1, 0)))
        torch.testing.assert_close(y, soft_pool2d(framed, 2, 2))

    @pytest.mark.parametrize("pool", [soft_pool1d, soft_pool2d, soft_pool3d])
    def test_dimensions_agree_with_torch_in_shape_and_with_the_definition(self, backend, pool):
        axes = (soft_pool1d, soft_pool2d, soft_pool3d).index(pool) + 1
        x = rand(2, 2, *(5, 6, 7)[:axes], seed=5)
        out = getattr(F, f"max_pool{axes}d")(x, 3, 2, 1).shape
        value, _ = definition.soft_pool(x, out[2:], [3] * axes, [2] * axes, [1] * axes, [1] * axes)
        y = pool(x, 3, 2, 1)
        assert y.shape == out
        torch.testing.assert_close(y.double(), value, rtol=1e-6, atol=0)
        torch.testing.assert_close(pool(x[0], 3, 2, 1), y[0], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("pooling", definition.POOLINGS)
    @pytest.mark.parametrize("channels", [1, 3, 16, 37])  # around the width of a vector
    def test_channels_last_is_the_definition_and_stays_channels_last(
        self, backend, pooling, channels
    ):
        x = rand(2, channels, 7, 9, seed=6) * 6
        last = x.to(memory_format=torch.channels_last).requires_grad_()
        y, truth = definition.soft_pool2d(x, pooling)
        value = soft_pool2d(last, *pooling)
        torch.testing.assert_close(value.double(), y, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(value.sum(), last)
        torch.testing.assert_close(grad.double(), truth, rtol=0, atol=1e-5)
        if channels > 1:
            assert value.is_contiguous(memory_format=torch.channels_last)
            assert grad.is_contiguous(memory_format=torch.channels_last)

    def test_channels_last_3d(self, backend):
        x = rand(2, 5, 6, 7, 8, seed=6)
        last = x.to(memory_format=torch.channels_last_3d)
        value, grads = [], []
        for t in (x, last):
            t.requires_grad_()
            value.append(soft_pool3d(t, 3, 2, 1))
            grads += torch.autograd.grad(value[-1].sum(), t)
        assert value[1].is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(value[1], value[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-6)

    def test_any_other_strides_give_a_contiguous_result(self, backend):
        x = randn(2, 4, 9, 10, seed=6)
        y = soft_pool2d(x, 3, 2, 1)
        for other in (
            x.transpose(2, 3).contiguous().transpose(2, 3),
            torch.stack([x, x], -1)[..., 1],
            torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :4],
        ):
            assert not other.is_contiguous()
            assert soft_pool2d(other, 3, 2, 1).is_contiguous()
            torch.testing.assert_close(soft_pool2d(other, 3, 2, 1), y, rtol=0, atol=1e-6)

    def test_unbatched_input_is_left_alone(self, backend):
        x = torch.randn(3, 6, 6)
        before = x.clone()
        assert soft_pool2d(x, 2).shape == (3, 3, 3)
        assert x.shape == before.shape and x.equal(before)

    def test_long_rows_and_large_kernels(self, backend):
        # Longer than what the kernel works on at once, and more taps than fit its buffer.
        x = rand(1, 1, 3, 1000, seed=7)
        y, _ = definition.soft_pool2d(x, (3, 1, 1, 1, False))
        torch.testing.assert_close(soft_pool2d(x, 3, 1, 1).double(), y, rtol=1e-6, atol=0)
        x = rand(1, 1, 40, 60, seed=8)
        y, _ = definition.soft_pool2d(x, ((40, 31), (1, 1), 0, 1, False))
        torch.testing.assert_close(soft_pool2d(x, (40, 31), 1).double(), y, rtol=2e-6, atol=0)

    def test_empty_batch(self, backend):
        x = torch.empty(0, 3, 8, 8, requires_grad=True)
        y = soft_pool2d(x, 2)
        assert y.shape == (0, 3, 4, 4)
        y.sum().backward()
        assert x.grad.shape == x.shape


class TestAlpha:
    @pytest.mark.parametrize("alpha", definition.ALPHAS)
    @pytest.mark.parametrize("pooling", definition.POOLINGS)
    def test_is_the_definition(self, backend, pooling, alpha):
        x = rand(2, 3, 7, 9) * 6
        y, _ = definition.soft_pool2d(x, pooling, alpha=alpha)
        result = soft_pool2d(x, *pooling, alpha=alpha)
        torch.testing.assert_close(result.double(), y, rtol=1e-6 * max(1, alpha / 4), atol=0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_0_averages_the_taps_that_are_present(self, backend, dtype, format):
        x = randn(2, 19, 9, 11).to(dtype).contiguous(memory_format=format)
        y = soft_pool2d(x, 3, 2, 1, alpha=0)
        average = F.avg_pool2d(x.double(), 3, 2, 1, count_include_pad=False).to(dtype)
        torch.testing.assert_close(y, average, rtol=torch.finfo(dtype).eps, atol=1e-6)

    @pytest.mark.parametrize("alpha", [1e6, 1e30, 1e300])
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_large_is_max_pooling(self, backend, format, alpha):
        x = randn(2, 19, 9, 11).contiguous(memory_format=format).requires_grad_()
        y = soft_pool2d(x, 3, 2, 1, alpha=alpha)
        maximum = F.max_pool2d(x, 3, 2, 1)
        assert y.equal(maximum)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.equal(torch.autograd.grad(maximum.sum(), x)[0])

    @pytest.mark.parametrize("alpha", [0.5, 4.0, 30.0])
    def test_scales_the_input_of_the_papers_pool(self, backend, alpha):
        # softmax(alpha x) x = soft_pool(alpha x) / alpha
        x = randn(2, 3, 9, 11).double()
        torch.testing.assert_close(
            soft_pool2d(x, 3, 2, 1, alpha=alpha),
            soft_pool2d(alpha * x, 3, 2, 1) / alpha,
            rtol=1e-14,
            atol=1e-15,
        )

    def test_two_taps_in_closed_form(self, backend):
        a, b, alpha = 0.3, -1.2, 2.5
        y = soft_pool1d(torch.tensor([[a, b]], dtype=torch.float64), 2, alpha=alpha)
        ratio = math.exp(alpha * (b - a))
        assert y.item() == pytest.approx((a + b * ratio) / (1 + ratio), 1e-14)

    @pytest.mark.parametrize("alpha", [0, 1e-40, 0.5, 4.0, 1e30])
    @pytest.mark.parametrize("gradient", ["exact", "paper"])
    def test_special_values_are_the_same_for_every_alpha(self, backend, alpha, gradient):
        x = torch.tensor([[-inf, 1.0], [-inf, -inf], [nan, 1.0], [inf, 1.0], [-inf, nan]])
        x.requires_grad_()
        y = soft_pool1d(x, 2, alpha=alpha, gradient=gradient)
        assert y[:2].tolist() == [[1.0], [-inf]] and y[2:].isnan().all()
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad[:2].tolist() == [[0.0, 1.0], [0.0, 0.0]] and grad[2:].isnan().all()

    @pytest.mark.parametrize("alpha", [0.0, 1e-38, 1e-37])
    def test_differences_may_be_larger_than_the_largest_number(self, backend, alpha):
        x = torch.tensor([[[[-3e38, 3e38, 1e38, -2e38]]]])
        y, _ = definition.soft_pool2d(x, ((1, 2), (1, 2), 0, 1, False), alpha=alpha)
        torch.testing.assert_close(
            soft_pool2d(x, (1, 2), alpha=alpha).double(), y, rtol=0, atol=1e-6 * 3e38
        )

    @pytest.mark.parametrize("alpha", [1.0, 1e-7])
    @pytest.mark.parametrize("size", [1e-20, 1e-28, 1e-34])
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_small_gradients_keep_their_digits(self, backend, format, size, alpha):
        x = (randn(1, 16, 9, 17) / alpha).to(memory_format=format).requires_grad_()
        y = soft_pool2d(x, 3, 2, 1, alpha=alpha)
        grad_output = torch.full_like(y, size)
        _, expected = definition.soft_pool2d(x, (3, 2, 1, 1, False), grad_output, alpha=alpha)
        (grad,) = torch.autograd.grad(y, x, grad_output)
        largest = float(expected.abs().max())
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-6 * largest)

    @pytest.mark.parametrize("alpha", [0, 1e-40, 1.0, 1e38])
    @pytest.mark.parametrize("scale", [1e-40, 1.0, 1e37])
    def test_is_finite_between_the_average_and_the_maximum(self, backend, alpha, scale):
        x = (randn(2, 3, 8, 8) * scale).requires_grad_()
        y = soft_pool2d(x, 2, alpha=alpha)
        # Denormal numbers lose bits for a tiny alpha: they are scaled down to keep sums finite.
        slack = 1e-6 * scale + 64 * 1.4e-45
        assert (y <= F.max_pool2d(x, 2) + slack).all()
        assert (y >= F.avg_pool2d(x, 2) - slack).all()
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


class TestNotFinite:
    def test_minus_infinity_has_no_weight(self, backend):
        x = torch.tensor([[[1.0, -inf], [-inf, 0.5]]], requires_grad=True)
        y = soft_pool2d(x, 2)
        assert y.item() == soft_pool1d(torch.tensor([[1.0, 0.5]]), 2).item()
        y.sum().backward()
        assert x.grad[0, 0, 1] == 0 and x.grad[0, 1, 0] == 0
        assert x.grad.sum().item() == pytest.approx(1, abs=1e-6)

    def test_nothing_but_minus_infinity(self, backend):
        x = torch.full((1, 2, 2), -inf, requires_grad=True)
        y = soft_pool2d(x, 2)
        assert y.item() == -inf
        y.sum().backward()
        assert (x.grad == 0).all()

    def test_a_window_outside_the_input_is_that_too(self, backend):
        x = torch.zeros(1, 1, 1)
        assert F.max_pool2d(x, 2, 1, 1, 2).item() == soft_pool2d(x, 2, 1, 1, 2).item() == -inf

    @pytest.mark.parametrize("bad", [nan, inf])
    @pytest.mark.parametrize("gradient", ["exact", "paper"])
    def test_nan_and_infinity_give_nan_in_their_windows_alone(self, backend, bad, gradient):
        x = torch.zeros(1, 1, 4, 6)
        x[0, 0, 0, 1] = bad
        x.requires_grad_()
        y = soft_pool2d(x, 2, gradient=gradient)
        assert y.isnan().nonzero().tolist() == [[0, 0, 0, 0]]
        y.sum().backward()
        assert x.grad.isnan().nonzero()[:, 2:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]

    def test_nan_beside_minus_infinity(self, backend):
        assert soft_pool1d(torch.tensor([[-inf, nan]]), 2).isnan().all()
        assert soft_pool1d(torch.tensor([[nan, nan]]), 2).isnan().all()

    @pytest.mark.parametrize(
        ("dtype", "value"), [(torch.float32, 89.0), (torch.float16, 12.0), (torch.float32, -110.0)]
    )
    def test_no_overflow_or_underflow_where_the_exponential_has_one(self, backend, dtype, value):
        x = torch.full((1, 2, 2), value, dtype=dtype, requires_grad=True)
        y = soft_pool2d(x, 2)
        assert y.item() == value
        y.sum().backward()
        assert (x.grad == 0.25).all()

    def test_the_whole_range_of_float32_in_one_window(self, backend):
        limits = torch.finfo(torch.float32)
        x = torch.tensor([[limits.max, limits.min, 0.0, limits.tiny]], requires_grad=True)
        y = soft_pool1d(x, 4)
        assert y.item() == limits.max
        y.sum().backward()
        assert x.grad.tolist() == [[1, 0, 0, 0]]


class TestWhatTheAuthorsOpGetsWrong:
    """One test for each fault of the original implementation that its users reported."""

    @pytest.mark.parametrize("pooling", [(3, 2), (2, 1), (3, 1)])
    def test_overlapping_windows_have_the_right_grid_and_values(self, backend, pooling):
        x = rand(1, 2, 8, 8, seed=11)
        y = soft_pool2d(x, *pooling)
        assert y.shape == F.max_pool2d(x, *pooling).shape
        truth, _ = definition.soft_pool2d(x, (*pooling, 0, 1, False))
        torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=0)

    def test_odd_sizes_stay_inside_the_tensors(self, backend):
        whole = torch.full((7 * 9 + 64,), nan)
        x = whole[32 : 32 + 7 * 9].view(1, 1, 7, 9)
        x.copy_(torch.rand(7, 9))
        assert not soft_pool2d(x, 2).isnan().any()  # a read outside would be NaN
        assert whole[:32].isnan().all() and whole[-32:].isnan().all()

    def test_channels_do_not_mix_and_negative_values_count(self, backend):
        x = -rand(1, 3, 4, 4, seed=12) * 5
        alone = torch.cat([soft_pool2d(x[:, c : c + 1], 2) for c in range(3)], 1)
        torch.testing.assert_close(soft_pool2d(x, 2), alone, rtol=1e-6, atol=0)
        assert (soft_pool2d(x, 2) < 0).all()

    def test_channels_last_has_a_backward(self, backend):
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        soft_pool2d(x, 2).sum().backward()
        assert x.grad.is_contiguous(memory_format=torch.channels_last)

    def test_forward_and_backward_agree_on_the_windows_in_3d(self, backend):
        x = torch.randn(1, 1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: soft_pool3d(x, 3, 2, 1), x)


class TestArguments:
    @pytest.mark.parametrize("pooling", definition.POOLINGS)
    @pytest.mark.parametrize("size", [(9, 9), (10, 13), (11, 12), (17, 16)])
    def test_output_size_is_that_of_max_pool2d(self, pooling, size):
        x = torch.zeros(1, 1, *size)
        assert soft_pool2d(x, *pooling).shape == F.max_pool2d(x, *pooling).shape

    @pytest.mark.parametrize("ceil_mode", [False, True])
    def test_output_size_or_error_is_that_of_max_pool1d(self, ceil_mode):
        grid = itertools.product(
            range(1, 14), (1, 2, 3, 4, 7), (1, 2, 3, 5, 8), (0, 1, 2, 3), (1, 2, 3)
        )
        count = 0
        for size, kernel, stride, padding, dilation in grid:
            if padding > kernel // 2:
                continue
            count += 1
            x = torch.zeros(1, 1, size)
            arguments = (kernel, stride, padding, dilation, ceil_mode)
            try:
                shape = F.max_pool1d(x, *arguments).shape
            except RuntimeError:
                with pytest.raises(ValueError, match="is too small"):
                    soft_pool1d(x, *arguments)
                continue
            assert soft_pool1d(x, *arguments).shape == shape, (size, arguments)
            assert soft_pool1d(x.to("meta"), *arguments).shape == shape
        assert count > 2000

    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(
        "pooling",
        [
            (3, 2, 0, 1, True),
            (9, 9, 0, 1, True),
            ((2, 40), (2, 40), (1, 3), 1, True),
            (5, 9, 2, 2, True),
            (64, 64, 0, 1, True),  # EfficientNet's, of which 2560 is the number of channels
        ],
    )
    def test_a_window_larger_than_the_map_in_ceil_mode(self, backend, pooling, format):
        for size in ((2, 2), (2, 3), (2, 7)):
            x = randn(2, 20, *size).contiguous(memory_format=format).requires_grad_()
            y, truth = definition.soft_pool2d(x[:1, :2], pooling)
            value = soft_pool2d(x, *pooling)
            assert value.shape == F.max_pool2d(x, *pooling).shape
            torch.testing.assert_close(value[:1, :2].double(), y, rtol=0, atol=2e-6)
            (grad,) = torch.autograd.grad(value.sum(), x)
            torch.testing.assert_close(grad[:1, :2].double(), truth, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("stride", [None, [], ()])
    def test_stride_defaults_to_kernel_size(self, stride):
        assert soft_pool2d(torch.zeros(1, 7, 9), (2, 3), stride).shape == (1, 3, 3)

    def test_numpys_numbers_are_numbers(self):
        three, two, one = np.int64(3), np.int32(2), np.uint8(1)
        y = soft_pool2d(X, three, [two, two], one, alpha=np.float32(0.5))
        assert y.equal(soft_pool2d(X, 3, 2, 1, alpha=0.5))

    @pytest.mark.parametrize(
        ("error", "message", "change"),
        [
            (TypeError, "input .* torch.Tensor, got list", dict(input=[1.0])),
            (TypeError, "input .* float16.*got torch.int64", dict(input=X.long())),
            (TypeError, "input .*got torch.complex64", dict(input=X.cfloat())),
            (ValueError, r"input .*\(N, C, H, W\).*\(8, 8\)", dict(input=X[0, 0])),
            (ValueError, r"input .*\(N, C, H, W\)", dict(input=X[None])),
            (ValueError, "kernel_size must be an int >= 1 .*got 0", dict(kernel_size=0)),
            (TypeError, "kernel_size must be .*got 2.0", dict(kernel_size=2.0)),
            (TypeError, "kernel_size must be .*got True", dict(kernel_size=True)),
            (ValueError, r"kernel_size .*2 of them.*\(2, 2, 2\)", dict(kernel_size=(2, 2, 2))),
            (ValueError, "stride must be .*got 0", dict(stride=0)),
            (ValueError, "dilation must be .*got -1", dict(dilation=-1)),
            (ValueError, "padding must be an int >= 0", dict(padding=-1)),
            (ValueError, "padding .* half of kernel_size.*padding=2", dict(padding=2)),
            (ValueError, "padding .* pairs", dict(padding=((1, 0), 1))),
            (
                ValueError,
                r"padding .* >= 0 .*2 of them, got \(1, -1\)",
                dict(padding=((1, -1), (0, 0))),
            ),
            (TypeError, "ceil_mode must be True or False, got 1", dict(ceil_mode=1)),
            (ValueError, "alpha must be a finite number >= 0, got -1", dict(alpha=-1)),
            (ValueError, "alpha must be a finite number >= 0, got inf", dict(alpha=inf)),
            (ValueError, "alpha must be a finite number >= 0, got nan", dict(alpha=nan)),
            (ValueError, "alpha must be a finite number >= 0, got 10000", dict(alpha=10**400)),
            (TypeError, "alpha must be a finite number >= 0, got '2'", dict(alpha="2")),
            (TypeError, "alpha must be .*tensor", dict(alpha=torch.tensor(2.0))),
            (ValueError, "gradient must be 'exact' or 'paper', got 'x'", dict(gradient="x")),
            *(
                (ValueError, rf"{name} must be an int .* < 2\*\*31 .*got {2**31}", {name: 2**31})
                for name in ("kernel_size", "stride", "padding", "dilation")
            ),
            (
                ValueError,
                rf"stride must be .*got \(1, {2**70}",
                dict(stride=(1, 2**70)),
            ),
            (ValueError, r"too small: kernel_size=\(9, 9\)", dict(kernel_size=9)),
            (ValueError, r"\(0, 8\) is too small", dict(input=X[..., :0, :], padding=1)),
        ],
    )
    def test_bad_ones_are_named(self, error, message, change):
        with pytest.raises(error) as info:
            soft_pool2d(**{**dict(input=X, kernel_size=3), **change})
        assert re.search(message, str(info.value))

    def test_the_raw_operator_is_safe_too(self):
        pool = torch.ops.mmsoftpool.soft_pool
        x = torch.zeros(1, 1, 4, 4)
        for arguments in (
            ([3, 3], [2, 2], [2, 2, 2, 2], [1, 1], False),
            ([0, 3], [2, 2], [0, 0, 0, 0], [1, 1], False),
            ([3, 3], [0, 2], [0, 0, 0, 0], [1, 1], False),
            ([3], [2], [0, 0], [1], False),
            ([5, 5], [1, 1], [0, 0, 0, 0], [1, 1], False),
        ):
            with pytest.raises(RuntimeError, match="soft_pool"):
                pool(x, *arguments, 1.0, "exact")
        for alpha in (-1.0, inf, nan):
            with pytest.raises(RuntimeError, match="alpha"):
                pool(x, [2, 2], [2, 2], [0] * 4, [1, 1], False, alpha, "exact")
        with pytest.raises(RuntimeError, match="grad_output"):
            torch.ops.mmsoftpool.soft_pool_backward(
                torch.zeros(1, 1, 9, 9), x, [2, 2], [2, 2], [0] * 4, [1, 1], False, 1.0, "exact"
            )


class TestModule:
    def test_is_the_function(self):
        x = torch.randn(1, 2, 9, 9)
        module = SoftPool2d(3, stride=2, padding=1, gradient="paper")
        assert module(x).equal(soft_pool2d(x, 3, 2, 1))
        assert list(module.state_dict()) == []
        assert repr(module) == (
            "SoftPool2d(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, "
            "alpha=1.0, gradient='paper')"
        )

    def test_takes_the_arguments_of_max_pool_in_their_order(self):
        x = randn(1, 2, 8, 8)
        for arguments in ((3, 2, 1, 1, False, True), (3, 2, 1, 1, False), (3, 2)):
            assert SoftPool2d(*arguments)(x).shape == torch.nn.MaxPool2d(*arguments)(x).shape
        with pytest.raises(ValueError, match="return_indices must be False, got True"):
            SoftPool2d(3, 2, 1, 1, True)

    def test_reports_bad_arguments_when_it_is_built(self):
        with pytest.raises(ValueError, match="padding must be at most half"):
            SoftPool2d(2, padding=2)
