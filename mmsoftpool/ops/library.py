"""The operators ``torch.ops.mmsoftpool.*``: schemas, kernels, fake kernels, sharding.

Arguments of all: ``input`` (N, C, spatial...), in the backward after ``grad_output``, and the
fields of a checked :class:`~mmsoftpool.ops.pooling.Pooling` or ``AdaptivePooling``. Users call
:func:`mmsoftpool.soft_pool2d` and its variants, which check and complete the arguments. Gradients
and batching are in :mod:`mmsoftpool.ops.autograd`, FLOPs in :mod:`mmsoftpool.ops.flops`.
"""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import autograd, backends, reference
from .backends import TORCH_VERSION
from .pooling import Pooling

_POOLING = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
_ADAPTIVE = "SymInt[] output_size"
# What torch.library has gained since torch 2.1 is not used, except where it is looked for.
_library = torch.library.Library("mmsoftpool", "DEF")
for _schema in (
    f"soft_pool(Tensor input, {_POOLING}",
    f"soft_pool_backward(Tensor grad_output, Tensor input, {_POOLING}",
    f"adaptive_soft_pool(Tensor input, {_ADAPTIVE}",
    f"adaptive_soft_pool_backward(Tensor grad_output, Tensor input, {_ADAPTIVE}",
):
    _schema = f"{_schema}, float alpha, str gradient) -> Tensor"
    if TORCH_VERSION >= (2, 2):
        _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    else:
        _library.define(_schema)


def _default_kernel(name: str) -> Any:
    """What runs on a device without kernels: the reference. On CUDA the kernels are loaded first;
    from then on they run, and this does not."""
    operator, reference_kernel = getattr(torch.ops.mmsoftpool, name), getattr(reference, name)

    def kernel(*args: Any) -> Any:
        device = args[0].device
        if device.type == "cuda" and backends.load(device).path is not None:
            return operator(*args)
        return reference_kernel(*args)

    return kernel


def _empty(input: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.empty(
        tuple(sizes),
        dtype=input.dtype,
        device=input.device,
        memory_format=reference.memory_format(input),
    )


def _fake_forward(input: Tensor, *args: Any) -> Tensor:
    return _empty(input, (*input.shape[:2], *Pooling(*args).output_sizes(input.shape[2:])))


def _fake_adaptive_forward(input: Tensor, output_size: Sequence[int], *args: Any) -> Tensor:
    return _empty(input, (*input.shape[:2], *output_size))


def _fake_backward(grad_output: Tensor, input: Tensor, *args: Any) -> Tensor:
    # Also what runs for a meta tensor beside a real one.
    for name in ("device", "dtype"):
        got, allowed = getattr(grad_output, name), getattr(input, name)
        if got != allowed:
            raise ValueError(f"grad_output must have the {name} of input, {allowed}, got {got}")
    return _empty(input, input.shape)


_fakes: dict[str, Any] = dict(
    soft_pool=_fake_forward,
    soft_pool_backward=_fake_backward,
    adaptive_soft_pool=_fake_adaptive_forward,
    adaptive_soft_pool_backward=_fake_backward,
)
for _name, _fake in _fakes.items():
    _library.impl(_name, _default_kernel(_name), "CompositeExplicitAutograd")
    _library.impl(_name, _fake, "Meta")
autograd.register(_library, _fakes)
backends.load("cpu")


def register_sharding() -> None:
    """Registers how DTensor shards the operators: by batch and by channels, as ``max_pool2d``.

    For a tensor that may be one: its module is imported by then, which takes a second."""
    if "torch.distributed.tensor" in sys.modules and TORCH_VERSION >= (2, 5):
        _register_sharding()


@cache
def _register_sharding() -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    for name in reference.OPERATORS:
        tensors = 2 if name.endswith("backward") else 1

        def rule(*args: Any, tensors: int = tensors) -> list[tuple[list[Any], list[Any]]]:
            others = [None] * (len(args) - tensors)
            return [
                ([placement], [placement] * tensors + others)
                for placement in (Replicate(), Shard(0), Shard(1))
            ]

        register_sharding(getattr(torch.ops.mmsoftpool, name).default)(rule)
