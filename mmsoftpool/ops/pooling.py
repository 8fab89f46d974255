"""The arguments of a pooling, checked and in one form, and its output sizes."""

import numbers
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRADIENTS = ("exact", "paper")
#: How the gradient of a window is defined, see :func:`mmsoftpool.soft_pool2d`.
Gradient: TypeAlias = Literal["exact", "paper"]
#: One number for all axes, or one for each.
Ints: TypeAlias = int | Sequence[int]
#: Padding before and after: a number, one for each axis, or a pair (before, after) for each.
Padding: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]]
#: Output size of an adaptive pool; None keeps the size of an axis.
OutputSize: TypeAlias = int | Sequence[int | None] | None
_SPATIAL = ("D", "H", "W")


class Pooling(NamedTuple):
    """A pooling over one to three axes; unpacks into the operator
    ``torch.ops.mmsoftpool.soft_pool``.

    Attributes:
        kernel_size: Window size of every axis in taps.
        stride: Distance of neighbouring windows of every axis.
        padding: Absent elements before and after every axis, in one flat tuple.
        dilation: Distance of neighbouring taps of every axis.
        ceil_mode: Whether a last, incomplete window counts.
        alpha: Sharpness of the softmax, finite and at least 0.
        gradient: ``'exact'`` or ``'paper'``.
    """

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    ceil_mode: bool
    alpha: float
    gradient: str

    @classmethod
    def check(
        cls,
        axes: int,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        alpha: float = 1.0,
        gradient: str = "exact",
    ) -> "Pooling":
        """Checks the arguments of a pool over ``axes`` axes, in the forms that users give them."""
        kernel_size = _per_axis("kernel_size", kernel_size, axes, 1)
        if stride is None or (isinstance(stride, Sequence) and len(stride) == 0):
            stride = kernel_size  # torch's pools take an empty stride for that too
        else:
            stride = _per_axis("stride", stride, axes, 1)
        padding = _padding_pairs(padding, kernel_size)
        dilation = _per_axis("dilation", dilation, axes, 1)
        if not isinstance(ceil_mode, bool):
            raise TypeError(f"ceil_mode must be True or False, got {ceil_mode!r}")
        alpha, gradient = _check_softmax(alpha, gradient)
        return cls(kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient)

    def output_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Output size of every axis for an input of ``sizes``, as torch's own pools have it.

        In ``ceil_mode`` a last, incomplete window counts if it starts inside the input or the
        padding before it.
        """
        outs = []
        for i in range(len(sizes)):
            span = (self.kernel_size[i] - 1) * self.dilation[i] + 1
            room = sizes[i] + self.padding[2 * i] + self.padding_after(i) - span
            outs.append(room // self.stride[i] + 1)
        return outs

    def padding_after(self, i: int) -> int:
        """How far windows may reach beyond the input along axis ``i``: the padding after it or, in
        ``ceil_mode``, what makes room for a last window that starts inside. It does not depend on
        the size, so exporters need no branch for it.
        """
        after = self.padding[2 * i + 1]
        if not self.ceil_mode:
            return after
        return min(after + self.stride[i] - 1, (self.kernel_size[i] - 1) * self.dilation[i])


class AdaptivePooling(NamedTuple):
    """An adaptive pooling; unpacks into the operator ``torch.ops.mmsoftpool.adaptive_soft_pool``.

    Output i of an axis of size n covers the inputs from floor(i n / out) to ceil((i + 1) n / out).
    ``alpha`` and ``gradient`` as those of :class:`Pooling`.
    """

    output_size: Sequence[int]
    alpha: float
    gradient: str


def check_input(axes: int, input: Tensor, *args: Any) -> Pooling:
    """:meth:`Pooling.check` of ``args``, and a check that ``input`` suits the pooling."""
    check_tensor(axes, input)
    pooling = Pooling.check(axes, *args)
    sizes = input.shape[-axes:]
    outs = pooling.output_sizes(sizes)
    for size, out in zip(sizes, outs):  # noqa: B905 (torch 2.1 compiles no strict=True)
        if size < 1 or out < 1:
            raise ValueError(
                f"input of size ({', '.join(_SPATIAL[3 - axes :])}) = {tuple(sizes)} is too small: "
                f"kernel_size={tuple(pooling.kernel_size)}, padding={args[2]!r} and "
                f"dilation={tuple(pooling.dilation)} give an output of size {tuple(outs)}, at "
                "least 1 is needed"
            )
    return pooling


def check_sizes(axes: int, output_size: OutputSize) -> tuple[int | None, ...]:
    """The output size of an adaptive pool, an int or None or one of them per axis, as a tuple."""
    return _per_axis("output_size", output_size, axes, 1, bits=48, or_none=True)


def check_adaptive(
    axes: int, input: Tensor, output_size: OutputSize, alpha: float, gradient: str
) -> AdaptivePooling:
    """Checks the input and the arguments of an adaptive pool over ``axes`` axes."""
    check_tensor(axes, input)
    sizes = [_plain(size) for size in input.shape[-axes:]]
    if any(size < 1 for size in sizes):
        raise ValueError(
            f"input of size ({', '.join(_SPATIAL[3 - axes :])}) = {tuple(sizes)} is empty, every "
            "size must be at least 1"
        )
    outs = check_sizes(axes, output_size)
    resolved = [n if out is None else out for n, out in zip(sizes, outs)]  # noqa: B905 (as above)
    return AdaptivePooling(resolved, *_check_softmax(alpha, gradient))


def check_tensor(axes: int, input: Tensor) -> None:
    """Checks type, dtype and rank of the input of a pool over ``axes`` axes."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    if input.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"input must have one of the dtypes {allowed}, got {input.dtype}")
    if input.dim() not in (axes + 1, axes + 2):
        shape = ", ".join(("C", *_SPATIAL[3 - axes :]))
        raise ValueError(
            f"input must have the shape (N, {shape}) or ({shape}), got {tuple(input.shape)}"
        )


