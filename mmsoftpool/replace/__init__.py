"""Swapping the pooling layers of any network, as the paper does in whole families of them
(Stergiou et al., ICCV 2021, sections 4.4 to 4.7). Needs torch alone."""

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from types import CodeType

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import ops

_WINDOWED = tuple(
    getattr(nn, f"{kind}Pool{axes}d") for kind in ("Max", "Avg") for axes in (1, 2, 3)
)
_ADAPTIVE = tuple(
    getattr(nn, f"Adaptive{kind}Pool{axes}d") for kind in ("Max", "Avg") for axes in (1, 2, 3)
)
_SOFT = (ops.SoftPool1d, ops.SoftPool2d, ops.SoftPool3d)
# The functions, each with its name: torch.max_pool2d is another object than F.max_pool2d, and with
# return_indices that calls a third one.
_FUNCTIONAL = {
    getattr(namespace, function): name
    for name in [f"{kind}_pool{axes}d" for kind in ("max", "avg") for axes in (1, 2, 3)]
    for namespace in (F, torch)
    for function in (name, f"{name}_with_indices")
    if hasattr(namespace, function)
}
# What a pool does without that argument; `stride` is compared with the kernel size.
_NEUTRAL = dict(padding=0, dilation=1, ceil_mode=False)


def replace_pooling(
    module: nn.Module,
    pool=dict(type="SoftPool2d"),
    *,
    include=None,
    exclude=(),
) -> dict[str, nn.Module]:
    """Replaces the max and average pools in a network by SoftPool, in place.

    Every new pool has the kernel, stride, padding, dilation and ceil_mode of the one it replaces,
    so that all shapes stay as they were. No parameter or buffer is renamed: checkpoints of the
    network load as before, and one that is already loaded stays.

    Padding carries no weight in SoftPool, also where it replaces an average pool that counted the
    padded zeros (``count_include_pad=True``).

    Some pools stay unless they are named one by one, by their full name, or by their class: global
    ones (``nn.AdaptiveAvgPool2d`` and its kin, which then get windows of input size / output size)
    and those with a kernel of 1, which only subsample.

    Functional pools, such as ``F.avg_pool2d(...)`` called in a ``forward``, are no modules. They
    are found by name in the code of a module's class and are listed as its children: the pool in
    timm's ``Mixed_5b`` is ``'Mixed_5b.avg_pool2d()'``. As such calls may also do other things than
    pooling features (find local maxima, for one), they are replaced only where ``include`` has a
    name that selects them, ``'Mixed_5b'`` or ``'*'``; otherwise a warning names those that stay.
    Not reached: calls in functions outside of a class, functional adaptive pools, a mean over
    axes, and what ``torch.utils.checkpoint`` runs again inside of that same ``forward``.

    Args:
        module: The network.
        pool: The new pool: a class, or a config dict with ``type``, a class or its name, and more
            of its arguments, such as ``gradient='paper'``; with a ``kernel_size`` among them they
            are its whole geometry, and nothing is taken from the old pool. Names are those of this
            package and of torch.nn and, where mmengine is installed, all that its registries have.
            A name that ends in ``2d`` stands for its 1d and 3d kin too, wherever such pools are
            met. Defaults to ``dict(type='SoftPool2d')``.
        include: What to replace: one or more classes and names. A class (or its name with
            ``torch.nn.`` before it) selects its pools; a name, in which ``*`` and ``?`` are
            wildcards, the module of that qualified name and all pools inside. Defaults to None:
            all ``nn.MaxPool`` and ``nn.AvgPool`` modules.
        exclude: What to keep of that, in the same form. Defaults to none.

    Returns:
        The new pools by their qualified names, in the network's order. For a functional pool the
        value is a pool with the kernel of 2 as a specimen.

    Raises:
        ValueError: If nothing matches, if a name matches no pool, or if the new pool has no
            counterpart for a setting of the old one (``return_indices``, ``divisor_override``).
            The network is then unchanged.
        TypeError: If an argument has the wrong type.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
        >>> list(replace_pooling(net))
        ['1']
        >>> net(torch.rand(1, 3, 10, 10)).shape
        torch.Size([1, 8, 1, 1])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    make = _maker(pool)
    include = None if include is None else _selectors("include", include)
    exclude = _selectors("exclude", exclude)
    found = dict(_find(module))
    chosen, left = {}, []
    for name, (old, function) in found.items():
        if any(_selects(selector, name, old, function) for selector in exclude):
            continue
        if include is None:
            wanted = _kind(old) in _WINDOWED and not _kernel_is_one(old)
        else:
            wanted = any(_selects(selector, name, old, function) for selector in include)
        if wanted:
            chosen[name] = (old, function)
        elif function and function not in _replaced_in(old):
            left.append(name)
    _check_selection(module, found, chosen, include, exclude)
    if left and not any(isinstance(selector, str) for selector in include or ()):
        warnings.warn(
            f"functional pools stay as they are: {', '.join(left)}. Name them in include to "
            "replace them, or in exclude to silence this warning",
            stacklevel=2,
        )

    made, new = {}, {}  # all are made before the first is put in its place
    for name, (old, function) in chosen.items():
        if id(old) not in made or function:
            made[id(old)] = _counterpart(name, old, function, make)
        new[name] = made[id(old)]
    device = next((p.device for p in module.parameters()), None)  # for pools with parameters
    for name, (old, function) in chosen.items():
        if function:
            old.forward = partial(_forward, old, {**_replaced_in(old), function: make})
        else:
            parent, _, child = name.rpartition(".")
            pool = new[name].train(old.training)
            setattr(
                module.get_submodule(parent), child, pool if device is None else pool.to(device)
            )
    return new


def _find(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str | None]]]:
    """Names of all pools, each with its module; for functional ones the calling module and the
    function's name."""
    for name, child in module.named_modules(remove_duplicate=False):
        if _kind(child):
            yield name, (child, None)
            continue
        functions = set(_functions_called(type(child)))
        # A subclass with a forward of its own around that of torch.nn, which calls the function.
        functions |= {_function_of(base) for base in _WINDOWED if isinstance(child, base)}
        for function in sorted(functions):
            yield f"{name}.{function}()".lstrip("."), (child, function)


