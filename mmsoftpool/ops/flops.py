"""FLOPs of the operators, for torch's counter and for those of other packages.

Of a tap, forward: maximum, difference, exponential, two sums and a product. Backward: as the
forward, and a sum, two products and the addition to the gradient. torch's and mmengine's counters
know the operators; the others take a dict from here as an argument::

    thop.profile(net, inputs=(x,), custom_ops=flops.THOP)
    ptflops.get_model_complexity_info(net, (3, 224, 224), custom_modules_hooks=flops.PTFLOPS)
    fvcore.nn.FlopCountAnalysis(net, x).set_op_handle(**flops.FVCORE)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

from . import modules
from .backends import TORCH_VERSION
from .pooling import Pooling

_FORWARD, _BACKWARD = 6, 10


def _taps(kernel_size: Sequence[int], outputs: Sequence[int]) -> int:
    """Number of taps of all windows of a pooling with outputs of a shape."""
    return math.prod(kernel_size) * math.prod(outputs)


def _adaptive_taps(input: Sequence[int], output_size: Sequence[int]) -> int:
    """The same of an adaptive pooling; neighbouring windows share a tap, except where the sizes
    divide."""
    axes = len(output_size)
    sizes = zip(input[-axes:], output_size, strict=True)
    return math.prod(input[:-axes]) * math.prod(n + out - math.gcd(n, out) for n, out in sizes)


# torch's FlopCounterMode gives the formulas the arguments, with shapes in place of tensors.
_formulas: dict[str, Any] = dict(
    soft_pool=lambda x, k, *_, out_shape, **__: _FORWARD * _taps(k, out_shape),
    soft_pool_backward=lambda g, x, k, *_, **__: _BACKWARD * _taps(k, g),
    adaptive_soft_pool=lambda x, outs, *_, **__: _FORWARD * _adaptive_taps(x, outs),
    adaptive_soft_pool_backward=lambda g, x, outs, *_, **__: _BACKWARD * _adaptive_taps(x, outs),
)
for _name, _formula in _formulas.items():
    _operator = getattr(torch.ops.mmsoftpool, _name)
    if TORCH_VERSION >= (2, 2):
        flop_counter.register_flop_formula(_operator)(_formula)
        if _operator not in flop_counter.flop_registry:  # torch 2.4 has registered its overload
            flop_counter.flop_registry[_operator] = flop_counter.shape_wrapper(_formula)
    else:
        flop_counter.flop_mapping[_operator] = _formula  # type: ignore[attr-defined]


def _of_module(module: Any, inputs: Any, output: Any) -> int:
    if hasattr(module, "output_size"):
        return _FORWARD * _adaptive_taps(inputs[0].shape, output.shape[-module._axes :])
    kernel_size = Pooling.check(module._axes, module.kernel_size).kernel_size
    return _FORWARD * _taps(kernel_size, output.shape)


def _thop(module: Any, inputs: Any, output: Any) -> None:
    module.total_ops += _of_module(module, inputs, output)


def _ptflops(module: Any, inputs: Any, output: Any) -> None:
    module.__flops__ += _of_module(module, inputs, output)


def _soft_pool_node(inputs: Any, outputs: Any) -> int:
    kernel_size = [value.toIValue() for value in inputs[1].node().inputs()]
    return _FORWARD * _taps(kernel_size, outputs[0].type().sizes())


def _adaptive_soft_pool_node(inputs: Any, outputs: Any) -> int:
    return _FORWARD * _adaptive_taps(inputs[0].type().sizes(), outputs[0].type().sizes()[2:])


_MODULES: list[type[nn.Module]] = [
    getattr(modules, f"{prefix}SoftPool{axes}d")
    for prefix in ("", "Adaptive")
    for axes in (1, 2, 3)
]
#: For ``custom_ops`` of thop.
THOP = dict.fromkeys(_MODULES, _thop)
#: For ``custom_modules_hooks`` of ptflops.
PTFLOPS = dict.fromkeys(_MODULES, _ptflops)
#: For ``set_op_handle`` of fvcore, and of mmengine's ``FlopAnalyzer``.
FVCORE = {
    "mmsoftpool::soft_pool": _soft_pool_node,
    "mmsoftpool::adaptive_soft_pool": _adaptive_soft_pool_node,
}
