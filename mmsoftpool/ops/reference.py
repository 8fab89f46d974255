"""SoftPool in plain PyTorch: slow, readable, and what the compiled kernels are tested against.

Softmax over the k^d strided slices of the input, one per tap of the window. Runs on every device
that PyTorch has, wherever no compiled kernel serves it.

Source: Stergiou et al., "Refining activation downsampling with SoftPool", ICCV 2021, section 3. The
sharpness alpha is that of McFee et al., "Adaptive pooling operators for weakly labeled sound event
detection", 2018.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pooling import AdaptivePooling, Pooling

#: The operators ``torch.ops.mmsoftpool.*``, each with a function of its name here.
OPERATORS = (
    "soft_pool",
    "soft_pool_backward",
    "adaptive_soft_pool",
    "adaptive_soft_pool_backward",
)


class Windows:
    """The windows of a pooling over (N, C, spatial...) tensors, as a stack of strided slices."""

    def __init__(self, sizes: Sequence[int], pooling: Pooling):
        self.sizes, self.stride = list(sizes), pooling.stride
        self.before = list(pooling.padding[0::2])
        self.after = [pooling.padding_after(i) for i in range(len(self.sizes))]
        self._reached = list(self.after)  # of that, by the taps that are kept
        starts: list[range] = []  # of the taps along every axis
        slices: list[list[slice]] = []
        for i, (k, d) in enumerate(zip(pooling.kernel_size, pooling.dilation, strict=True)):
            kept, size = k, sizes[i]
            if not isinstance(size, torch.SymInt):  # which would need a branch
                # Taps beyond the input in all windows: those of a kernel larger than the map.
                kept = min(k, (size + self.before[i] - 1) // d + 1)
            self._reached[i] -= (k - kept) * d
            starts.append(range(0, kept * d, d))
            # A slice ends where the last tap of the window leaves room for the other taps. Ends
            # that count from the back do not depend on the size: exporters need no guard for them.
            last = (kept - 1) * d
            slices.append([slice(tap, tap - last or None, self.stride[i]) for tap in starts[i]])
        #: Offset of every tap of a window from the window's first one.
        self.offsets = list(itertools.product(*starts))
        self.slices: list[tuple[Any, ...]] = [(..., *s) for s in itertools.product(*slices)]

    def gather(self, x: Tensor, absent: float) -> Tensor:
        """(taps, N, C, out...) with ``absent`` for what is outside the input."""
        return torch.stack(self.views(x, absent))

    def views(self, x: Tensor, absent: float) -> list[Tensor]:
        """The taps of :meth:`gather` one by one, without a copy of each."""
        # The last axis first.
        pairs = zip(reversed(self.before), reversed(self._reached), strict=True)
        padded = F.pad(x, [p for pair in pairs for p in pair], value=absent)
        return [padded[tap] for tap in self.slices]

    def present(self, x: Tensor) -> Tensor:
        """(taps, 1, 1, out...), 1 where a tap is inside the input and 0 where it is absent."""
        return self.gather(torch.ones_like(x[:1, :1]), 0.0)

    def scatter(self, values: Tensor) -> Tensor:
        """The transpose of :meth:`gather`: adds every tap to the element that it came from.

        No operation is in place, so that all of torch's batching and differentiation works.
        """
        total = values.new_zeros(())
        for offset, value in zip(self.offsets, values.unbind(0), strict=True):
            frame: list[int] = []  # of the last axis first; a negative width cuts off
            for axis in range(-len(self.sizes), 0):
                start = offset[axis] - self.before[axis]
                value = _spread(value, axis, self.stride[axis])
                frame[:0] = [start, self.sizes[axis] - start - value.shape[axis]]
            value = F.pad(value, frame)
            total = total + value
        return total


class AdaptiveWindows:
    """The windows of an adaptive pooling, as :class:`Windows`.

    Gathered by indices that are computed from the sizes, without a branch on those.
    """

    def __init__(self, sizes: Sequence[int], pooling: AdaptivePooling):
        self.sizes, self.outs = list(sizes), list(pooling.output_size)
        self.largest = [_largest_window(*axis) for axis in zip(self.sizes, self.outs, strict=True)]

    def gather(self, x: Tensor, absent: float) -> Tensor:
        """(taps, N, C, out...) with ``absent`` where a window has fewer taps than the largest."""
        axes = len(self.sizes)
        for i, (size, out) in enumerate(zip(self.sizes, self.outs, strict=True)):
            axis = 2 + 2 * i  # (N, C, out, taps, ...), pair by pair
            if isinstance(out, int) and out == 1:
                x = x.unsqueeze(axis)
                continue
            index, present = _window_indices(size, out, x.device)
            x = x.index_select(axis, index.flatten()).unflatten(axis, index.shape)
            x = torch.where(present[(..., *[None] * (axes - 1 - i))], x, absent)
        return x.permute(*range(3, 3 + 2 * axes, 2), 0, 1, *range(2, 2 + 2 * axes, 2)).flatten(
            0, axes - 1
        )

    def scatter(self, values: Tensor) -> Tensor:
        """The transpose of :meth:`gather`: adds every tap to the element that it came from.

        The windows around an input are those of adaptive pooling from ``out`` to ``size``.
        """
        axes = len(self.sizes)
        values = values.unflatten(0, self.largest)
        pairs = [axis for i in range(axes) for axis in (axes + 2 + i, i)]
        values = values.permute(axes, axes + 1, *pairs)
        for i, (size, out) in enumerate(zip(self.sizes, self.outs, strict=True)):
            window, present = _window_indices(out, size, values.device)
            tap = torch.arange(size, device=values.device)[:, None] - window * size // out
            index = torch.where(present, window * self.largest[i] + tap, 0)
            values = values.flatten(2 + i, 3 + i).index_select(2 + i, index.flatten())
            values = values.unflatten(2 + i, index.shape)
            present = present[(..., *[None] * (2 * (axes - 1 - i)))]
            values = torch.where(present, values, 0).sum(3 + i)
        return values


def _largest_window(size: int, out: int) -> int:
    """Size of the largest window of adaptive pooling, or for symbolic sizes a bound."""
    if isinstance(size, int) and isinstance(out, int):
        return (size - math.gcd(size, out) + out - 1) // out + 1
    return (size + out - 2) // out + 1


def _window_indices(size: int, out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the taps of adaptive pooling along an axis, and which are present; (out, taps)."""
    window = torch.arange(out, device=device)[:, None]
    tap = torch.arange(_largest_window(size, out), device=device)
    index = window * size // out + tap
    present = index < ((window + 1) * size + out - 1) // out
    return torch.where(present, index, 0), present