def _kind(module: nn.Module) -> type | None:
    """The class of pools that a module is of, whose forward it has."""
    for base in (*_WINDOWED, *_ADAPTIVE, *_SOFT):
        if isinstance(module, base) and type(module).forward is base.forward:
            return base
    return None


def _function_of(kind: type) -> str:
    """'max_pool2d' for nn.MaxPool2d."""
    return kind.__name__.lower().replace("pool", "_pool")


@cache
def _functions_called(cls: type) -> frozenset[str]:
    """The functional pools whose names are in the code of a class."""

    def names(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):  # a function inside the function
                yield from names(constant)

    methods = (
        inspect.unwrap(method)
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if method is not getattr(nn.Module, name, None)
    )
    called = {name for method in methods for name in names(method.__code__)}
    return frozenset(called.intersection(_FUNCTIONAL.values()))


def _selectors(argument: str, value) -> list:
    """Classes and patterns, from one or more classes and names."""
    values = [value] if isinstance(value, (str, type)) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, (str, type)) for v in values):
        raise TypeError(f"{argument} must be classes and names of modules, got {value!r}")
    return [
        _torch_class(v) if isinstance(v, str) and v.startswith("torch.nn.") else v for v in values
    ]


def _selects(selector, name: str, old: nn.Module, function: str | None) -> bool:
    if isinstance(selector, type):
        return function is None and isinstance(old, selector)
    if function is None and (isinstance(old, _ADAPTIVE) or _kernel_is_one(old)):
        return name == selector
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: n + 1]), selector) for n in range(len(parts)))


def _check_selection(module, found: dict, chosen: dict, include, exclude) -> None:
    listing = ", ".join(
        f"{name or 'itself'} ({'functional' if function else type(old).__name__})"
        for name, (old, function) in found.items()
    )
    what = f"{type(module).__name__} has {f'the pools {listing}' if listing else 'no pools'}"
    for argument, selectors in (("include", include or ()), ("exclude", exclude)):
        for selector in selectors:
            if isinstance(selector, str) and not any(
                _selects(selector, name, *pool) for name, pool in found.items()
            ):
                raise ValueError(f"{argument} has {selector!r}, which matches no pool; {what}")
    if not chosen:
        raise ValueError(
            f"no pool to replace with include={include!r} and exclude={exclude!r}; {what}"
        )
    if "" in chosen and chosen[""][1] is None:
        raise ValueError(
            f"module is itself a pool, {module}: it cannot be replaced in place, only pools "
            "inside of a module can"
        )
    # While a forward with functional pools runs, the pools of its children cannot be told apart.
    for name, (owner, function) in chosen.items():
        inside = name.removesuffix(f"{function}()")
        for other, (old, called) in found.items() if function else ():
            same = function == (called or _function_of(_kind(old))) and not _kernel_is_one(old)
            stays = other not in chosen and called not in _replaced_in(old)
            if other.startswith(inside) and stays and same:
                raise ValueError(
                    f"{name} cannot be replaced while {other} inside of {type(owner).__name__} "
                    "stays: select both or neither"
                )


def _kernel_is_one(pool: nn.Module) -> bool:
    return set(_per_axis(getattr(pool, "kernel_size", None), 1)) == {1}


def _per_axis(value, axes: int) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * axes if len(values) == 1 else values


def _torch_class(name: str) -> type:
    found = getattr(nn, name.removeprefix("torch.nn."), None)
    if not isinstance(found, type):
        raise ValueError(f"torch.nn has no class {name.removeprefix('torch.nn.')!r}")
    return found


def _maker(pool) -> partial:
    """What makes a pool: a function of the number of axes and the geometry."""
    config = dict(pool) if isinstance(pool, dict) else dict(type=pool)
    kind = config.pop("type", None)
    if not isinstance(kind, type) and not (isinstance(kind, str) and isinstance(pool, dict)):
        raise TypeError(
            "pool must be a class or a dict with 'type', a class or its name, for example "
            f"dict(type='SoftPool2d'), got {pool!r}"
        )
    return partial(_make, kind, config)


