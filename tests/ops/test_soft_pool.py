"""The operator against its definition, closed forms and torch's own pools.

Every test runs on what users call. ``backend`` makes it run twice: on the compiled kernels and on
the pure PyTorch reference.
"""

import functools
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends import registry
from torch.autograd import gradcheck, gradgradcheck

import mmsoftpool
from mmsoftpool import SoftPool2d, soft_pool1d, soft_pool2d, soft_pool3d
from mmsoftpool.ops import functional, library, reference

from .definition import soft_pool as definition

# torch warns that the reference takes the compiled kernel's place; see the fixture `backend`.
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

inf, nan = math.inf, math.nan
X = torch.zeros(1, 1, 8, 8)

# kernel_size, stride, padding, dilation, ceil_mode
POOLINGS = [
    (2, 2, 0, 1, False),  # the authors' stem
    (3, 2, 1, 1, False),  # ResNet's stem
    (3, 2, 1, 1, True),
    (3, 1, 1, 1, False),
    (2, 1, 0, 1, False),
    (1, 1, 0, 1, False),
    (3, 5, 1, 1, False),  # windows with gaps
    (5, 2, 2, 2, True),
    ((3, 2), (1, 3), (1, 0), (2, 1), True),
    ((2, 5), (3, 2), (1, 2), (1, 2), False),
]


@pytest.fixture(params=["compiled", "reference"])
def backend(request, monkeypatch):
    if request.param == "compiled":
        yield request.param
        return
    override = {"allow_override": True} if library.TORCH_VERSION >= (2, 5) else {}
    scoped = torch.library.Library("mmsoftpool", "IMPL")
    scoped.impl("soft_pool", reference.soft_pool, "CPU", **override)
    scoped.impl("soft_pool_backward", reference.soft_pool_backward, "CPU", **override)
    yield request.param
    del scoped


def since(*version):
    return pytest.mark.skipif(
        version > library.TORCH_VERSION,
        reason="torch {}.{} and later have this".format(*version),
    )


def pair(value):
    return (value, value) if isinstance(value, int) else value


def expected(x, pooling, grad_output=None, gradient="exact"):
    kernel_size, stride, padding, dilation, ceil_mode = pooling
    out = F.max_pool2d(x.detach().float(), kernel_size, stride, padding, dilation, ceil_mode).shape
    return definition(
        x.detach(),
        out[2:],
        pair(kernel_size),
        pair(stride),
        pair(padding),
        pair(dilation),
        grad_output,
        gradient,
    )


def test_the_compiled_library_is_what_runs():
    assert re.search(r"libmmsoftpool_cpu(-torch[\d.]+)?\.so$", library.BACKENDS["cpu"])


