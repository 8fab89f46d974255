"""The names of the authors' SoftPool package, for code and models that were written for it.

Source: https://github.com/alexandrosstergiou/SoftPool (``pytorch/SoftPool/idea.py`` and
``pytorch/CUDA``), the code of Stergiou, Poppe and Kalliatakis, "Refining Activation Downsampling
with SoftPool", ICCV 2021, arXiv:2101.00440.

That repository has held several operators under one name, by date, device and call. Each is a
variant here, written anew from its formula; ``docs/migration.md`` tells which one a model was
trained with. Requires only torch.
"""

import sys
from functools import partial, partialmethod
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

from . import ops
from .ops.modules import PoolModule
from .ops.pooling import Pooling, check_input, check_tensor
from .ops.reference import compute_dtype

#: The authors' operators; the first two are named as ``mmsoftpool convert --windows`` has
#: them.
#:
#: - ``'aligned'``: the formula of the paper, windows from p * stride on. On a GPU since 2022-04-07.
#: - ``'shifted'``: windows from p * stride - kernel_size // 2 on, size // stride of them; taps
#:   outside of the input are absent. On a GPU before that date. In 3d this also reads frame d at
#:   the address of row d, as theirs did at all times.
#: - ``'per_channel'``: the values of ``'aligned'`` with their exact derivative. Without their CUDA
#:   kernel, from 2021-01-17 to early March 2021.
#: - ``'channel_sum'``: every channel is weighted by the exponentials summed over all channels.
#:   Without their CUDA kernel, before and after that.
#: - ``'channel_sum_clamped'``: the same, and negative results become 0. Since 2021-04-27.
VARIANTS = ("aligned", "shifted", "per_channel", "channel_sum", "channel_sum_clamped")

_FUNCTIONS = {1: ops.soft_pool1d, 2: ops.soft_pool2d, 3: ops.soft_pool3d}


def soft_pool1d(x, kernel_size=2, stride=None, force_inplace=False, *, variant="aligned") -> Tensor:
    """The authors' ``soft_pool1d``, of (N, C, L) or (C, L). See :func:`soft_pool2d`."""
    return _soft_pool(1, x, kernel_size, stride, force_inplace, variant)


def soft_pool2d(x, kernel_size=2, stride=None, force_inplace=False, *, variant="aligned") -> Tensor:
    """The authors' ``soft_pool2d``: the same arguments and defaults, on every device one operator.

    Every variant is finite for every finite input, also where theirs overflowed (above 88 in
    float32, 11 in float16), leaves NaN in the windows that hold it, and leaves ``x`` unchanged.
    ``'aligned'`` and ``'shifted'`` run on the compiled operator with the gradient of the authors'
    CUDA kernels, only the weight (``gradient='paper'``). The others have the exact derivative, as
    theirs had from autograd.

    Args:
        x: (N, C, H, W) or (C, H, W); float16, bfloat16, float32 or float64.
        kernel_size: Window size, an int or (kH, kW). Defaults to 2.
        stride: Distance of neighbouring windows, an int or (sH, sW). Defaults to None, which is
            ``kernel_size``.
        force_inplace: As theirs, chooses the operator that they ran without their CUDA kernel: with
            ``'aligned'`` and ``'shifted'`` it means ``'channel_sum_clamped'``. The other variants
            are such operators already. It saves no memory here. Defaults to False.
        variant: One of :data:`VARIANTS`. Defaults to ``'aligned'``.

    Returns:
        (N, C, H_out, W_out) or (C, H_out, W_out) of the input's dtype, with
        H_out = (H - kH) // sH + 1; for ``'shifted'`` H // sH.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that is not allowed, or the output would be empty.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        >>> soft_pool2d(x)
        tensor([[[2.4927]]])
        >>> soft_pool2d(x, variant="shifted")
        tensor([[[0.]]])
    """
    return _soft_pool(2, x, kernel_size, stride, force_inplace, variant)


def soft_pool3d(x, kernel_size=2, stride=None, force_inplace=False, *, variant="aligned") -> Tensor:
    """The authors' ``soft_pool3d``, of (N, C, D, H, W) or (C, D, H, W). See :func:`soft_pool2d`."""
    return _soft_pool(3, x, kernel_size, stride, force_inplace, variant)


