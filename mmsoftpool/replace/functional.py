"""New pools in place of functional ones: calls such as ``F.avg_pool2d(...)`` in a ``forward``.

A module whose calls are replaced gets a subclass of its own class, as in PyTorch's parametrizations
and FSDP. The subclass's forward runs the original one inside a ``TorchFunctionMode``; which
functions that replaces is an attribute of the module. A ``forward`` set on the module would be
bound to it: the replicas of ``nn.DataParallel``, which copy the attributes, would all use the
parameters of the first GPU, and torch.fx, which traces the forward of the class, would miss it. It
does not run the hooks of the module that it traces either.
"""

import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .modules import PoolFactory, axes_of, check_without_parameters, kernel_is_one

#: The functions that can be replaced.
NAMES = [
    f"{prefix}{kind}_pool{axes}d"
    for prefix in ("", "adaptive_")
    for kind in ("max", "avg")
    for axes in (1, 2, 3)
]
# The functions, each with its name: torch.max_pool2d is another object than F.max_pool2d, and with
# return_indices that calls a third one.
_FUNCTIONS = {
    getattr(namespace, function): name
    for name in NAMES
    for namespace in (F, torch)
    for function in (name, f"{name}_with_indices")
    if hasattr(namespace, function)
}
_WITH_INDICES = {
    torch.adaptive_max_pool1d,  # always returns them, F.adaptive_max_pool1d if asked
    *(function for function in _FUNCTIONS if function.__name__.endswith("_with_indices")),
}
#: The attribute of a module that holds its new pools, a :class:`PoolFactory` by function name.
_POOLS = "_functional_pools"
# Where a function is called that runs again in the backward, outside of the forward that called it.
_CHECKPOINT_MODULES = {
    "torch.utils.checkpoint",
    "deepspeed.runtime.activation_checkpointing.checkpointing",
    "fairscale.nn.checkpoint.checkpoint_activations",
}


def function_name(pool: type) -> str:
    """``'adaptive_max_pool2d'`` for ``nn.AdaptiveMaxPool2d``."""
    return pool.__name__.lower().replace("pool", "_pool").replace("adaptive", "adaptive_")


@functools.cache
def functions_called(cls: Any) -> frozenset[str]:
    """The functional pools whose names are in the code of a class."""

    def names(code: types.CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):  # a function inside the function
                yield from names(constant)

    methods = (
        inspect.unwrap(method)
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if method is not getattr(nn.Module, name, None)
    )
    called = {name for method in methods for name in names(method.__code__)}
    return frozenset(called.intersection(NAMES))


def replaced_functions(module: nn.Module) -> dict[str, PoolFactory]:
    """The functions that are replaced in a module, with what makes the pools in their place."""
    pools: dict[str, PoolFactory] = vars(module).get(_POOLS, {})
    return pools


def example(module: nn.Module, function: str, factory: PoolFactory) -> nn.Module:
    """One of the pools that :func:`replace_calls` would make in the calls of ``module``."""
    if "forward" in vars(module):
        raise ValueError("its forward was set on the module itself and not by its class")
    if isinstance(module, torch.fx.GraphModule):  # copies itself without our subclass
        raise ValueError("it is a torch.fx.GraphModule: replace the pools before tracing")
    axes = axes_of(function)
    return check_without_parameters(
        factory.adaptive(axes, 1)
        if function.startswith("adaptive")
        else factory.windowed(axes, dict(kernel_size=2))
    )


def replace_calls(module: nn.Module, function: str, factory: PoolFactory) -> None:
    """Replaces the calls of a function in the forward of a module, and of all modules inside."""
    if not replaced_functions(module):
        cls: Any = type(module)
        module.__class__ = _with_replaced_calls(cls)
    factory = factory.with_class(axes_of(function))
    setattr(module, _POOLS, {**replaced_functions(module), function: factory})


@functools.cache
def _with_replaced_calls(cls: Any) -> Any:
    """The subclass whose forward runs new pools. Code that looks at its name finds that of
    ``cls``."""

    original = cls.forward

    class Replaced(cls):  # type: ignore[misc]
        __module__, __qualname__, __doc__ = cls.__module__, cls.__qualname__, cls.__doc__

        @functools.wraps(original)  # torch.fx and torch.onnx read the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with _ReplacedCalls(replaced_functions(self), self.training):
                return original(self, *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # A pickle finds a class by its name, and under this one it finds `cls`.
            make, args, *state = cls.__reduce_ex__(self, protocol)
            args = tuple(cls if arg is type(self) else arg for arg in args)
            return (_restore, (make, args), *state)

    Replaced.__name__ = cls.__name__
    return Replaced


def _restore(make: Any, args: Any) -> nn.Module:
    """A module from its pickle, before its attributes are set."""
    module = make(*args)
    cls: Any = type(module)
    module.__class__ = _with_replaced_calls(cls)
    return module  # type: ignore[no-any-return]


class _ReplacedCalls(TorchFunctionMode):
    """Runs new pools where functions of the given names are called."""

    def __init__(self, factories: dict[str, PoolFactory], training: bool):
        super().__init__()
        self.factories = factories
        self.training = training

    def __torch_function__(
        self,
        function: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _FUNCTIONS.get(function)
        if name is None or name not in self.factories:
            return function(*args, **kwargs)
        if not torch.compiler.is_compiling() and _is_recomputed():
            raise RuntimeError(
                f"{name} is called inside of an activation checkpoint in the forward of the module "
                "whose functional pools are replaced: the recomputation in the backward would run "
                "the old pool. Checkpoint a module that calls it in its own forward and is "
                "replaced by name, or exclude the call"
            )
        if function in _WITH_INDICES:
            raise ValueError(f"{name} with return_indices cannot be replaced; exclude the module")
        factory, axes = self.factories[name], axes_of(name)
        if name.startswith("adaptive"):
            input, output_size = _adaptive_arguments(*args, **kwargs)
            pool = factory.adaptive(axes, output_size)
        else:
            read = _max_pool_arguments if name.startswith("max") else _avg_pool_arguments
            input, geometry = read(*args, **kwargs)
            if kernel_is_one(geometry["kernel_size"]):
                return function(*args, **kwargs)
            pool = factory.windowed(axes, geometry)
        # Not called as a module: torch.fx looks for the path in the network of those that are.
        return pool.train(self.training).forward(input)


def _is_recomputed() -> bool:
    """Whether an activation checkpoint is between a call and the forward that replaces it."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and not (
        frame.f_globals.get("__name__") == __name__ and frame.f_code.co_name == "forward"
    ):
        if frame.f_globals.get("__name__") in _CHECKPOINT_MODULES:
            return True
        frame = frame.f_back
    return False


def _max_pool_arguments(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Any, dict[str, Any]]:
    return input, dict(
        kernel_size=kernel_size,
        stride=kernel_size if stride is None else stride,
        padding=padding,
        dilation=dilation,
        ceil_mode=ceil_mode,
    )


def _avg_pool_arguments(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Any, dict[str, Any]]:
    if divisor_override is not None:
        raise ValueError("a pool with divisor_override cannot be replaced; exclude the module")
    return _max_pool_arguments(input, kernel_size, stride, padding, 1, ceil_mode)


def _adaptive_arguments(
    input: Any, output_size: Any, return_indices: bool = False
) -> tuple[Any, Any]:
    return input, output_size