class TestValue:
    @pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 13)])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_float32_is_the_definition_to_1e_6(self, backend, pooling, size):
        # Relative: for inputs of one sign, as after a ReLU, nothing cancels.
        x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 6
        y, _ = expected(x, pooling)
        torch.testing.assert_close(soft_pool2d(x, *pooling).double(), y, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 30.0, 1e30])
    def test_mixed_signs_and_magnitudes(self, backend, pooling, scale):
        x = torch.randn(2, 2, 7, 9, generator=torch.Generator().manual_seed(1)) * scale
        y, _ = expected(x, pooling)
        torch.testing.assert_close(soft_pool2d(x, *pooling).double(), y, rtol=0, atol=1e-6 * scale)

    @pytest.mark.parametrize(
        ("dtype", "rtol"),
        [(torch.float64, 1e-13), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
    )
    def test_other_dtypes_to_their_rounding(self, backend, dtype, rtol):
        x = (torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(2)) * 6).to(dtype)
        y = soft_pool2d(x, 3, 2, 1)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double(), expected(x, (3, 2, 1, 1, False))[0], rtol=rtol, atol=0
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_16_bit_types_round_once_and_keep_their_special_values(self, backend, dtype, format):
        limits = torch.finfo(dtype)
        subnormal = limits.smallest_normal / 4
        values = [0.0, -0.0, limits.max, limits.min, limits.tiny, -subnormal, inf, -inf, nan, 1.0]
        values += torch.randn(38, generator=torch.Generator().manual_seed(2)).tolist()
        x = torch.tensor(values).to(dtype).reshape(1, 16, 1, 3).contiguous(memory_format=format)
        same = x.masked_fill(x == inf, nan)  # inf in a window gives NaN
        torch.testing.assert_close(soft_pool2d(x, 1), same, rtol=0, atol=0, equal_nan=True)
        # The float32 result, rounded to nearest even by torch.
        x = torch.randn(2, 19, 9, 11, generator=torch.Generator().manual_seed(3)).to(dtype)
        x = (x * torch.logspace(-6, 3, 19)[:, None, None].to(dtype)).contiguous(
            memory_format=format
        )
        assert soft_pool2d(x, 3, 2, 1).equal(soft_pool2d(x.float(), 3, 2, 1).to(dtype))
        g = torch.randn(2, 19, 5, 6, generator=torch.Generator().manual_seed(4)).to(dtype)
        arguments = functional.check_pooling(2, 3, 2, 1)
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
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        y = soft_pool2d(x, 2)
        assert (y <= F.max_pool2d(x, 2) + 1e-6).all() and (y >= F.avg_pool2d(x, 2) - 1e-6).all()

    def test_padding_is_absent_not_zero(self, backend):
        x = torch.full((1, 1, 4, 4), -5.0)
        assert (soft_pool2d(x, 3, 2, 1) == -5).all()

    def test_padding_per_side(self, backend):
        x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(4))
        framed = F.pad(x, (1, 0, 0, 1), value=-inf)  # left 1, right 0, top 0, bottom 1
        y = soft_pool2d(x, 2, 2, padding=((0, 1), (1, 0)))
        torch.testing.assert_close(y, soft_pool2d(framed, 2, 2))

    @pytest.mark.parametrize("pool", [soft_pool1d, soft_pool2d, soft_pool3d])
    def test_dimensions_agree_with_torch_in_shape_and_with_the_definition(self, backend, pool):
        axes = (soft_pool1d, soft_pool2d, soft_pool3d).index(pool) + 1
        x = torch.rand(2, 2, *(5, 6, 7)[:axes], generator=torch.Generator().manual_seed(5))
        out = getattr(F, f"max_pool{axes}d")(x, 3, 2, 1).shape
        value, _ = definition(x, out[2:], [3] * axes, [2] * axes, [1] * axes, [1] * axes)
        y = pool(x, 3, 2, 1)
        assert y.shape == out
        torch.testing.assert_close(y.double(), value, rtol=1e-6, atol=0)
        torch.testing.assert_close(pool(x[0], 3, 2, 1), y[0], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("channels", [1, 3, 16, 37])  # around the width of a vector
    def test_channels_last_is_the_definition_and_stays_channels_last(
        self, backend, pooling, channels
    ):
        x = torch.rand(2, channels, 7, 9, generator=torch.Generator().manual_seed(6)) * 6
        last = x.to(memory_format=torch.channels_last).requires_grad_()
        y, truth = expected(x, pooling)
        value = soft_pool2d(last, *pooling)
        torch.testing.assert_close(value.double(), y, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(value.sum(), last)
        torch.testing.assert_close(grad.double(), truth, rtol=0, atol=1e-5)
        if channels > 1:
            assert value.is_contiguous(memory_format=torch.channels_last)
            assert grad.is_contiguous(memory_format=torch.channels_last)

    def test_channels_last_3d(self, backend):
        x = torch.rand(2, 5, 6, 7, 8, generator=torch.Generator().manual_seed(6))
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
        x = torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(6))
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
        x = torch.rand(1, 1, 3, 1000, generator=torch.Generator().manual_seed(7))
        y, _ = expected(x, (3, 1, 1, 1, False))
        torch.testing.assert_close(soft_pool2d(x, 3, 1, 1).double(), y, rtol=1e-6, atol=0)
        x = torch.rand(1, 1, 40, 60, generator=torch.Generator().manual_seed(8))
        y, _ = expected(x, ((40, 31), (1, 1), 0, 1, False))
        torch.testing.assert_close(soft_pool2d(x, (40, 31), 1).double(), y, rtol=2e-6, atol=0)

    def test_empty_batch(self, backend):
        x = torch.empty(0, 3, 8, 8, requires_grad=True)
        y = soft_pool2d(x, 2)
        assert y.shape == (0, 3, 4, 4)
        y.sum().backward()
        assert x.grad.shape == x.shape


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


class TestGradient:
    @pytest.mark.parametrize("gradient", ["exact", "paper"])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_is_the_definition(self, backend, pooling, gradient):
        x = torch.randn(2, 2, 7, 9, generator=torch.Generator().manual_seed(9)).requires_grad_()
        y = soft_pool2d(x, *pooling, gradient=gradient)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(10))
        (grad,) = torch.autograd.grad(y, x, g)
        _, truth = expected(x, pooling, g, gradient)
        torch.testing.assert_close(grad.double(), truth, rtol=0, atol=3e-6)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_gradcheck_and_gradgradcheck(self, backend, pooling):
        x = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: soft_pool2d(x, *pooling), x)
        assert gradgradcheck(lambda x: soft_pool2d(x, *pooling), x)

    def test_the_papers_gradient_has_a_derivative_too(self, backend):
        arguments = functional.check_pooling(2, 3, 2, 1, gradient="paper")
        x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
        g = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        backward = torch.ops.mmsoftpool.soft_pool_backward
        assert gradcheck(lambda g, x: backward(g, x, *arguments), (g, x))

    def test_the_exact_gradient_of_shifting_a_window_is_one(self, backend):
        # y(x + c) = y(x) + c, so the gradients of a window add up to 1.
        x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(soft_pool2d(x, 2).sum(), x)
        torch.testing.assert_close(F.avg_pool2d(grad, 2) * 4, torch.ones_like(grad[..., :4, :4]))

    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_does_not_depend_on_the_number_of_threads(self, format):
        x = torch.randn(1, 80, 17, 23).to(memory_format=format).requires_grad_()
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                y = soft_pool2d(x, 3, 2, 1)
                results.append((y, *torch.autograd.grad(y.sum(), x)))
        finally:
            torch.set_num_threads(threads)
        for y, grad in results[1:]:
            assert y.equal(results[0][0]) and grad.equal(results[0][1])

    def test_only_the_input_is_saved(self):
        saved = []
        x = torch.randn(1, 2, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            soft_pool2d(x, 3, 2, 1)
        assert [t.data_ptr() for t in saved] == [x.data_ptr()]


class TestWhatTheAuthorsOpGetsWrong:
    """One test for each fault of the original implementation that its users reported."""

    @pytest.mark.parametrize("pooling", [(3, 2), (2, 1), (3, 1)])
    def test_overlapping_windows_have_the_right_grid_and_values(self, backend, pooling):
        x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(11))
        y = soft_pool2d(x, *pooling)
        assert y.shape == F.max_pool2d(x, *pooling).shape
        truth, _ = expected(x, (*pooling, 0, 1, False))
        torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=0)

    def test_odd_sizes_stay_inside_the_tensors(self, backend):
        whole = torch.full((7 * 9 + 64,), nan)
        x = whole[32 : 32 + 7 * 9].view(1, 1, 7, 9)
        x.copy_(torch.rand(7, 9))
        assert not soft_pool2d(x, 2).isnan().any()  # a read outside would be NaN
        assert whole[:32].isnan().all() and whole[-32:].isnan().all()

    def test_channels_do_not_mix_and_negative_values_count(self, backend):
        x = -torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(12)) * 5
        alone = torch.cat([soft_pool2d(x[:, c : c + 1], 2) for c in range(3)], 1)
        torch.testing.assert_close(soft_pool2d(x, 2), alone, rtol=1e-6, atol=0)
        assert (soft_pool2d(x, 2) < 0).all()

    def test_channels_last_has_a_backward(self, backend):
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        soft_pool2d(x, 2).sum().backward()
        assert x.grad.is_contiguous(memory_format=torch.channels_last)

    def test_forward_and_backward_agree_on_the_windows_in_3d(self, backend):
        x = torch.randn(1, 2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: soft_pool3d(x, 3, 2, 1), x)


