"""Differentiation, batching and decomposition of the operators for torch's transforms.

All of torch's private names are in this file. The public ways do not reach far enough (torch
2.13): ``torch.library.register_autograd`` refuses ``torch.func.grad``, gives 0 in forward mode, and
torch 2.1 does not have it; ``torch.autograd.Function`` called in place of the operator leaves the
operator itself without a gradient (opcheck, training of an exported program), and ``torch.compile``
refuses its ``jvp``; inside the operator's autograd kernel it fails under every torch.func
transform. With a torch that has lost one of those names, ``register_autograd`` is what is left.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import onnx, reference
from .backends import TORCH_VERSION
from .pooling import AdaptivePooling, Pooling

#: The private name that this torch does not have; None where all are there. Without them there is
#: no forward mode and no gradient under torch.func; ``mmsoftpool doctor`` reports it.
MISSING: str | None = None
try:
    from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
        enable_single_level_autograd_function,
    )
    from torch.autograd.function import _SingleLevelFunction

    _below_autograd = torch._C._AutoDispatchBelowAutograd
    _transforms_are_active = torch._C._are_functorch_transforms_active
    _forward_mode_is_enabled = torch._C._is_fwd_grad_enabled
    _set_forward_mode = forward_ad._set_fwd_grad_enabled
    forward_ad._current_level  # noqa: B018 (read in every call)
    _included = torch._C._dispatch_tls_local_include_set
    _excluded = torch._C._dispatch_tls_local_exclude_set
    _autograd = torch._C.DispatchKey.AutogradFunctionality
    # What a thread's dispatcher includes where no mode or transform comes before autograd.
    _no_modes = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(
        torch._C.DispatchKey.ADInplaceOrView
    )
except (ImportError, AttributeError) as error:
    MISSING = str(error)


_kernels: dict[str, Callable[..., Tensor]] = {}  # for the dispatch key Autograd, by operator
_is_compiling = getattr(torch.compiler, "is_compiling", lambda: True)  # not in torch 2.1


def call(name: str, *args: Any) -> Tensor:
    """Calls an operator; where autograd comes first, its kernel without the dispatcher.

    The way to a kernel in Python and back takes as long as the pooling of a small map.
    """
    is_direct = (
        not _is_compiling()
        and name in _kernels
        and _included() == _no_modes
        and not _excluded().has(_autograd)
    )
    return (_kernels[name] if is_direct else getattr(torch.ops.mmsoftpool, name))(*args)


class _Formulas:
    """The gradients of a forward operator; what ``register_autograd`` takes, and forward mode."""

    tensors = 1  # arguments that are tensors

    def __init__(self, name: str):
        self.backward_operator = partial(call, f"{name}_backward")
        self.pooling = AdaptivePooling if name.startswith("adaptive") else Pooling

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pooling = self.pooling(*inputs[self.tensors :])
        ctx.save_for_backward(*inputs[: self.tensors])

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        grad_input = self.backward_operator(grad_output, input, *ctx.pooling)
        return (grad_input, *[None] * len(ctx.pooling))

    def jvp(self, pooling: Any, primals: list[Tensor], tangents: tuple[Any, ...]) -> Tensor:
        return reference.soft_pool_jvp(tangents[0], primals[0], pooling)


class _BackwardFormulas(_Formulas):
    """The gradients of a backward operator."""

    tensors = 2

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        output_slope, input = ctx.saved_tensors
        grads = reference.soft_pool_double_backward(grad_output, output_slope, input, ctx.pooling)
        return (*grads, *[None] * len(ctx.pooling))

    def jvp(self, pooling: Any, primals: list[Tensor], tangents: tuple[Any, ...]) -> Tensor:
        (grad_tangent, input_tangent), (grad_output, input) = tangents, primals
        parts: list[Tensor] = []
        if grad_tangent is not None:
            parts.append(self.backward_operator(grad_tangent, input, *pooling))
        if input_tangent is not None:
            double_backward = reference.soft_pool_double_backward
            parts.append(double_backward(input_tangent, grad_output, input, pooling)[1])
        return sum(parts[1:], start=parts[0])


def _autograd_kernel(operator: Any, formulas: _Formulas) -> Callable[..., Tensor]:
    """The operator's kernel for the dispatch key Autograd, by torch's private names.

    The dispatcher calls it once for every level of torch.func's transforms, the outer ones from
    inside the inner ones' forward. torch.autograd.Function would start at the topmost level again,
    hence its base class, which knows only one level. It turns reverse and forward mode off in its
    forward: the outer levels need them as the caller had them, in `modes`.
    """

    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(modes: tuple[bool, bool] | None, *args: Any) -> Any:
            if modes is None:
                with _below_autograd():
                    return operator(*args)
            with (
                torch.set_grad_enabled(modes[0]),
                _set_forward_mode(modes[1]),
                _below_autograd(),
            ):
                return operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.modes, args = inputs[0], inputs[1:]
            formulas.setup_context(ctx, args, output)
            ctx.save_for_forward(*args[: formulas.tensors])

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
            return (None, *formulas.backward(ctx, grad_output))

        @staticmethod
        def jvp(ctx: Any, _: Any, *tangents: Any) -> Tensor:
            # Without the tangents of this level, and forward mode as the caller had it, for the
            # tangents of the outer levels.
            primals = [forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]
            with _set_forward_mode(ctx.modes is not None and ctx.modes[1]):
                return formulas.jvp(ctx.pooling, primals, tangents[: formulas.tensors])

        @staticmethod
        def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:  # as torch.autograd.Function's
            return (ctx._autograd_function_id,)

    apply: Any = Function.apply  # type: ignore[attr-defined]

    def kernel(*args: Any) -> Any:
        if _transforms_are_active():
            modes = (torch.is_grad_enabled(), _forward_mode_is_enabled())
            with enable_single_level_autograd_function():
                return apply(modes, *args)
        # args[1] is the other tensor, or the pooling's first argument.
        needs_grad = torch.is_grad_enabled() and (
            args[0].requires_grad or (formulas.tensors == 2 and args[1].requires_grad)
        )
        if needs_grad or forward_ad._current_level >= 0:
            return apply(None, *args)
        with _below_autograd():
            return operator(*args)

    return kernel


def _batched(operator: Any, tensors: int) -> Callable[..., Any]:
    """vmap's rule: the batch is part of N."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        batched = [
            t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
            for t, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        result = operator(*(t.flatten(0, 1) for t in batched), *args[tensors:])
        return result.unflatten(0, batched[0].shape[:2]), 0

    return rule


