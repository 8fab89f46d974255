"""The operators ``torch.ops.mmsoftpool.*``: schemas, compiled kernels, autograd.

The schemas and the autograd formulas are here, in Python, once. The pure PyTorch reference is
registered as every operator's default; a compiled library, where it loads, takes over its device.

Arguments of both operators: ``input`` (N, C, spatial...); ``kernel_size``, ``stride`` and
``dilation`` one number per spatial axis; ``padding`` two, (before, after); all of them checked.
Users call :func:`mmsoftpool.soft_pool2d` and its kin, which check and fill in the arguments.
"""

import math
import os
import re
import warnings
from pathlib import Path

import torch
from torch._decomp import register_decomposition
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import flop_counter

from . import reference

_SCHEMA_TAIL = (
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "float alpha, str gradient) -> Tensor"
)
#: Major and minor version of torch.
TORCH_VERSION = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])

# What torch.library has gained since torch 2.1 is left out here, except where it is looked for.
_library = torch.library.Library("mmsoftpool", "DEF")
for _schema in (
    f"soft_pool(Tensor input, {_SCHEMA_TAIL}",
    f"soft_pool_backward(Tensor grad_output, Tensor input, {_SCHEMA_TAIL}",
):
    if TORCH_VERSION >= (2, 2):
        _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    else:
        _library.define(_schema)
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
        path, problem = find_library(device)
        if path is not None:
            try:
                torch.ops.load_library(path)
            except OSError as error:
                problem = f"{path.name} does not load: {error}"
            else:
                backends[device] = str(path)
                continue
        backends[device] = f"(reference: {problem})"
        warnings.warn(
            f"mmsoftpool: no compiled library for {device}: {problem}; SoftPool on {device} runs "
            "on the pure PyTorch reference: the same results, but slower and with more memory. "
            "'python -m mmsoftpool' tells what to do; MMSOFTPOOL_BACKEND=reference asks for this.",
            stacklevel=2,
        )
    return backends


def find_library(device: str) -> tuple[Path | None, str]:
    """The compiled library that fits this torch.

    One on the stable ABI fits every torch from 2.10 on, one on ATen the version in its name.

    Returns:
        Its path and ``""``, or None and why there is none.
    """
    folder = Path(__file__).parents[1]
    stable = folder / f"libmmsoftpool_{device}.so"
    aten = folder / "libmmsoftpool_{}-torch{}.{}.so".format(device, *TORCH_VERSION)
    if aten.exists():
        return aten, ""
    if stable.exists():
        if TORCH_VERSION >= (2, 10):
            return stable, ""
        return None, f"{stable.name} needs torch 2.10, this is {torch.__version__}"
    others = ", ".join(sorted(path.name for path in folder.glob(f"{stable.stem}-torch*.so")))
    if others:
        return None, f"{others} is for another torch than this, {torch.__version__}"
    return None, f"{stable.name} was not built"


#: What runs SoftPool on each device type: a library's path, or why it is the reference.
BACKENDS = _load_compiled()


def _empty(input, sizes):
    return torch.empty(
        sizes,
        dtype=input.dtype,
        device=input.device,
        memory_format=reference.memory_format(input),
    )


def _fake_forward(input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient):
    sizes = reference.output_sizes(
        input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode
    )
    return _empty(input, (*input.shape[:2], *sizes))


def _fake_backward(
    grad_output, input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient
):
    return _empty(input, input.shape)


_library.impl("soft_pool", _fake_forward, "Meta")
_library.impl("soft_pool_backward", _fake_backward, "Meta")


# The dispatcher calls an operator's autograd kernel once for every level of torch.func's
# transforms, the outer ones from inside the inner ones' forward. torch.autograd.Function would
# start at the topmost level again, hence its base class, which knows one level alone. It turns
# gradients off in its forward: the outer levels need them as the caller had them.
class _SoftPool(_SingleLevelFunction):
    @staticmethod
    def forward(grad_enabled, *args):
        with torch.set_grad_enabled(grad_enabled), torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mmsoftpool.soft_pool(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, input, *ctx.pooling = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        grad_input = torch.ops.mmsoftpool.soft_pool_backward(grad_output, input, *ctx.pooling)
        return (None, grad_input, *[None] * len(ctx.pooling))


class _SoftPoolBackward(_SingleLevelFunction):
    @staticmethod
    def forward(grad_enabled, *args):
        with torch.set_grad_enabled(grad_enabled), torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mmsoftpool.soft_pool_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, grad_output, input, *ctx.pooling = inputs
        ctx.save_for_backward(grad_output, input)

    @staticmethod
    def backward(ctx, grad_grad_input):
        grads = reference.soft_pool_double_backward(
            grad_grad_input, *ctx.saved_tensors, *ctx.pooling
        )
        return (None, *grads, *[None] * len(ctx.pooling))


def _differentiable(operator, function):
    def kernel(*args):
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(torch.is_grad_enabled(), *args)
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args[:2]
        )
        if needs_grad or forward_ad._current_level >= 0:  # which apply refuses, with a message
            return function.apply(False, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return kernel


# torch.library.register_autograd would do, if it knew torch.func.grad and torch 2.1.
for _name, _function in (("soft_pool", _SoftPool), ("soft_pool_backward", _SoftPoolBackward)):
    _operator = getattr(torch.ops.mmsoftpool, _name)
    _library.impl(_name, _differentiable(_operator, _function), "Autograd")


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


if TORCH_VERSION >= (2, 5):  # older ones batch by a loop
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


for _operator, _formula in (
    (torch.ops.mmsoftpool.soft_pool, forward_flops),
    (torch.ops.mmsoftpool.soft_pool_backward, backward_flops),
):
    if TORCH_VERSION >= (2, 2):
        flop_counter.register_flop_formula(_operator)(_formula)
    else:
        flop_counter.flop_mapping[_operator] = _formula
