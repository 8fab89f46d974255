"""The operators ``torch.ops.mmsoftpool.*``: schemas, compiled kernels, autograd.

The schemas and the autograd formulas are here, in Python, once. The pure PyTorch reference is
registered as every operator's default; a compiled library, where it loads, takes over its device.

Arguments of both operators: ``input`` (N, C, spatial...); ``kernel_size``, ``stride`` and
``dilation`` one number per spatial axis; ``padding`` two, (before, after); all of them checked.
Users call :func:`mmsoftpool.soft_pool2d` and its kin, which check and fill in the arguments.
"""

import math
import os
import warnings
from pathlib import Path

import torch
from torch._decomp import register_decomposition
from torch.utils.flop_counter import register_flop_formula

from . import reference

_SCHEMA_TAIL = (
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "str gradient) -> Tensor"
)

_library = torch.library.Library("mmsoftpool", "DEF")
for _schema in (
    f"soft_pool(Tensor input, {_SCHEMA_TAIL}",
    f"soft_pool_backward(Tensor grad_output, Tensor input, {_SCHEMA_TAIL}",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("soft_pool", reference.soft_pool, "CompositeExplicitAutograd")
_library.impl("soft_pool_backward", reference.soft_pool_backward, "CompositeExplicitAutograd")


def _load_compiled() -> dict[str, str]:
    """Loads the compiled libraries.

    Returns:
        For each device type, the path of the library that serves it, or the reason why the
        reference does, in parentheses.
    """
    choice = os.environ.get("MMSOFTPOOL_BACKEND", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(
            f"MMSOFTPOOL_BACKEND is {choice!r}; allowed are 'auto' (the compiled library where "
            "there is one) and 'reference' (pure PyTorch)"
        )
    if choice == "reference":
        reason = "(reference: MMSOFTPOOL_BACKEND=reference)"
        return {"cpu": reason, "cuda": reason}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    backends = {"cpu": "", "cuda": "(reference: torch sees no GPU)"}
    for device in devices:
        path = Path(__file__).parents[1] / f"libmmsoftpool_{device}.so"
        problem = "it was not built"
        if path.exists():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                problem = f"it does not load: {error}"
            else:
                backends[device] = str(path)
                continue
        backends[device] = f"(reference: no {path.name}, {problem})"
        warnings.warn(
            f"mmsoftpool: {path.name} is missing ({problem}); SoftPool on {device} runs on the "
            "pure PyTorch reference: the same results, but slower and with more memory. Reinstall "
            "with a C++ compiler at hand (and nvcc for CUDA), or set MMSOFTPOOL_BACKEND=reference "
            "if this is what you want.",
            stacklevel=2,
        )
    return backends


#: What runs SoftPool on each device type: a library's path, or why it is the reference.
BACKENDS = _load_compiled()


def _empty(input, sizes):
    return torch.empty(
        sizes,
        dtype=input.dtype,
        device=input.device,
        memory_format=reference.memory_format(input),
    )


@torch.library.register_fake("mmsoftpool::soft_pool", lib=_library)
def _(input, kernel_size, stride, padding, dilation, ceil_mode, gradient):
    sizes = reference.output_sizes(
        input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode
    )
    return _empty(input, (*input.shape[:2], *sizes))


@torch.library.register_fake("mmsoftpool::soft_pool_backward", lib=_library)
def _(grad_output, input, kernel_size, stride, padding, dilation, ceil_mode, gradient):
    return _empty(input, input.shape)


def _setup_forward(ctx, inputs, output):
    input, *ctx.pooling = inputs
    ctx.save_for_backward(input)


def _backward(ctx, grad_output):
    (input,) = ctx.saved_tensors
    grad_input = torch.ops.mmsoftpool.soft_pool_backward(grad_output, input, *ctx.pooling)
    return (grad_input, *[None] * len(ctx.pooling))


def _setup_backward(ctx, inputs, output):
    grad_output, input, *ctx.pooling = inputs
    ctx.save_for_backward(grad_output, input)


def _double_backward(ctx, grad_grad_input):
    grads = reference.soft_pool_double_backward(grad_grad_input, *ctx.saved_tensors, *ctx.pooling)
    return (*grads, *[None] * len(ctx.pooling))


torch.library.register_autograd(
    "mmsoftpool::soft_pool", _backward, setup_context=_setup_forward, lib=_library
)
torch.library.register_autograd(
    "mmsoftpool::soft_pool_backward", _double_backward, setup_context=_setup_backward, lib=_library
)


def _join_batch(tensors, dims, size):
    """Tensors with the batch of vmap, (B, N, ...), as (B N, ...)."""
    return [
        (t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)).flatten(0, 1)
        for t, dim in zip(tensors, dims, strict=True)
    ]


def _batched(operator, tensors):
    def rule(info, in_dims, *args):
        joined = _join_batch(args[:tensors], in_dims[:tensors], info.batch_size)
        result = operator(*joined, *args[tensors:])
        return result.unflatten(0, (info.batch_size, -1)), 0

    return rule


for _name, _tensors in (("soft_pool", 1), ("soft_pool_backward", 2)):
    torch.library.register_vmap(
        f"mmsoftpool::{_name}",
        _batched(getattr(torch.ops.mmsoftpool, _name), _tensors),
        lib=_library,
    )

# Exporters that know no such operator (ONNX) take it apart into the reference.
register_decomposition(torch.ops.mmsoftpool.soft_pool.default)(reference.soft_pool)


def forward_flops(input, kernel_size, *args, out_shape, **kwargs) -> int:
    """Per tap: maximum, difference, exponential, two sums and a product."""
    return 6 * math.prod(kernel_size) * math.prod(out_shape)


def backward_flops(grad_output, input, kernel_size, *args, out_shape, **kwargs) -> int:
    """Per tap: as the forward, and a sum, two products and the addition to the gradient."""
    return 10 * math.prod(kernel_size) * math.prod(grad_output)


register_flop_formula(torch.ops.mmsoftpool.soft_pool)(forward_flops)
register_flop_formula(torch.ops.mmsoftpool.soft_pool_backward)(backward_flops)
