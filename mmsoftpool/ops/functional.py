"""SoftPool as functions, with the arguments of torch's own pools."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import autograd, library
from .pooling import Gradient, Ints, OutputSize, Padding, check_adaptive, check_input


def _pool(
    function: Callable[..., Tensor],
    operator: str,
    axes: int,
    input: Tensor,
    args: tuple[Any, ...],
    alpha: float,
    gradient: str,
) -> Tensor:
    """What every ``function`` of this module does, with the operator that it calls."""
    # Subclasses, modes and the proxies of torch.fx see the function, and not the operator.
    if has_torch_function_unary(input):
        return handle_torch_function(
            function, (input,), input, *args, alpha=alpha, gradient=gradient
        )
    check: Any = check_adaptive if operator == "adaptive_soft_pool" else check_input
    pooling = check(axes, input, *args, alpha, gradient)
    if type(input) is not Tensor:
        library.register_sharding()
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export with dynamo=False cannot convert SoftPool, whose operator is not "
            "one of torch's own: call it with dynamo=True"
        )
    if input.dim() == axes + 1:
        return autograd.call(operator, input.unsqueeze(0), *pooling).squeeze(0)
    return autograd.call(operator, input, *pooling)


def soft_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Padding = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    alpha: float = 1.0,
    gradient: Gradient = "exact",
) -> Tensor:
    """SoftPool over windows of a sequence, (N, C, L) or (C, L). See :func:`soft_pool2d`."""
    args = (kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(soft_pool1d, "soft_pool", 1, input, args, alpha, gradient)


def soft_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Padding = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    alpha: float = 1.0,
    gradient: Gradient = "exact",
) -> Tensor:
    """SoftPool: the softmax-weighted sum over each window. A drop-in for ``F.max_pool2d``.

    For the taps x_i of a window, w = softmax(alpha x) and y = sum of w_i x_i (Stergiou et al., ICCV
    2021, eq. 1 and 2, where alpha is 1). The result lies between average and max pooling. It is
    finite for every finite input, deterministic, and the same on every backend up to rounding.

    Args:
        input: (N, C, H, W) or (C, H, W); float16, bfloat16 (both computed in float32), float32 or
            float64.
        kernel_size: Window size, an int or (kH, kW).
        stride: Distance of neighbouring windows, an int or (sH, sW). Defaults to ``kernel_size``.
        padding: Width of the border that windows may reach into, at most half of ``kernel_size``:
            an int, (pH, pW), or a pair (before, after) per axis, ``((top, bottom), (left,
            right))``. A padded tap is absent from its window, it is not a zero. Defaults to 0.
        dilation: Distance of neighbouring taps, an int or (dH, dW). Defaults to 1.
        ceil_mode: Round the output size up instead of down. Defaults to ``False``.
        alpha: Sharpness, a finite number of at least 0: 0 averages the taps that are present, 1 is
            the paper's SoftPool, large values approach max pooling (the softmax with a sharpness of
            McFee et al., 2018). Defaults to 1.
        gradient: ``'exact'``, the derivative g w_i (1 + alpha (x_i - y)), or ``'paper'``, the
            weight alone, g w_i, which the authors trained with (section 3.2). Defaults to
            ``'exact'``.

    Returns:
        (N, C, H_out, W_out) or (C, H_out, W_out) of the input's dtype, sized as ``F.max_pool2d``
        does. A -inf tap weighs 0, a window of nothing else gives -inf; a window with NaN or +inf
        gives NaN, in the value and in the gradient.

    Raises:
        TypeError: If an argument has the wrong type; integer and complex inputs among them.
        ValueError: If an argument has a value that is not allowed, or the output would be empty.

    Example:
        >>> import torch
        >>> soft_pool2d(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), kernel_size=2)
        tensor([[[2.4927]]])
    """
    args = (kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(soft_pool2d, "soft_pool", 2, input, args, alpha, gradient)


def soft_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Padding = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    alpha: float = 1.0,
    gradient: Gradient = "exact",
) -> Tensor:
    """SoftPool over windows of a volume, (N, C, D, H, W) or (C, D, H, W) (paper, section 3.4). See
    :func:`soft_pool2d`."""
    args = (kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(soft_pool3d, "soft_pool", 3, input, args, alpha, gradient)


def adaptive_soft_pool1d(
    input: Tensor, output_size: OutputSize, *, alpha: float = 1.0, gradient: Gradient = "exact"
) -> Tensor:
    """Adaptive SoftPool over a sequence, (N, C, L) or (C, L). See :func:`adaptive_soft_pool2d`."""
    args, operator = (output_size,), "adaptive_soft_pool"
    return _pool(adaptive_soft_pool1d, operator, 1, input, args, alpha, gradient)


def adaptive_soft_pool2d(
    input: Tensor, output_size: OutputSize, *, alpha: float = 1.0, gradient: Gradient = "exact"
) -> Tensor:
    """SoftPool to a given output size, with the windows of ``F.adaptive_avg_pool2d``.

    Output i of an axis of size n covers the inputs from floor(i n / out) to ceil((i + 1) n / out).
    An output size of 1 is the global pool: one window over the whole map.

    Args:
        input: (N, C, H, W) or (C, H, W), dtypes as for :func:`soft_pool2d`.
        output_size: An int or (H_out, W_out), each at least 1; None keeps the size of that axis.
        alpha: Sharpness, see :func:`soft_pool2d`. Defaults to 1.
        gradient: ``'exact'`` or ``'paper'``, see :func:`soft_pool2d`. Defaults to ``'exact'``.

    Returns:
        (N, C, H_out, W_out) or (C, H_out, W_out) of the input's dtype.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that is not allowed.

    Example:
        >>> import torch
        >>> adaptive_soft_pool2d(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), 1)
        tensor([[[2.4927]]])
    """
    args, operator = (output_size,), "adaptive_soft_pool"
    return _pool(adaptive_soft_pool2d, operator, 2, input, args, alpha, gradient)


def adaptive_soft_pool3d(
    input: Tensor, output_size: OutputSize, *, alpha: float = 1.0, gradient: Gradient = "exact"
) -> Tensor:
    """Adaptive SoftPool over a volume, (N, C, D, H, W) or (C, D, H, W). See
    :func:`adaptive_soft_pool2d`."""
    args, operator = (output_size,), "adaptive_soft_pool"
    return _pool(adaptive_soft_pool3d, operator, 3, input, args, alpha, gradient)
