"""New pools in place of pool modules, with the same geometry."""

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .. import ops


def _pools(prefix: str) -> tuple[type, ...]:
    """The classes of torch.nn and of this package with that prefix."""
    names = [f"{prefix}{kind}Pool{axes}d" for kind in ("Max", "Avg", "Soft") for axes in (1, 2, 3)]
    return tuple(
        getattr(package, name) for name in names for package in (nn, ops) if hasattr(package, name)
    )


WINDOWED = _pools("")
ADAPTIVE = _pools("Adaptive")
# What a pool does without that argument; `stride` is compared with the kernel size.
_NEUTRAL = dict(padding=0, dilation=1, ceil_mode=False)


def pool_class(module: nn.Module) -> type | None:
    """The class in ``WINDOWED`` or ``ADAPTIVE`` whose forward a module has, None for all others."""
    for base in WINDOWED + ADAPTIVE:
        if isinstance(module, base) and type(module).forward is base.forward:  # type: ignore[attr-defined]
            return base
    return None


def axes_of(name: str) -> int:
    """2 for ``'MaxPool2d'`` and for ``'max_pool2d'``."""
    return int(name[-2])


def per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """``value``, a number or one per axis, as a tuple."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * axes if len(values) == 1 else values


def kernel_is_one(kernel_size: Any) -> bool:
    """Whether a pool with that ``kernel_size`` only subsamples."""
    return set(per_axis(kernel_size, 1)) == {1}


@dataclass(frozen=True)
class PoolFactory:
    """Makes the new pools."""

    kind: type | str  # a class or its name; one that ends in 2d stands for 1d, 2d or 3d
    arguments: dict[str, Any]  # of the class, beside those that are taken from the old pool

    @classmethod
    def from_config(cls, pool: Any) -> "PoolFactory":
        """The factory for ``pool``, a class or a config dict with ``type``."""
        arguments = dict(pool) if isinstance(pool, dict) else dict(type=pool)
        kind = arguments.pop("type", None)
        if not isinstance(kind, type) and not (isinstance(kind, str) and isinstance(pool, dict)):
            raise TypeError(
                "pool must be a class or a dict with 'type', a class or its name, for example "
                f"dict(type='SoftPool2d'), got {pool!r}"
            )
        return cls(kind, arguments)

    def with_class(self, axes: int) -> "PoolFactory":
        """The same with its class looked up. For pools that are made in a forward: torch.compile
        cannot trace the look-up in a registry."""
        return PoolFactory(_class_for(self.kind, axes), self.arguments)

    def windowed(self, axes: int, geometry: dict[str, Any]) -> nn.Module:
        """The pool of that geometry; arguments that the class does not have may be left at their
        default."""
        cls = _class_for(self.kind, axes)
        if "kernel_size" in self.arguments:
            return _make(cls, **self.arguments)
        arguments = {**geometry, **self.arguments}
        for name, value in geometry.items():
            if _takes(cls, name):
                continue
            neutral = geometry["kernel_size"] if name == "stride" else _NEUTRAL.get(name)
            if per_axis(value, axes) != per_axis(neutral, axes):
                raise ValueError(f"{cls.__name__} has no argument {name}, which is {value!r} here")
            del arguments[name]
        return _make(cls, **arguments)

    def adaptive(self, axes: int, output_size: Any) -> nn.Module:
        """The pool of that output size: the adaptive variant, which is named Adaptive... and is
        beside the class, or else :class:`EqualWindows`."""
        cls = _class_for(self.kind, axes)
        if "kernel_size" in self.arguments:
            return _make(cls, **self.arguments)
        variant = getattr(sys.modules[cls.__module__], f"Adaptive{cls.__name__}", None)
        if variant is None:
            return EqualWindows(axes, output_size, self)
        for name, value in self.arguments.items():
            if not _takes(variant, name):
                raise ValueError(f"{variant.__name__} has no argument {name}, which is {value!r}")
        return _make(variant, output_size, **self.arguments)


class EqualWindows(nn.Module):
    """An adaptive pool over windows of input size / output size, for pools without an adaptive
    variant.

    These are the windows of torch's adaptive pools where that is a whole number; any other input
    raises a ValueError.
    """

    def __init__(self, axes: int, output_size: Any, factory: PoolFactory):
        super().__init__()
        # The pool depends on the input's size and is made anew in every call.
        check_without_parameters(factory.windowed(axes, dict(kernel_size=2)))
        self.output_size = per_axis(output_size, axes)
        self.factory = factory.with_class(axes)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            # torch.fx knows no sizes: a leaf of its graph, as torch's own pools are.
            path = input.tracer.path_of_module(self)
            return input.tracer.create_proxy("call_module", path, (input,), {})
        axes = len(self.output_size)
        sizes = input.shape[-axes:]
        outs = [
            size if out is None else out for size, out in zip(sizes, self.output_size, strict=True)
        ]
        if any(size % out for size, out in zip(sizes, outs, strict=True)):
            raise ValueError(
                f"an input of size {tuple(sizes)} does not divide into {tuple(outs)} equal windows"
            )
        kernel_size = tuple(size // out for size, out in zip(sizes, outs, strict=True))
        pool = self.factory.windowed(axes, dict(kernel_size=kernel_size))
        output: Tensor = pool.train(self.training)(input)
        return output

    def extra_repr(self) -> str:
        kind = self.factory.kind
        name = kind if isinstance(kind, str) else kind.__name__
        return f"output_size={self.output_size}, pool={name}"


def counterpart(old: nn.Module, factory: PoolFactory) -> nn.Module:
    """The new pool for the place of ``old``."""
    if "forward" in vars(old):
        raise ValueError("its forward was set on the module itself and not by its class")
    for setting in ("return_indices", "divisor_override"):
        if getattr(old, setting, None):
            raise ValueError(f"it has {setting}, which only torch's own pools have")
    base = pool_class(old)
    assert base is not None  # selection.py selects only pools
    axes = axes_of(base.__name__)
    if isinstance(old, ADAPTIVE):
        return factory.adaptive(axes, old.output_size)
    geometry = dict(
        kernel_size=old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=getattr(old, "dilation", 1),
        ceil_mode=old.ceil_mode,
    )
    return factory.windowed(axes, geometry)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Gives ``new``, in place of ``old``, what others have put on that: attributes, hooks,
    parameters, buffers and submodules, and the flags ``training`` and ``requires_grad``.

    The dicts of hooks become those of ``old``, so that handles still remove a hook.
    """
    for name, part in old.named_modules():
        if name in dict(new.named_modules()):
            new.get_submodule(name).training = part.training
    for name, parameter in old.named_parameters():
        if name in dict(new.named_parameters()):
            new.get_parameter(name).requires_grad_(parameter.requires_grad)
    modules_own = vars(nn.Module())
    arguments = inspect.signature(pool_class(old) or type(old)).parameters
    for name, value in vars(old).items():
        if "hooks" in name and name in modules_own:
            value.update(getattr(new, name))
            setattr(new, name, value)
        elif name in ("_parameters", "_buffers", "_modules"):
            setattr(new, name, {**value, **getattr(new, name)})
        elif name == "_non_persistent_buffers_set":
            getattr(new, name).update(value)
        elif name == "_is_full_backward_hook" or not (name in arguments or name in vars(new)):
            setattr(new, name, value)


