"""SoftPool as functions, with the arguments of torch's own pools."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library  # noqa: F401 (registers the operators)
from .reference import output_sizes

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRADIENTS = ("exact", "paper")


def _is_int(value) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _per_axis(name: str, value, axes: int, minimum: int) -> list[int]:
    """``value``, an int or one int per axis, as a list of ``axes`` ints."""
    allowed = f"an int >= {minimum}" + (f" or {axes} of them" if axes > 1 else "")
    values = [value] * axes if _is_int(value) else value
    if not isinstance(values, Sequence) or not all(map(_is_int, values)):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    values = list(values)
    if len(values) == 1:
        values *= axes
    if len(values) != axes or min(values) < minimum:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return values


def _padding_pairs(value, kernel_size: list[int]) -> list[int]:
    """``padding`` as (before, after) of every axis, in one flat list."""
    axes = len(kernel_size)
    if isinstance(value, Sequence) and any(isinstance(pair, Sequence) for pair in value):
        if len(value) != axes or not all(isinstance(p, Sequence) and len(p) == 2 for p in value):
            raise ValueError(
                f"padding must be an int, {axes} of them or {axes} pairs (before, after), "
                f"got {value!r}"
            )
        flat = _per_axis("padding", [p for pair in value for p in pair], 2 * axes, 0)
    else:
        flat = [p for p in _per_axis("padding", value, axes, 0) for _ in range(2)]
    if any(p > kernel_size[i // 2] // 2 for i, p in enumerate(flat)):
        raise ValueError(
            "padding must be at most half of kernel_size, "
            f"got padding={value!r} for kernel_size={tuple(kernel_size)}"
        )
    return flat


def check_pooling(
    axes: int,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    alpha=1.0,
    gradient="exact",
) -> tuple[list[int], list[int], list[int], list[int], bool, str]:
    """Checks the arguments of a pooling over ``axes`` axes and brings them into one form.

    Returns:
        ``kernel_size``, ``stride``, ``padding`` (before and after of each axis), ``dilation``,
        ``ceil_mode`` and ``gradient`` as the operators take them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that is not allowed.
    """
    kernel_size = _per_axis("kernel_size", kernel_size, axes, 1)
    stride = kernel_size if stride is None else _per_axis("stride", stride, axes, 1)
    padding = _padding_pairs(padding, kernel_size)
    dilation = _per_axis("dilation", dilation, axes, 1)
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode must be True or False, got {ceil_mode!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be 'exact' or 'paper', got {gradient!r}")
    return kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient


def check_input(axes: int, input: Tensor, *args):
    """:func:`check_pooling` of the arguments of a pooling, and a check that ``input`` suits them.

    Raises:
        TypeError: If it is not a tensor of float16, bfloat16, float32 or float64.
        ValueError: If its rank is not ``axes + 1`` or ``axes + 2``, or the output would be empty.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    if input.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"input must have one of the dtypes {allowed}, got {input.dtype}")
    spatial = ("D", "H", "W")[3 - axes :]
    if input.dim() not in (axes + 1, axes + 2):
        shape = ", ".join(("C", *spatial))
        raise ValueError(
            f"input must have the shape (N, {shape}) or ({shape}), got {tuple(input.shape)}"
        )
    pooling = check_pooling(axes, *args)
    sizes = input.shape[-axes:]
    outs = output_sizes(sizes, *pooling[:5])
    for size, out in zip(sizes, outs):  # noqa: B905 (torch 2.1 compiles no strict=True)
        if size < 1 or out < 1:
            raise ValueError(
                f"input of size ({', '.join(spatial)}) = {tuple(sizes)} is too small: kernel_size="
                f"{tuple(pooling[0])}, padding={args[2]!r} and dilation={tuple(pooling[3])} give "
                f"an output of size {tuple(outs)}, at least 1 is needed"
            )
    return pooling


def _soft_pool(axes: int, input: Tensor, *args) -> Tensor:
    pooling = check_input(axes, input, *args)
    if input.dim() == axes + 1:
        return torch.ops.mmsoftpool.soft_pool(input.unsqueeze(0), *pooling).squeeze(0)
    return torch.ops.mmsoftpool.soft_pool(input, *pooling)


def soft_pool1d(
    input: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode: bool = False,
    *,
    gradient: str = "exact",
) -> Tensor:
    """SoftPool over windows of a sequence. See :func:`soft_pool2d`.

    Args:
        input: (N, C, L) or (C, L).

    Returns:
        (N, C, L_out) or (C, L_out).
    """
    return _soft_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, 1.0, gradient)


def soft_pool2d(
    input: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode: bool = False,
    *,
    gradient: str = "exact",
) -> Tensor:
    """SoftPool: the softmax-weighted sum over each window. A drop-in for ``F.max_pool2d``.

    For the taps x_i of a window, w = softmax(x) and y = sum of w_i x_i (Stergiou et al., ICCV 2021,
    eq. 1 and 2). The result lies between average and max pooling. It is finite for every finite
    input, deterministic, and the same on every backend up to rounding.

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
        gradient: ``'exact'``, the derivative g w_i (1 + x_i - y), or ``'paper'``, the weight alone,
            g w_i, which the authors trained with (section 3.2). Defaults to ``'exact'``.

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
        tensor([[[2.4926]]])
    """
    return _soft_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, 1.0, gradient)


def soft_pool3d(
    input: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode: bool = False,
    *,
    gradient: str = "exact",
) -> Tensor:
    """SoftPool over windows of a volume (paper, section 3.4). See :func:`soft_pool2d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W).

    Returns:
        (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out).
    """
    return _soft_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, 1.0, gradient)