def _spread(x: Tensor, axis: int, stride: int) -> Tensor:
    """Puts ``stride - 1`` zeros after every element of an axis, counted from the last one."""
    if stride == 1:
        return x
    sizes = list(x.shape)
    sizes[axis] *= stride
    between = [0, 0] * (-axis - 1) + [0, stride - 1]
    return F.pad(x.unsqueeze(x.dim() + axis + 1), between).reshape(sizes)


def _softmax(taps: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of every window, eq. 1, from its taps (taps, ...).

    Returns:
        ``w`` (taps, ...), the weights, softmax(alpha x); ``shifted`` (taps, ...), x - max; ``max``
        (...); ``mean`` (...), sum of w * shifted, so that the output (eq. 2) is max + mean. A tap
        that is absent or -inf weighs exactly 0 and has shifted = 0, as those have whose weight
        would be below the smallest normal number; a window of nothing else has w = 0 and
        mean = -inf.
    """
    limits = torch.finfo(taps.dtype)
    alpha = _finite(alpha, taps.dtype)
    max = taps.amax(0).clamp(min=limits.min)
    shifted = (taps - max).clamp(min=limits.min)
    absent = (alpha * shifted <= math.log(limits.tiny)) | (taps == -math.inf)
    # No large number stays in either: products with their derivatives could overflow.
    shifted = torch.where(absent, 0, shifted)
    exponentials = torch.where(absent, 0, (alpha * shifted).exp())
    total = exponentials.sum(0)
    empty = total == 0
    w = exponentials / torch.where(empty, 1, total)
    mean = torch.where(empty, -math.inf, (w * shifted).sum(0))
    return w, shifted, max, mean


def _finite(alpha: float, dtype: torch.dtype) -> float:
    """alpha, at most the largest number of a dtype: infinity times a difference of 0 is NaN."""
    return min(alpha, torch.finfo(dtype).max)


def _weigh(
    input: Tensor, pooling: Pooling | AdaptivePooling
) -> tuple[Windows | AdaptiveWindows, Tensor, Tensor]:
    """The windows of an input, their weights w and the derivative of the output by the taps, over
    w: 1 + alpha (x - y), or 1 (paper)."""
    windows, taps, alpha, _ = _gather(input, pooling)
    w, shifted, _, mean = _softmax(taps, alpha)
    if pooling.gradient == "paper":
        return windows, w, torch.ones_like(w)
    mean = torch.where(mean == -math.inf, 0, mean)  # where w is 0, but the slope must be finite
    return windows, w, 1 + _finite(alpha, w.dtype) * (shifted - mean)


def _gather(
    input: Tensor, pooling: Pooling | AdaptivePooling
) -> tuple[Windows | AdaptiveWindows, Tensor, float, float]:
    """The windows of an input, their taps times a scale, the alpha for these, and the scale.

    Near alpha = 0 taps have weights however far they lie apart: differences of the largest numbers
    must not overflow.
    """
    scale = 0.25 if pooling.alpha < 1e-30 else 1.0
    x = input.to(compute_dtype(input.dtype))
    windows: Windows | AdaptiveWindows
    if isinstance(pooling, AdaptivePooling):
        windows = AdaptiveWindows(input.shape[2:], pooling)
    else:
        windows = Windows(input.shape[2:], pooling)
    taps = windows.gather(x if scale == 1 else scale * x, -math.inf)
    return windows, taps, pooling.alpha / scale, scale


def memory_format(input: Tensor) -> torch.memory_format:
    """The layout that results have: the input's if that is channels last, else contiguous."""
    if not input.is_contiguous():
        for dims, format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if input.dim() == dims and input.is_contiguous(memory_format=format):
                return format
    return torch.contiguous_format


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_pool(input: Tensor, *args: Any) -> Tensor:
    """``torch.ops.mmsoftpool.soft_pool``: ``input`` (N, C, spatial...), then a Pooling's fields."""
    return _forward(input, Pooling(*args))


def adaptive_soft_pool(input: Tensor, *args: Any) -> Tensor:
    """As :func:`soft_pool` with the fields of an AdaptivePooling."""
    return _forward(input, AdaptivePooling(*args))


def soft_pool_backward(grad_output: Tensor, input: Tensor, *args: Any) -> Tensor:
    """``torch.ops.mmsoftpool.soft_pool_backward``, the gradient of the input: g w (1 + alpha (x -
    y)) for ``'exact'``, g w (section 3.2) for ``'paper'``."""
    return _backward(grad_output, input, Pooling(*args))


def adaptive_soft_pool_backward(grad_output: Tensor, input: Tensor, *args: Any) -> Tensor:
    """As :func:`soft_pool_backward` with the fields of an AdaptivePooling."""
    return _backward(grad_output, input, AdaptivePooling(*args))


def _forward(input: Tensor, pooling: Pooling | AdaptivePooling) -> Tensor:
    _, taps, alpha, scale = _gather(input, pooling)
    _, _, max, mean = _softmax(taps, alpha)
    return ((max + mean) / scale).to(input.dtype).contiguous(memory_format=memory_format(input))


def _backward(grad_output: Tensor, input: Tensor, pooling: Pooling | AdaptivePooling) -> Tensor:
    windows, w, slopes = _weigh(input, pooling)
    grads = grad_output.to(w.dtype) * w * slopes
    grad_input = windows.scatter(grads).to(input.dtype)
    return grad_input.contiguous(memory_format=memory_format(input))


def soft_pool_jvp(tangent: Tensor, input: Tensor, pooling: Pooling | AdaptivePooling) -> Tensor:
    """Forward-mode derivative of the forward: sum of w (1 + alpha (x - y)) t per window, the
    transpose of the backward."""
    windows, w, slopes = _weigh(input, pooling)
    return (windows.gather(tangent.to(w.dtype), 0.0) * w * slopes).sum(0).to(input.dtype)


def soft_pool_double_backward(
    grad_grad_input: Tensor,
    grad_output: Tensor,
    input: Tensor,
    pooling: Pooling | AdaptivePooling,
) -> tuple[Tensor, Tensor]:
    """Derivative of the backward, differentiable again.

    With v for ``grad_grad_input``, h_i = 1 + alpha (x_i - y) and u = sum v_i w_i h_i, the gradient
    of grad_output is u and that of x_j is alpha g w_j ((v_j - sum v_i w_i) h_j + v_j - u). The
    paper's gradient is the same with h = 1 and without the terms that come from the derivative of
    h. Both matrices of second derivatives are symmetric, so this is their product with v in forward
    mode as well. Returns the gradients of ``grad_output`` and ``input``.
    """
    windows, w, h = _weigh(input, pooling)
    dtype = w.dtype
    v = windows.gather(grad_grad_input.to(dtype), 0.0)
    v_mean = (v * w).sum(0)
    u = (v * w * h).sum(0)
    grads = w * (v - v_mean)
    if pooling.gradient == "exact":
        grads = grads * h + w * (v - u)
    grad_input = windows.scatter(_finite(pooling.alpha, dtype) * grad_output.to(dtype) * grads)
    return u.to(grad_output.dtype), grad_input.to(input.dtype)