def _make(kind: type | str, extra: dict, axes: int, geometry: dict) -> nn.Module:
    """The pool of that geometry; arguments that the class does not have may be left at their
    default."""
    cls = _class_for(kind, axes)
    parameters = inspect.signature(cls).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "kernel_size" in extra:
        return cls(**extra)
    arguments = {**geometry, **extra}
    for name, value in geometry.items():
        if name in parameters or takes_all:
            continue
        neutral = geometry["kernel_size"] if name == "stride" else _NEUTRAL.get(name)
        if _per_axis(value, axes) != _per_axis(neutral, axes):
            raise ValueError(f"{cls.__name__} has no argument {name}, which is {value!r} here")
        del arguments[name]
    return cls(**arguments)


def _class_for(kind: type | str, axes: int) -> type:
    """The class ``kind``, or its 1d, 2d or 3d kin."""
    if isinstance(kind, type):
        name = re.sub("[123]d$", f"{axes}d", kind.__name__)
        found = kind if name == kind.__name__ else getattr(sys.modules[kind.__module__], name, None)
    else:
        name = re.sub("[123]d$", f"{axes}d", kind)
        found = getattr(sys.modules[__package__], name, None) or getattr(
            nn, name.removeprefix("torch.nn."), None
        )
        if found is None and "mmengine" in sys.modules:  # which this package imports if it is there
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


def _counterpart(name: str, old: nn.Module, function: str | None, make) -> nn.Module:
    """The pool to put in place of ``old``."""
    try:
        if function:
            return _without_parameters(make, _axes(function))
        for setting in ("return_indices", "divisor_override"):
            if getattr(old, setting, None):
                raise ValueError(f"it has {setting}, which only torch's own pools know")
        if isinstance(old, _ADAPTIVE):
            return _AdaptivePool(old.output_size, _axes(_kind(old).__name__), make)
        return make(_axes(_kind(old).__name__), _geometry(old))
    except ValueError as error:
        raise ValueError(f"{name} cannot be replaced: {error}; exclude it") from error


def _axes(name: str) -> int:
    return int(name[-2])


def _geometry(old: nn.Module) -> dict:
    return dict(
        kernel_size=old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=getattr(old, "dilation", 1),
        ceil_mode=old.ceil_mode,
    )


def _without_parameters(make, axes: int) -> nn.Module:
    """A specimen of the pools that are made while the network runs."""
    pool = make(axes, dict(kernel_size=2))
    if any(part._parameters for part in pool.modules()):
        raise ValueError(
            f"{type(pool).__name__} has parameters, and neither a function nor a pool of unknown "
            "size has a place for them"
        )
    return pool


class _AdaptivePool(nn.Module):
    """A pool over windows of input size / output size.

    Those are the windows of torch's adaptive pools where that is a whole number; any other input
    raises a ValueError.
    """

    def __init__(self, output_size, axes: int, make):
        super().__init__()
        _without_parameters(make, axes)
        self.output_size = _per_axis(output_size, axes)
        self.make = make

    def forward(self, input):
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
        return self.make(axes, dict(kernel_size=kernel_size)).train(self.training)(input)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, pool={self.make.args[0]}"


def _replaced_in(module: nn.Module) -> dict:
    """What makes the pools in place of a module's functional ones, by the function's name."""
    forward = vars(module).get("forward")
    return forward.args[1] if isinstance(forward, partial) and forward.func is _forward else {}


def _forward(module: nn.Module, makers: dict, *args, **kwargs):
    """A module's own forward, with its functional pools replaced."""
    with _FunctionalPools(makers, module.training):
        return type(module).forward(module, *args, **kwargs)


class _FunctionalPools(TorchFunctionMode):
    """Runs other pools where functions of the given names are called."""

    def __init__(self, makers: dict, training: bool):
        super().__init__()
        self.makers = makers
        self.training = training

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _FUNCTIONAL.get(function)
        if name not in self.makers:
            return function(*args, **kwargs)
        read = _max_pool_arguments if name.startswith("max") else _avg_pool_arguments
        input, geometry = read(*args, **kwargs)
        if set(_per_axis(geometry["kernel_size"], 1)) == {1}:
            return function(*args, **kwargs)
        return self.makers[name](_axes(name), geometry).train(self.training)(input)


def _max_pool_arguments(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    if return_indices:
        raise ValueError("max pooling with return_indices cannot be replaced; exclude the module")
    return input, dict(
        kernel_size=kernel_size,
        stride=kernel_size if stride is None else stride,
        padding=padding,
        dilation=dilation,
        ceil_mode=ceil_mode,
    )


def _avg_pool_arguments(
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    if divisor_override is not None:
        raise ValueError("a pool with divisor_override cannot be replaced; exclude the module")
    return _max_pool_arguments(input, kernel_size, stride, padding, 1, ceil_mode)
