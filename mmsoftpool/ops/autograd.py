"""Differentiation, batching and decomposition of the operators for torch's transforms.

All of torch's private names are in this file. The public ways do not reach far enough (torch
2.13): ``torch.library.register_autograd`` refuses ``torch.func.grad``, gives 0 in forward mode, and
torch 2.1 does not have it; ``torch.autograd.Function`` called in place of the operator leaves the
operator itself without a gradient (opcheck, training of an exported program), and ``torch.compile``
refuses its ``jvp``; inside the operator's autograd kernel it fails under every torch.func
transform.
"""

from contextlib import contextmanager

import torch
from torch._decomp import register_decomposition
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import reference
from .backends import TORCH_VERSION


# The dispatcher calls an operator's autograd kernel once for every level of torch.func's
# transforms, the outer ones from inside the inner ones' forward. torch.autograd.Function would
# start at the topmost level again, hence its base class, which knows one level alone. It turns
# reverse and forward mode off in its forward: the outer levels need them as the caller had them.
@contextmanager
def _below_autograd(modes: tuple[bool, bool]):
    with (
        torch.set_grad_enabled(modes[0]),
        forward_ad._set_fwd_grad_enabled(modes[1]),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        yield


@contextmanager
def _outer_levels(ctx):
    """In ``jvp``: the saved tensors without their tangents of this level, and forward mode as the
    caller had it, for the tangents of the outer levels."""
    primals = [forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]
    with forward_ad._set_fwd_grad_enabled(ctx.modes[1]):
        yield primals


class _SoftPool(_SingleLevelFunction):
    @staticmethod
    def forward(modes, *args):
        with _below_autograd(modes):
            return torch.ops.mmsoftpool.soft_pool(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.modes, input, *ctx.pooling = inputs
        ctx.save_for_backward(input)
        ctx.save_for_forward(input)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        grad_input = torch.ops.mmsoftpool.soft_pool_backward(grad_output, input, *ctx.pooling)
        return (None, grad_input, *[None] * len(ctx.pooling))

    @staticmethod
    def jvp(ctx, _, tangent, *others):
        with _outer_levels(ctx) as (input,):
            return reference.soft_pool_jvp(tangent, input, *ctx.pooling)


class _SoftPoolBackward(_SingleLevelFunction):
    @staticmethod
    def forward(modes, *args):
        with _below_autograd(modes):
            return torch.ops.mmsoftpool.soft_pool_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.modes, grad_output, input, *ctx.pooling = inputs
        ctx.save_for_backward(grad_output, input)
        ctx.save_for_forward(grad_output, input)

    @staticmethod
    def backward(ctx, grad_grad_input):
        grads = reference.soft_pool_double_backward(
            grad_grad_input, *ctx.saved_tensors, *ctx.pooling
        )
        return (None, *grads, *[None] * len(ctx.pooling))

    @staticmethod
    def jvp(ctx, _, grad_tangent, input_tangent, *others):
        tangents = []
        with _outer_levels(ctx) as (grad_output, input):
            if grad_tangent is not None:
                backward = torch.ops.mmsoftpool.soft_pool_backward
                tangents.append(backward(grad_tangent, input, *ctx.pooling))
            if input_tangent is not None:
                _, tangent = reference.soft_pool_double_backward(
                    input_tangent, grad_output, input, *ctx.pooling
                )
                tangents.append(tangent)
            return sum(tangents[1:], start=tangents[0])


def _differentiable(operator, function):
    def kernel(*args):
        if torch._C._are_functorch_transforms_active():
            modes = (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
            with enable_single_level_autograd_function():
                return function.apply(modes, *args)
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args[:2]
        )
        if needs_grad or forward_ad._current_level >= 0:
            return function.apply((False, False), *args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return kernel


def _batched(operator, tensors: int):
    """vmap's rule: the batch is part of N."""

    def rule(info, in_dims, *args):
        batched = [
            t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
            for t, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        result = operator(*(t.flatten(0, 1) for t in batched), *args[tensors:])
        return result.unflatten(0, batched[0].shape[:2]), 0

    return rule


def register(library: torch.library.Library) -> None:
    """Registers autograd, batching and decomposition of both operators."""
    operators = torch.ops.mmsoftpool
    for name, function, tensors in (
        ("soft_pool", _SoftPool, 1),
        ("soft_pool_backward", _SoftPoolBackward, 2),
    ):
        operator = getattr(operators, name)
        library.impl(name, _differentiable(operator, function), "Autograd")
        if TORCH_VERSION >= (2, 5):  # older ones batch by a loop
            torch.library.register_vmap(
                f"mmsoftpool::{name}", _batched(operator, tensors), lib=library
            )
    # Exporters that know no such operator (ONNX) take it apart into the reference.
    register_decomposition(operators.soft_pool.default)(reference.soft_pool)