def _is_int(value: object) -> bool:
    # The first test saves time. numbers.Integral: NumPy's integers too.
    return type(value) is int or (
        isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
    )


def _plain(value: Any) -> Any:
    """A NumPy integer, or a size in torch.jit.trace, as an int; a symbolic one stays symbolic."""
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def _per_axis(
    name: str, value: Any, axes: int, minimum: int, bits: int = 31, or_none: bool = False
) -> tuple[Any, ...]:
    """``value``, one number or one per axis, as ``axes`` of them, below ``2**bits`` as in torch."""
    if type(value) is int and minimum <= value < 1 << bits:  # the rest takes several times as long
        return (value,) * axes
    allowed = f"an int >= {minimum} and < 2**{bits}" + (" or None" if or_none else "")
    if axes > 1:
        allowed += f"{',' if or_none else ''} or {axes} of them"
    values = [value] * axes if _is_int(value) or (or_none and value is None) else value
    if not isinstance(values, Sequence) or not all(
        _is_int(v) or (or_none and v is None) for v in values
    ):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    values = [v if v is None else _plain(v) for v in values]
    if len(values) == 1:
        values *= axes
    if len(values) != axes or any(v is not None and not minimum <= v < 1 << bits for v in values):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return tuple(values)


def _padding_pairs(value: Any, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    """``padding`` as (before, after) of every axis, in one flat tuple."""
    axes = len(kernel_size)
    if type(value) is int:
        flat = _per_axis("padding", value, axes, 0) * 2
    elif isinstance(value, Sequence) and any(isinstance(pair, Sequence) for pair in value):
        if len(value) != axes or not all(isinstance(p, Sequence) and len(p) == 2 for p in value):
            raise ValueError(
                f"padding must be an int, {axes} of them or {axes} pairs (before, after), "
                f"got {value!r}"
            )
        flat = tuple(p for pair in value for p in _per_axis("padding", pair, 2, 0))
    else:
        flat = tuple(p for p in _per_axis("padding", value, axes, 0) for _ in range(2))
    if any(p > kernel_size[i // 2] // 2 for i, p in enumerate(flat)):
        raise ValueError(
            "padding must be at most half of kernel_size, "
            f"got padding={value!r} for kernel_size={tuple(kernel_size)}"
        )
    return flat


def _check_softmax(alpha: Any, gradient: Any) -> tuple[float, str]:
    is_number = type(alpha) is float or isinstance(alpha, numbers.Real)
    if not is_number or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a finite number >= 0, got {alpha!r}")
    if not 0 <= alpha <= sys.float_info.max:  # an int may be larger
        raise ValueError(f"alpha must be a finite number >= 0, got {alpha!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be 'exact' or 'paper', got {gradient!r}")
    return float(alpha), gradient
