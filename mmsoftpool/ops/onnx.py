"""SoftPool in standard ONNX operators, which ``torch.onnx.export`` takes in place of the operator.

The fast form is two average pools, of e^(alpha x) and of x e^(alpha x), and their quotient. Nothing
is subtracted from x, so the accuracy of a window does not depend on the values of other windows. It
holds while the exponentials are numbers that float32 has. Where the sums show that some are not, an
``If`` takes the exact form: a softmax over the strided slices of the input, of large windows one
axis after the other, so that there are k + k slices in place of k x k.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .pooling import AdaptivePooling, Pooling

# Smallest mean of a window's exponentials in the fast form. Taps whose exponential is below the
# smallest normal number, 1e-38, may be lost: together less than 1e-7 of such a window.
_SMALLEST_MEAN = 1e-30
#: Sharpness for every tap of a window from which on SoftPool is max pooling: they differ by at most
#: (taps - 1) / (e alpha), less than 4e-10.
MAX_POOLING = 1e9
# Windows with more taps are pooled one axis after the other: in the exact form, where every tap is
# six nodes, and in the fast form, where engines add up taps in float32 and round after each.
_MOST_TAPS_EXACT, _MOST_TAPS_FAST = 9, 32
# What stands for -inf and for padding in the exact form, of which no difference overflows, and the
# smallest alpha with which it weighs 0. Exporters write constants as float32, for float64 too.
_ABSENT, _SMALLEST_ALPHA = -1e30, 1e-27
_FLOAT32 = torch.finfo(torch.float32)


def soft_pool(input: Tensor, *args: Any) -> Tensor:
    """Decomposition of ``torch.ops.mmsoftpool.soft_pool``; arguments as there."""
    pooling = Pooling(*args)
    if not _is_exporting():
        return reference.soft_pool(input, *pooling)
    x = input.to(reference.compute_dtype(input.dtype))
    return _soft_pool(x, _with_explicit_padding(pooling, x.shape[2:])).to(input.dtype)


def adaptive_soft_pool(input: Tensor, *args: Any) -> Tensor:
    """Decomposition of ``torch.ops.mmsoftpool.adaptive_soft_pool``; arguments as there."""
    pooling = AdaptivePooling(*args)
    sizes = [*input.shape[2:], *pooling.output_size]
    if _is_exporting() and all(isinstance(size, int) for size in sizes):
        axes = list(zip(input.shape[2:], pooling.output_size, strict=True))
        if not any(size % out for size, out in axes):  # windows of one size, without overlap
            k = [size // out for size, out in axes]
            return soft_pool(input, *Pooling.check(len(k), k, alpha=pooling.alpha))
    return reference.adaptive_soft_pool(input, *pooling)


def _is_exporting() -> bool:
    # The graph's nodes compute nothing outside of an export.
    return hasattr(torch.onnx, "ops") and torch.onnx.is_in_onnx_export()


def _with_explicit_padding(pooling: Pooling, sizes: Sequence[int]) -> Pooling:
    """The same windows without ``ceil_mode`` and, of fixed sizes, not larger than the map."""
    kernel_size, padding = list(pooling.kernel_size), list(pooling.padding)
    for i, size in enumerate(sizes):
        k, dilation = kernel_size[i], pooling.dilation[i]
        before, after = padding[2 * i], pooling.padding_after(i)
        if isinstance(size, int):
            kernel_size[i] = min(k, (size + before - 1) // dilation + 1)
        padding[2 * i + 1] = after - (k - kernel_size[i]) * dilation
    return pooling._replace(kernel_size=kernel_size, padding=padding, ceil_mode=False)


def _soft_pool(x: Tensor, pooling: Pooling) -> Tensor:
    dims = list(range(x.dim()))
    alpha, taps = pooling.alpha, math.prod(pooling.kernel_size)
    operands: tuple[Tensor, ...]
    fast: Callable[..., Tensor]
    if x.dtype == torch.float64 or any(d != 1 for d in pooling.dilation):
        # ONNX Runtime has no average pool of float64, opset 18 none with dilation.
        return exact(x, pooling)
    if alpha == 0 or alpha >= MAX_POOLING * taps:
        pooled = _pool("MaxPool" if alpha else "AveragePool", x, pooling)
        # Not of what is pooled: MaxPool drops a NaN in some engines.
        holds, operands = _is_finite(x.sum(dims)), (pooled,)

        def fast(x: Tensor, pooled: Tensor) -> Tensor:
            return pooled.clone()
    else:
        scaled = x if alpha == 1 else alpha * x
        exponentials = scaled.exp()
        total = _mean(exponentials, pooling)
        # Of the larger one: then no sum of exponentials overflows where these do not.
        values = scaled if alpha > 1 else x
        moment = _mean(values * exponentials, pooling)
        # The sum of all is finite only if each is a number.
        holds = _is_finite(moment.sum(dims)) & (total.amin(dims) >= _SMALLEST_MEAN)
        operands = (moment, total)

        def fast(x: Tensor, moment: Tensor, total: Tensor) -> Tensor:
            mean = moment / total
            return mean / alpha if alpha > 1 else mean

    # Branches cannot return a tensor whose sizes torch does not know to be positive: its strides
    # have a maximum of the size and 1.
    flat = "Max" in str(operands[0].stride())

    def branch(form: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
        def run(x: Tensor, *operands: Tensor) -> tuple[Tensor]:
            y = form(x, *operands)
            return (y.flatten() if flat else y,)

        return run

    # torch.cond compiles the branches first, which is not possible here.
    (y,) = torch.ops.higher_order.cond(
        holds, branch(fast), branch(lambda x, *_: exact(x, pooling)), (x, *operands)
    )
    output: Tensor = y.view(operands[0].shape) if flat else y
    return output


def _is_finite(x: Tensor) -> Tensor:
    return x.abs() <= _FLOAT32.max


def _mean(x: Tensor, pooling: Pooling) -> Tensor:
    for stage in _stages(pooling, _MOST_TAPS_FAST):
        x = _pool("AveragePool", x, stage, count_include_pad=1)
    return x


def _stages(pooling: Pooling, most_taps: int) -> list[Pooling]:
    """A pooling whose windows have more taps as one over each axis, the last one first."""
    if math.prod(pooling.kernel_size) <= most_taps:
        return [pooling]
    stages = []
    for i in reversed(range(len(pooling.kernel_size))):
        ones, zeros = [1] * len(pooling.kernel_size), [0] * len(pooling.padding)
        kernel_size, stride, padding = ones.copy(), ones.copy(), zeros
        kernel_size[i], stride[i] = pooling.kernel_size[i], pooling.stride[i]
        padding[2 * i : 2 * i + 2] = pooling.padding[2 * i : 2 * i + 2]
        stages.append(pooling._replace(kernel_size=kernel_size, stride=stride, padding=padding))
    return stages


def _pool(kind: str, x: Tensor, pooling: Pooling, **options: int) -> Tensor:
    attributes: dict[str, Any] = dict(
        options,
        kernel_shape=list(pooling.kernel_size),
        strides=list(pooling.stride),
        pads=[*pooling.padding[0::2], *pooling.padding[1::2]],
    )
    if kind == "MaxPool":
        attributes["dilations"] = list(pooling.dilation)
    shape = (*x.shape[:2], *pooling.output_sizes(x.shape[2:]))
    return torch.onnx.ops.symbolic(kind, (x,), attributes, dtype=x.dtype, shape=shape)


def exact(x: Tensor, pooling: Pooling) -> Tensor:
    """SoftPool with the maximum of every window subtracted.

    The taps of a window that have been seen are three numbers: their maximum m, the sum of
    e^(alpha (x - m)) and that of (x - m) e^(alpha (x - m)). ``pooling`` has no ``ceil_mode``.
    """
    axes = len(pooling.kernel_size)
    alpha = min(max(pooling.alpha, _SMALLEST_ALPHA), _FLOAT32.max)
    if any(pooling.padding):  # not MaxPool's: with dilation it may be as large as the kernel
        pairs = [pooling.padding[2 * i : 2 * i + 2] for i in reversed(range(axes))]
        x = F.pad(x, [p for pair in pairs for p in pair], value=-math.inf)
        pooling = pooling._replace(padding=[0] * len(pooling.padding))
    maximum = torch.where(x < _ABSENT, _ABSENT, x)
    sums: list[Tensor] = []
    for stage in _stages(pooling, _MOST_TAPS_EXACT):
        taps = _taps(maximum, stage)
        previous = list(zip(*(_taps(tensor, stage) for tensor in sums), strict=True))
        maximum = _pool("MaxPool", maximum, stage)
        totals, moments = [], []
        for i, tap in enumerate(taps):
            shifted = tap - maximum
            weight = (shifted if alpha == 1 else alpha * shifted).exp()
            if not previous:
                totals.append(weight)
                moments.append(weight * shifted)
            else:  # in this order, in which no factor is infinite
                tap_total, tap_moment = previous[i]
                totals.append(weight * tap_total)
                moments.append(weight * shifted * tap_total + weight * tap_moment)
        sums = [sum(terms[1:], terms[0]) for terms in (totals, moments)]
    # Windows of nothing that is larger have their maximum. Max pooling starts at the smallest
    # number in some engines, at -inf in others.
    largest = _pool("MaxPool", x, pooling)
    largest = torch.where(largest > _FLOAT32.min, largest - _ABSENT, -math.inf)
    total, moment = sums
    return maximum + moment / total + torch.where(maximum > _ABSENT, 0, largest)


def _taps(x: Tensor, pooling: Pooling) -> list[Tensor]:
    """The taps of all windows as strided slices, whose ends do not depend on the sizes."""
    taps = [x]
    for i, (k, s, d) in enumerate(
        zip(pooling.kernel_size, pooling.stride, pooling.dilation, strict=True)
    ):
        if k > 1 or s > 1:
            ends = [(tap - k + 1) * d or None for tap in range(k)]
            slices = [slice(tap * d, end, s) for tap, end in enumerate(ends)]
            taps = [t[(*[slice(None)] * (2 + i), place)] for t in taps for place in slices]
    return taps
