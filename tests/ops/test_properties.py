"""Whatever the shape, the arguments, the dtype, the layout and the magnitude: the definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsoftpool import soft_pool1d, soft_pool2d, soft_pool3d
from mmsoftpool.ops.pooling import Pooling

from ..common import randn
from . import definition

POOLS = {1: soft_pool1d, 2: soft_pool2d, 3: soft_pool3d}
EPSILON = {torch.float64: 2e-15, torch.float32: 6e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@st.composite
def cases(draw):
    axes = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        draw(st.lists(st.integers(1, high), min_size=axes, max_size=axes)) for high in (4, 5, 3)
    )
    padding = [(draw(st.integers(0, k // 2)), draw(st.integers(0, k // 2))) for k in kernel]
    ceil_mode = draw(st.booleans())
    sizes = [
        draw(st.integers(max(1, (k - 1) * d + 1 - sum(p)), (k - 1) * d + 7))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    shape = (draw(st.integers(0, 2)), draw(st.integers(1, 3)), *sizes)
    dtype = draw(st.sampled_from(list(EPSILON)))
    exponent = draw(st.integers(-4, 3) if dtype == torch.float16 else st.integers(-30, 30))
    sign = draw(st.sampled_from(["positive", "negative", "mixed"]))
    x = randn(*shape, seed=draw(st.integers(0, 99)))
    x = {"positive": x.abs(), "negative": -x.abs(), "mixed": x}[sign].double() * 10.0**exponent
    x = x.to(dtype)
    if axes > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=LAST[axes])
    gradient = draw(st.sampled_from(["exact", "paper"]))
    alpha = draw(st.sampled_from(definition.ALPHAS))
    return x, (kernel, stride, padding, dilation, ceil_mode), alpha, gradient


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_value_and_gradient_are_the_definition(case):
    x, pooling, alpha, gradient = case
    kernel, stride, padding, dilation, _ = pooling
    axes = x.dim() - 2
    out = Pooling.check(axes, *pooling).output_sizes(x.shape[2:])
    x.requires_grad_()
    y = POOLS[axes](x, *pooling, alpha=alpha, gradient=gradient)
    assert y.shape == (*x.shape[:2], *out) and y.dtype == x.dtype
    (grad,) = torch.autograd.grad(y.sum(), x)
    value, slope = definition.soft_pool(
        x.detach(),
        out,
        kernel,
        stride,
        [before for before, _ in padding],
        dilation,
        gradient=gradient,
        alpha=alpha,
    )
    # Rounding is relative to the largest number of a window; 1 + x - y and the sum over the
    # windows of an input make it larger for the gradient.
    finite = x.detach().abs().double()
    scale = finite.amax().item() if x.numel() else 0.0
    epsilon = EPSILON[x.dtype]
    torch.testing.assert_close(y.double(), value, rtol=epsilon, atol=epsilon * scale)
    windows = 1.0
    for k in kernel:
        windows *= k
    torch.testing.assert_close(
        grad.double(), slope, rtol=0, atol=4 * epsilon * windows * (1 + min(scale, 100.0))
    )