def register(library: torch.library.Library, fakes: dict[str, Callable[..., Tensor]]) -> None:
    """Registers autograd, batching and decomposition of the operators in ``fakes``."""
    for name, fake in fakes.items():
        operator = getattr(torch.ops.mmsoftpool, name)
        is_backward = name.endswith("_backward")
        formulas = (_BackwardFormulas if is_backward else _Formulas)(name.removesuffix("_backward"))
        if MISSING is None:
            _kernels[name] = _autograd_kernel(operator, formulas)
            library.impl(name, _kernels[name], "Autograd")
        else:
            torch.library.register_autograd(
                f"mmsoftpool::{name}",
                formulas.backward,
                setup_context=formulas.setup_context,
                lib=library,
            )
        if TORCH_VERSION >= (2, 5):  # older ones batch by a loop
            torch.library.register_vmap(
                f"mmsoftpool::{name}", _batched(operator, formulas.tensors), lib=library
            )
        if not is_backward:
            _register_decomposition(operator.default, getattr(onnx, name), fake)


def _register_decomposition(
    operator: Any, function: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """For exporters that know no such operator: ONNX."""
    try:
        from torch._decomp import register_decomposition
    except ImportError:  # private; ONNX then names the operator that it cannot convert
        return
    register_decomposition(operator)(function)
    # Else a fake tensor with symbolic sizes would take the decomposition, and its guards.
    register_decomposition(operator, type="meta")(fake)