def check_without_parameters(pool: nn.Module) -> nn.Module:
    """Returns ``pool``, which is made anew in every call and so cannot have parameters."""
    if any(part._parameters for part in pool.modules()):
        raise ValueError(
            f"{type(pool).__name__} has parameters, and neither a function nor a pool of unknown "
            "size has a place for them"
        )
    return pool


def _make(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
    pool: nn.Module = cls(*args, **kwargs)
    return pool


def _takes(cls: type, argument: str) -> bool:
    parameters = inspect.signature(cls).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _class_for(kind: type | str, axes: int) -> type:
    """The class ``kind``, or its 1d, 2d or 3d variant."""
    name = re.sub("[123]d$", f"{axes}d", kind if isinstance(kind, str) else kind.__name__)
    if isinstance(kind, type):
        found = kind if name == kind.__name__ else getattr(sys.modules[kind.__module__], name, None)
    else:
        found = getattr(ops, name, None) or getattr(nn, name.removeprefix("torch.nn."), None)
        if found is None and "mmengine" in sys.modules:  # this package imports it if installed
            from mmengine.registry import MODELS

            try:
                with MODELS.switch_scope_and_registry(None) as registry:
                    found = registry.get(name)
            except RuntimeError:  # newer versions raise where older ones return None
                found = None
    if found is None:
        raise ValueError(
            f"there is no {name} to replace a {axes}d pool with; pool may have a class of this "
            "package, of torch.nn, or one that is registered in mmengine's MODELS"
        )
    return found
