"""The operators ``torch.ops.mmsoftpool.*``: schemas, kernels of the devices, fake kernels, FLOPs.

Arguments of both: ``input`` (N, C, spatial...) and the fields of a checked
:class:`~mmsoftpool.ops.pooling.Pooling`. Users call :func:`mmsoftpool.soft_pool2d` and its variants
for other dimensions, which check and complete the arguments. Gradients and batching are in
:mod:`mmsoftpool.ops.autograd`.
"""

import math

import torch
from torch.utils import flop_counter

from . import autograd, backends, reference
from .backends import TORCH_VERSION
from .pooling import Pooling

_SCHEMA_TAIL = (
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, float alpha, "
    "str gradient) -> Tensor"
)
# What torch.library has gained since torch 2.1 is not used, except where it is looked for.
_library = torch.library.Library("mmsoftpool", "DEF")
for _schema in (
    f"soft_pool(Tensor input, {_SCHEMA_TAIL}",
    f"soft_pool_backward(Tensor grad_output, Tensor input, {_SCHEMA_TAIL}",
):
    if TORCH_VERSION >= (2, 2):
        _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    else:
        _library.define(_schema)


def _default_kernel(name: str):
    """What runs on a device without kernels: the reference. On CUDA the kernels are loaded first;
    from then on they run, and this does not."""
    operator, reference_kernel = getattr(torch.ops.mmsoftpool, name), getattr(reference, name)

    def kernel(*args):
        device = args[0].device
        if device.type == "cuda" and backends.load(device).path is not None:
            return operator(*args)
        return reference_kernel(*args)

    return kernel


def _empty(input, sizes):
    return torch.empty(
        sizes,
        dtype=input.dtype,
        device=input.device,
        memory_format=reference.memory_format(input),
    )


def _fake_forward(input, *args):
    return _empty(input, (*input.shape[:2], *Pooling(*args).output_sizes(input.shape[2:])))


def _fake_backward(grad_output, input, *args):
    # Also what runs for a meta tensor beside a real one.
    for name in ("device", "dtype"):
        got, allowed = getattr(grad_output, name), getattr(input, name)
        if got != allowed:
            raise ValueError(f"grad_output must have the {name} of input, {allowed}, got {got}")
    return _empty(input, input.shape)


for _name, _fake in (("soft_pool", _fake_forward), ("soft_pool_backward", _fake_backward)):
    _library.impl(_name, _default_kernel(_name), "CompositeExplicitAutograd")
    _library.impl(_name, _fake, "Meta")
autograd.register(_library)
backends.load("cpu")


def forward_flops(input, kernel_size, *args, out_shape, **kwargs) -> int:
    """Per tap: maximum, difference, exponential, two sums and a product."""
    return 6 * math.prod(kernel_size) * math.prod(out_shape)


def backward_flops(grad_output, input, kernel_size, *args, out_shape, **kwargs) -> int:
    """Per tap: as the forward, and a sum, two products and the addition to the gradient."""
    return 10 * math.prod(kernel_size) * math.prod(grad_output)


for _operator, _formula in (
    (torch.ops.mmsoftpool.soft_pool, forward_flops),
    (torch.ops.mmsoftpool.soft_pool_backward, backward_flops),
):
    if TORCH_VERSION >= (2, 2):
        flop_counter.register_flop_formula(_operator)(_formula)
        if _operator not in flop_counter.flop_registry:  # torch 2.4 has registered its overload
            flop_counter.flop_registry[_operator] = flop_counter.shape_wrapper(_formula)
    else:
        flop_counter.flop_mapping[_operator] = _formula
