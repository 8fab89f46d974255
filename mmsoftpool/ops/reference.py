"""SoftPool in plain PyTorch: slow, readable, and what the compiled kernels are held against.

Softmax over the k^d strided slices of the input, one per tap of the window. Runs on every device
that PyTorch has and takes over wherever no compiled kernel is there.

Source: Stergiou et al., "Refining activation downsampling with SoftPool", ICCV 2021, section 3.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def output_size(
    size: int,
    kernel_size: int,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    ceil_mode: bool,
) -> int:
    """Output size of one axis, as torch's own pools have it.

    Args:
        size: Input size.
        kernel_size: Window size in taps.
        stride: Distance of neighbouring windows.
        padding: Absent elements (before, after) the input.
        dilation: Distance of neighbouring taps.
        ceil_mode: Whether a last, incomplete window counts. It does if it starts inside the input
            or the padding before it.
    """
    before, after = padding
    span = size + before + after - dilation * (kernel_size - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + before:
        out -= 1
    return out


def output_sizes(
    sizes: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """:func:`output_size` of every axis; ``padding`` is flat: before and after of each axis."""
    return [
        output_size(
            sizes[i], kernel_size[i], stride[i], padding[2 * i : 2 * i + 2], dilation[i], ceil_mode
        )
        for i in range(len(sizes))
    ]


class Windows:
    """The windows of a pooling over (N, C, spatial...) tensors, as a stack of strided slices."""

    def __init__(self, sizes, kernel_size, stride, padding, dilation, ceil_mode):
        self.sizes = list(sizes)
        self.before, self.after = padding[0::2], padding[1::2]
        spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        # A slice ends where the last tap of the window leaves room for the other taps. Ends that
        # count from the back do not depend on the size: exporters need no guard for them.
        last = [1 - span for span in spans]
        if ceil_mode:
            # The last window may need more than the padding, or start before the padding ends.
            outs = output_sizes(sizes, kernel_size, stride, padding, dilation, ceil_mode)
            last = [(o - 1) * s + 1 for o, s in zip(outs, stride, strict=True)]
            self.after = [
                max(0, end + span - 1 - n - p)
                for end, span, n, p in zip(last, spans, sizes, self.before, strict=True)
            ]
        self.taps = [
            (
                ...,
                *(
                    slice(i * d, i * d + end or None, s)
                    for i, d, end, s in zip(tap, dilation, last, stride, strict=True)
                ),
            )
            for tap in itertools.product(*map(range, kernel_size))
        ]

    def gather(self, x: Tensor, absent: float) -> Tensor:
        """(taps, N, C, out...) with ``absent`` for what is outside the input."""
        return torch.stack(self.views(x, absent))

    def views(self, x: Tensor, absent: float) -> list[Tensor]:
        """The taps of :meth:`gather` one by one, without a copy of each."""
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)  # the last axis first
        padded = F.pad(x, [p for pair in pairs for p in pair], value=absent)
        return [padded[tap] for tap in self.taps]

    def present(self, x: Tensor) -> Tensor:
        """(taps, 1, 1, out...), 1 where a tap is inside the input and 0 where it is absent."""
        return self.gather(torch.ones_like(x[:1, :1]), 0.0)

    def scatter(self, values: Tensor) -> Tensor:
        """The transpose of :meth:`gather`: adds every tap to the element that it came from."""
        axes = zip(self.sizes, self.before, self.after, strict=True)
        padded = values.new_zeros(*values.shape[1:3], *(n + b + a for n, b, a in axes))
        for tap, value in zip(self.taps, values, strict=True):
            padded[tap] += value
        inside = (slice(p, p + n) for p, n in zip(self.before, self.sizes, strict=True))
        return padded[(..., *inside)]


def _softmax(taps: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of every window, eq. 1, from its taps (taps, ...).

    Returns:
        ``w`` (taps, ...), the weights; ``shifted`` (taps, ...), x - max; ``top`` (...), the max;
        ``mean`` (...), sum of w * shifted, so that the output (eq. 2) is top + mean. A tap that is
        absent or -inf weighs exactly 0; a window of nothing else has w = 0 and mean = -inf.
    """
    limits = torch.finfo(taps.dtype)
    floor = math.log(limits.tiny)
    top = taps.amax(0).clamp(min=limits.min)
    alpha = min(alpha, limits.max)
    floor = max(floor / alpha, limits.min) if alpha else limits.min
    shifted = (taps - top).clamp(min=floor)
    exponentials = torch.where(shifted <= floor, 0, (alpha * shifted).exp())
    total = exponentials.sum(0)
    empty = total == 0
    w = exponentials / torch.where(empty, 1, total)
    mean = torch.where(empty, -math.inf, (w * shifted).sum(0))
    return w, shifted, top, mean


def memory_format(input: Tensor) -> torch.memory_format:
    """The layout that results have: the input's if that is channels last, else contiguous."""
    if not input.is_contiguous():
        for format in (torch.channels_last, torch.channels_last_3d):
            dims = 4 if format == torch.channels_last else 5
            if input.dim() == dims and input.is_contiguous(memory_format=format):
                return format
    return torch.contiguous_format


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_pool(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    alpha: float,
    gradient: str,
) -> Tensor:
    """Forward pass of ``torch.ops.mmsoftpool.soft_pool``, see :mod:`mmsoftpool.ops.library`."""
    windows = Windows(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    _, _, top, mean = _softmax(
        windows.gather(input.to(compute_dtype(input.dtype)), -math.inf), alpha
    )
    return (top + mean).to(input.dtype).contiguous(memory_format=memory_format(input))


def soft_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    alpha: float,
    gradient: str,
) -> Tensor:
    """Gradient of the input: g w (1 + x - y) for ``'exact'``, g w (section 3.2) for ``'paper'``."""
    dtype = compute_dtype(input.dtype)
    windows = Windows(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    w, shifted, _, mean = _softmax(windows.gather(input.to(dtype), -math.inf), alpha)
    grads = grad_output.to(dtype) * w
    if gradient == "exact":
        grads = grads * (1 + alpha * (shifted - mean.clamp(min=torch.finfo(dtype).min)))
    grad_input = windows.scatter(grads).to(input.dtype)
    return grad_input.contiguous(memory_format=memory_format(input))


def soft_pool_double_backward(
    grad_grad_input: Tensor,
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    alpha: float,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """Derivative of :func:`soft_pool_backward`, differentiable again.

    With v for ``grad_grad_input``, h_i = 1 + x_i - y and u = sum v_i w_i h_i, the gradient of
    grad_output is u and that of x_j is g w_j ((v_j - sum v_i w_i) h_j + v_j - u). The paper's
    gradient is the same with h = 1 and without the terms that come from the derivative of h.

    Returns:
        The gradients of ``grad_output`` and ``input``.
    """
    dtype = compute_dtype(input.dtype)
    windows = Windows(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    w, shifted, _, mean = _softmax(windows.gather(input.to(dtype), -math.inf), alpha)
    v = windows.gather(grad_grad_input.to(dtype), 0.0)
    v_mean = (v * w).sum(0)
    if gradient == "exact":
        h = 1 + alpha * (shifted - mean.clamp(min=torch.finfo(dtype).min))
        u = (v * w * h).sum(0)
        grads = alpha * w * ((v - v_mean) * h + v - u)
    else:
        u = v_mean
        grads = alpha * w * (v - v_mean)
    grad_input = windows.scatter(grad_output.to(dtype) * grads)
    return u.to(grad_output.dtype), grad_input.to(input.dtype)