def _soft_pool(axes: int, x, kernel_size, stride, force_inplace, variant: str) -> Tensor:
    variant = _effective(variant, force_inplace)
    if variant == "shifted":
        return _shifted(axes, x, kernel_size, stride)
    if variant.startswith("channel_sum"):
        y = _channel_sum(axes, x, kernel_size, stride)
        return y.clamp(min=0) if variant == "channel_sum_clamped" else y
    gradient = "paper" if variant == "aligned" else "exact"
    return _FUNCTIONS[axes](x, kernel_size, stride, gradient=gradient)


def _effective(variant: str, force_inplace) -> str:
    """The variant that runs."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return "channel_sum_clamped" if force_inplace and variant in VARIANTS[:2] else variant


def _shifted(axes: int, x, kernel_size, stride) -> Tensor:
    check_tensor(axes, x)
    kernel_size, stride = Pooling.check(axes, kernel_size, stride)[:2]
    sizes = x.shape[-axes:]
    outs = tuple(size // step for size, step in zip(sizes, stride, strict=True))
    if min(outs) < 1:
        raise ValueError(
            f"x of size {tuple(sizes)} is too small: stride={stride} gives an output of size "
            f"{outs}, at least 1 is needed"
        )
    if axes == 3:
        x = _frames_read_as_rows(x)
    # The end of the last window: what is behind it is cut off, what is missing is padded.
    ends = [
        (out - 1) * step + k - k // 2
        for out, step, k in zip(outs, stride, kernel_size, strict=True)
    ]
    x = x[(..., *map(slice, ends))]
    padding = tuple(
        (k // 2, max(0, end - size)) for k, end, size in zip(kernel_size, ends, sizes, strict=True)
    )
    return _FUNCTIONS[axes](x, kernel_size, stride, padding, gradient="paper")


def _frames_read_as_rows(x: Tensor) -> Tensor:
    """What the authors' 3d kernels read as x[d, h, w]: element d * H + h * W + w of a volume, where
    d * H * W + h * W + w is meant."""
    height, width = x.shape[-2:]
    d, h, w = (torch.arange(size, device=x.device) for size in x.shape[-3:])
    return x.flatten(-3)[..., (d * height)[:, None, None] + (h * width)[:, None] + w]


def _channel_sum(axes: int, x, kernel_size, stride) -> Tensor:
    kernel_size, stride = check_input(axes, x, kernel_size, stride, 0)[:2]

    def windows(t: Tensor) -> Tensor:
        for axis, (k, step) in enumerate(zip(kernel_size, stride, strict=True), t.dim() - axes):
            t = t.unfold(axis, k, step)
        return t.flatten(-axes)

    taps = x.to(compute_dtype(x.dtype))
    # softmax(log(sum over channels of exp(x))), without ever computing exp(x).
    weights = windows(taps.logsumexp(-axes - 1, keepdim=True)).softmax(-1)
    return (weights * windows(taps)).sum(-1).to(x.dtype)


class _SoftPoolNd(PoolModule):
    __constants__ = ("kernel_size", "stride", "force_inplace", "variant")
    _default = "aligned"  # the variant of instances that were pickled by the authors' class

    def __init__(self, kernel_size=2, stride=None, force_inplace=False, *, variant="aligned"):
        super().__init__()
        # Bad arguments are reported where the module is built, not where it first runs.
        Pooling.check(self._axes, kernel_size, stride)
        _effective(variant, force_inplace)
        self.kernel_size = kernel_size
        self.stride = stride
        self.force_inplace = force_inplace
        self.variant = variant

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"variant": self._default, **state})

    def forward(self, x: Tensor) -> Tensor:
        return _soft_pool(self._axes, x, **self._arguments())


class SoftPool1d(_SoftPoolNd):
    """Module form of :func:`soft_pool1d`, same arguments."""

    _axes = 1


class SoftPool2d(_SoftPoolNd):
    """Module form of :func:`soft_pool2d`, same arguments. No ``mmsoftpool.SoftPool2d``, as it need
    not be the same operator: :func:`mmsoftpool.replace_pooling` leaves it in its place.

    Example:
        >>> SoftPool2d(kernel_size=(2, 2), stride=(2, 2))
        SoftPool2d(kernel_size=(2, 2), stride=(2, 2), force_inplace=False, variant='aligned')
    """

    _axes = 2


class SoftPool3d(_SoftPoolNd):
    """Module form of :func:`soft_pool3d`, same arguments."""

    _axes = 3


class _Installed(ModuleType):
    """A module that :func:`install` has made."""


def install(variant: str = "aligned") -> None:
    """Makes ``import softpool_cuda`` and ``from SoftPool import ...`` mean this package.

    Puts modules of the authors' names into ``sys.modules``:

    - ``SoftPool`` has the functions and modules of this file;
    - ``SoftPool.idea`` has them too: a model that was saved whole looks for its classes there;
    - ``softpool_cuda`` has ``forward_1d`` to ``backward_3d``, for code with a copy of the authors'
      autograd functions. They compute the variant on every device.

    A second call with the same variant changes nothing.

    Args:
        variant: One of :data:`VARIANTS`; what those functions and modules compute. Defaults to
            ``'aligned'``.

    Raises:
        RuntimeError: If the authors' own package, or any other of that name, is already imported,
            or another variant is already installed: names that were imported from it would keep
            that one.
        ValueError: If there is no such variant.

    Example:
        >>> install()
        >>> import softpool_cuda
        >>> from SoftPool import soft_pool2d, SoftPool2d
        >>> SoftPool2d()
        SoftPool2d(kernel_size=2, stride=None, force_inplace=False, variant='aligned')
    """
    _effective(variant, False)
    for name in ("SoftPool", "SoftPool.idea", "softpool_cuda"):
        module = sys.modules.get(name)
        if module is None:
            continue
        if not isinstance(module, _Installed):
            raise RuntimeError(
                f"{name} is already imported from {getattr(module, '__file__', None)}: call "
                "mmsoftpool.compat.install() before that, or uninstall that package"
            )
        if module.variant != variant:
            raise RuntimeError(
                f"{name} is already installed with variant={module.variant!r}, and variant="
                f"{variant!r} is wanted now: start a new process, or give variant to the single "
                "calls"
            )
    names = {f"soft_pool{axes}d": partial(_PUBLIC[axes][0], variant=variant) for axes in _PUBLIC}
    names |= {cls.__name__: _with_default(cls, variant) for _, cls in _PUBLIC.values()}
    kernels = {f"forward_{axes}d": partial(_forward, axes, variant) for axes in _PUBLIC}
    kernels |= {f"backward_{axes}d": partial(_backward, axes, variant) for axes in _PUBLIC}
    if "SoftPool" not in sys.modules:
        package = _add_module("SoftPool", variant, names)
        package.__path__ = []  # a package without files
        package.idea = _add_module("SoftPool.idea", variant, names)
        _add_module("softpool_cuda", variant, kernels)


_PUBLIC = {
    1: (soft_pool1d, SoftPool1d),
    2: (soft_pool2d, SoftPool2d),
    3: (soft_pool3d, SoftPool3d),
}


def _add_module(name: str, variant: str, names: dict) -> ModuleType:
    module = sys.modules[name] = _Installed(name, install.__doc__)
    module.__spec__ = ModuleSpec(name, None, origin=__file__)  # for importlib.util.find_spec
    module.__all__ = list(names)
    module.variant = variant
    vars(module).update(names)
    return module


def _with_default(base: type, default: str) -> type:
    """``base`` with another default for ``variant``, as a class of the module ``SoftPool.idea``."""
    init = partialmethod(base.__init__, variant=default)
    names = dict(__module__="SoftPool.idea", __doc__=base.__doc__, _default=default)
    return type(base.__name__, (base,), dict(__init__=init, **names))


def _forward(axes: int, variant: str, input: Tensor, kernel, stride, output: Tensor) -> int:
    with torch.no_grad():
        y = _soft_pool(axes, input, kernel, stride, False, variant)
    _check_shape("output", output, y, variant)
    output.copy_(y)
    return 1


def _backward(
    axes: int, variant: str, output_grad: Tensor, input: Tensor, kernel, stride, input_grad: Tensor
) -> int:
    with torch.enable_grad():
        x = input.detach().requires_grad_()
        y = _soft_pool(axes, x, kernel, stride, False, variant)
    _check_shape("output_grad", output_grad, y, variant)
    _check_shape("input_grad", input_grad, x, variant)
    input_grad += torch.autograd.grad(y, x, output_grad)[0]  # theirs adds, too
    return 1


def _check_shape(argument: str, tensor: Tensor, expected: Tensor, variant: str) -> None:
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{argument} must have the shape {tuple(expected.shape)} with variant={variant!r}, got "
            f"{tuple(tensor.shape)}. Code that allocates size // stride elements is from before "
            "2022-04-07, when the variant was 'shifted'"
        )