class TestArguments:
    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("size", [(9, 9), (10, 13), (11, 12), (17, 16)])
    def test_output_size_is_that_of_max_pool2d(self, pooling, size):
        x = torch.zeros(1, 1, *size)
        assert soft_pool2d(x, *pooling).shape == F.max_pool2d(x, *pooling).shape

    def test_stride_defaults_to_kernel_size(self):
        assert soft_pool2d(torch.zeros(1, 7, 9), (2, 3)).shape == (1, 3, 3)

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
            (TypeError, "ceil_mode must be True or False, got 1", dict(ceil_mode=1)),
            (ValueError, "gradient must be 'exact' or 'paper', got 'x'", dict(gradient="x")),
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
                pool(x, *arguments, "exact")
        with pytest.raises(RuntimeError, match="grad_output"):
            torch.ops.mmsoftpool.soft_pool_backward(
                torch.zeros(1, 1, 9, 9), x, [2, 2], [2, 2], [0] * 4, [1, 1], False, "exact"
            )


class TestModule:
    def test_is_the_function(self):
        x = torch.randn(1, 2, 9, 9)
        module = SoftPool2d(3, stride=2, padding=1, gradient="paper")
        assert module(x).equal(soft_pool2d(x, 3, 2, 1))
        assert list(module.state_dict()) == []
        assert repr(module) == (
            "SoftPool2d(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, "
            "gradient='paper')"
        )

    def test_reports_bad_arguments_when_it_is_built(self):
        with pytest.raises(ValueError, match="padding must be at most half"):
            SoftPool2d(2, padding=2)


