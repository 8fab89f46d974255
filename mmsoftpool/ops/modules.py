"""SoftPool as modules, with the arguments of ``nn.MaxPool2d`` and ``nn.AdaptiveAvgPool2d``."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from . import functional as F
from .pooling import Gradient, Ints, OutputSize, Padding, Pooling, check_sizes

_SOFTMAX = ("alpha", "gradient")


class PoolModule(nn.Module):
    """A pool whose arguments are attributes of the same names, those in ``__constants__``."""

    __constants__: ClassVar[tuple[str, ...]]
    _axes: ClassVar[int]
    _function: ClassVar[Callable[..., Tensor]]

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__constants__}

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input, **self._arguments())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it first
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose arguments are checked "
            "in Python: use torch.jit.trace or torch.export.export"
        )


class _SoftPoolNd(PoolModule):
    __constants__ = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", *_SOFTMAX)

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        alpha: float = 1.0,
        gradient: Gradient = "exact",
    ):
        super().__init__()
        if return_indices is not False:
            raise ValueError(
                f"return_indices must be False, got {return_indices!r}: the output of SoftPool is "
                "not one of the inputs (ceil_mode follows it, as in nn.MaxPool2d)"
            )
        # Bad arguments are reported where the module is built, not where it first runs.
        Pooling.check(
            self._axes, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient
        )
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode
        self.alpha = alpha
        self.gradient = gradient


class SoftPool1d(_SoftPoolNd):
    """Module form of :func:`mmsoftpool.soft_pool1d`, same arguments; (N, C, L) or (C, L)."""

    _axes = 1
    _function = staticmethod(F.soft_pool1d)


class SoftPool2d(_SoftPoolNd):
    """Module form of :func:`mmsoftpool.soft_pool2d`. A drop-in for ``nn.MaxPool2d``; in a config
    ``dict(type='SoftPool2d', kernel_size=3, stride=2, padding=1)``.

    The arguments are those of the function, in the order of ``nn.MaxPool2d``: ``return_indices``,
    which must be False, is before ``ceil_mode``.

    Example:
        >>> import torch
        >>> SoftPool2d(kernel_size=3, stride=2, padding=1)(torch.rand(1, 64, 56, 56)).shape
        torch.Size([1, 64, 28, 28])
    """

    _axes = 2
    _function = staticmethod(F.soft_pool2d)


class SoftPool3d(_SoftPoolNd):
    """Module form of :func:`mmsoftpool.soft_pool3d`, same arguments; (N, C, D, H, W) or
    (C, D, H, W)."""

    _axes = 3
    _function = staticmethod(F.soft_pool3d)


class _AdaptiveSoftPoolNd(PoolModule):
    __constants__ = ("output_size", *_SOFTMAX)

    def __init__(
        self, output_size: OutputSize, *, alpha: float = 1.0, gradient: Gradient = "exact"
    ):
        super().__init__()
        check_sizes(self._axes, output_size)
        Pooling.check(self._axes, 1, alpha=alpha, gradient=gradient)
        self.output_size = output_size
        self.alpha = alpha
        self.gradient = gradient


class AdaptiveSoftPool1d(_AdaptiveSoftPoolNd):
    """Module form of :func:`mmsoftpool.adaptive_soft_pool1d`, same arguments; (N, C, L) or
    (C, L)."""

    _axes = 1
    _function = staticmethod(F.adaptive_soft_pool1d)


class AdaptiveSoftPool2d(_AdaptiveSoftPoolNd):
    """Module form of :func:`mmsoftpool.adaptive_soft_pool2d`, same arguments. A drop-in for
    ``nn.AdaptiveAvgPool2d``; ``AdaptiveSoftPool2d(1)`` is the global pool.

    Example:
        >>> import torch
        >>> AdaptiveSoftPool2d(1)(torch.rand(2, 512, 7, 7)).shape
        torch.Size([2, 512, 1, 1])
    """

    _axes = 2
    _function = staticmethod(F.adaptive_soft_pool2d)


class AdaptiveSoftPool3d(_AdaptiveSoftPoolNd):
    """Module form of :func:`mmsoftpool.adaptive_soft_pool3d`, same arguments; (N, C, D, H, W) or
    (C, D, H, W)."""

    _axes = 3
    _function = staticmethod(F.adaptive_soft_pool3d)