class TestPyTorch:
    @since(2, 5)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("gradient", ["exact", "paper"])
    def test_opcheck(self, dtype, format, gradient):
        arguments = functional.check_pooling(2, 3, 2, 1, gradient=gradient)
        x = torch.randn(2, 3, 7, 9, dtype=dtype).to(memory_format=format).requires_grad_()
        g = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=format).requires_grad_()
        torch.library.opcheck(torch.ops.mmsoftpool.soft_pool.default, (x, *arguments))
        torch.library.opcheck(torch.ops.mmsoftpool.soft_pool_backward.default, (g, x, *arguments))

    def test_compiles_once_for_all_sizes_without_graph_breaks(self):
        torch._dynamo.reset()
        pool = SoftPool2d(3, 2, 1)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return registry.lookup_backend("aot_eager")(graph, inputs)

        compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend=backend)
        for size in ((8, 9), (15, 12), (33, 21)):
            x = torch.randn(2, 3, *size, requires_grad=True)
            y = compiled(x)
            assert y.equal(pool(x))
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert grad.equal(torch.autograd.grad(pool(x).sum(), x)[0])
        # No recompilation for another size.
        assert len(graphs) == 1 or library.TORCH_VERSION < (2, 5)

    def test_vmap(self):
        x = torch.randn(2, 3, 4, 9, 8)
        for dim in (0, 2):
            y = torch.func.vmap(lambda t: soft_pool2d(t, 3, 2, 1), in_dims=dim)(x)
            assert y.equal(torch.stack([soft_pool2d(t, 3, 2, 1) for t in x.unbind(dim)]))
        arguments = functional.check_pooling(2, 3, 2, 1)
        backward = torch.ops.mmsoftpool.soft_pool_backward
        g, t = torch.randn(5, 3, 4, 5, 4), x[0]
        grads = torch.func.vmap(lambda g: backward(g, t.movedim(0, 1), *arguments))(g.movedim(1, 2))
        expected = torch.stack([backward(g.movedim(0, 1), t.movedim(0, 1), *arguments) for g in g])
        assert grads.equal(expected)

    def test_torch_func(self):
        pool = functools.partial(soft_pool2d, kernel_size=3, stride=2, padding=1)
        x = torch.randn(4, 2, 3, 7, 8, dtype=torch.float64, requires_grad=True)

        def loss(x):
            return pool(x).sin().sum()

        slopes, curves = [], []
        for image in x:
            (slope,) = torch.autograd.grad(loss(image), image, create_graph=True)
            slopes.append(slope)
            curves += torch.autograd.grad(slope.pow(2).sum(), image)
        slopes, curves = torch.stack(slopes).detach(), torch.stack(curves)
        grad, vmap = torch.func.grad, torch.func.vmap
        close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        close(vmap(grad(loss))(x.detach()), slopes)
        close(grad(lambda x: vmap(pool)(x).sin().sum())(x.detach()), slopes)
        close(torch.autograd.grad(vmap(pool)(x).sin().sum(), x)[0], slopes)
        close(grad(lambda x: grad(loss)(x).pow(2).sum())(x[0].detach()), curves[0])
        image = x[0, :1, :1, :3, :4].detach()
        close(torch.func.jacrev(pool)(image), torch.autograd.functional.jacobian(pool, image))

    def test_forward_mode_is_refused_and_not_silently_zero(self):
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda x: soft_pool2d(x, 2), (X,), (X,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, X)
            with pytest.raises(NotImplementedError, match="jvp"):
                soft_pool2d(dual, 2)

    def test_autocast_keeps_the_inputs_type(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert soft_pool2d(X.bfloat16(), 2).dtype == torch.bfloat16
            assert soft_pool2d(X, 2).dtype == torch.float32

    @since(2, 5)
    def test_export_with_dynamic_shapes(self):
        program = torch.export.export(
            Net(), (torch.randn(2, 3, 16, 20),), dynamic_shapes=dynamic_shapes()
        )
        assert torch.ops.mmsoftpool.soft_pool.default in [n.target for n in program.graph.nodes]
        x = torch.randn(3, 3, 33, 27)
        assert program.module()(x).equal(Net()(x))

    @since(2, 6)
    @pytest.mark.filterwarnings("ignore")
    def test_onnx_has_standard_operators_and_agrees(self, tmp_path):
        import onnx
        import onnxruntime

        path = str(tmp_path / "net.onnx")
        torch.onnx.export(
            Net(), (torch.randn(2, 3, 16, 20),), path, dynamo=True,
            dynamic_shapes=dynamic_shapes(), verbose=False,
        )  # fmt: skip
        model = onnx.load(path)
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        session = onnxruntime.InferenceSession(path)
        for size, scale in (((33, 27), 1.0), ((16, 20), 100.0)):
            x = torch.randn(3, 3, *size) * scale
            (y,) = session.run(None, {"x": x.numpy()})
            torch.testing.assert_close(torch.from_numpy(y), Net()(x), rtol=1e-5, atol=1e-5 * scale)

    def test_flop_counters(self):
        flops = 6 * 9 * 3 * 4 * 5  # 6 a tap, 9 taps, 3 x 4 x 5 outputs
        x = torch.randn(1, 3, 8, 10, requires_grad=True)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            soft_pool2d(x, 3, 2, 1)
        assert counter.get_total_flops() == flops
        analysis = pytest.importorskip("mmengine.analysis")
        conv = torch.nn.Conv2d(3, 3, 1)  # mmengine wants a model with parameters
        alone, pooled = (
            analysis.get_model_complexity_info(model, (3, 8, 10))["flops"]
            for model in (conv, torch.nn.Sequential(conv, SoftPool2d(3, 2, 1)))
        )
        assert pooled - alone == flops


class Net(torch.nn.Module):
    """A stem without its convolution."""

    def forward(self, x):
        return soft_pool2d(x * 2, 3, 2, 1)


def dynamic_shapes():
    height, width = (torch.export.Dim(name, min=4, max=4096) for name in ("height", "width"))
    return {"x": {0: torch.export.Dim("batch"), 2: height, 3: width}}


class TestBackend:
    CODE = (
        "import torch, mmsoftpool; from mmsoftpool.ops.library import BACKENDS;"
        "print(BACKENDS['cpu']); print(mmsoftpool.soft_pool2d(torch.ones(1, 2, 2), 2).item())"
    )

    def test_the_reference_can_be_forced(self, run_script):
        result = run_script("-c", self.CODE, MMSOFTPOOL_BACKEND="reference")
        assert "mmsoftpool" not in result.stderr  # no warning: it was asked for
        assert "(reference: MMSOFTPOOL_BACKEND=reference)\n1.0" in result.stdout

    def test_an_unknown_backend_is_named(self, run_script):
        result = run_script("-c", self.CODE, check=False, MMSOFTPOOL_BACKEND="fast")
        assert "MMSOFTPOOL_BACKEND is 'fast'; allowed are 'auto'" in result.stderr

    @pytest.mark.parametrize("library_file", [None, b"not a library"])
    def test_without_the_library_it_says_so_and_works(self, run_script, tmp_path, library_file):
        package = tmp_path / "mmsoftpool"
        shutil.copytree(
            Path(mmsoftpool.__file__).parent, package, ignore=shutil.ignore_patterns("*.so")
        )
        if library_file:
            (package / Path(library.BACKENDS["cpu"]).name).write_bytes(library_file)
        result = run_script("-c", self.CODE, cwd=tmp_path)
        assert result.stdout.endswith("1.0\n") and "(reference: " in result.stdout
        reason = "does not load" if library_file else "was not built"
        assert re.search(
            rf"no compiled library for cpu: libmmsoftpool_cpu.*so {reason}", result.stderr
        )
        assert result.stderr.count("runs on the pure PyTorch reference") == 1
