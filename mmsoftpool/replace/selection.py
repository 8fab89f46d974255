"""The pools of a network, and which of them to replace, by class and by name."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from ..errors import UserError
from . import functional
from .modules import ADAPTIVE, WINDOWED, kernel_is_one, pool_class


class Pool(NamedTuple):
    """A pool of a network: a module, or a call in the forward of one."""

    module: nn.Module  # the pool or, for a functional one, the module that calls it
    function: str | None = None  # the name of the function that is called, 'max_pool2d'

    @property
    def runs(self) -> str:
        """The name of the function that runs."""
        if self.function:
            return self.function
        base = pool_class(self.module)
        assert base is not None
        return functional.function_name(base)

    @property
    def is_replaced(self) -> bool:
        """Whether it is a functional one that runs as another pool already."""
        return self.function in functional.replaced_functions(self.module)

    @property
    def is_adaptive(self) -> bool:
        return self.runs.startswith("adaptive")

    @property
    def only_subsamples(self) -> bool:
        return not self.function and kernel_is_one(getattr(self.module, "kernel_size", None))

    def __str__(self) -> str:
        return "functional" if self.function else type(self.module).__name__


def select(module: nn.Module, include: Any, exclude: Any) -> tuple[dict[str, Pool], list[str]]:
    """The pools to replace by their qualified names, see :func:`mmsoftpool.replace_pooling`; and
    the names of functional pools that stay only because no name was given, for a warning."""
    include = None if include is None else _selectors("include", include)
    exclude = _selectors("exclude", exclude)
    found = dict(_find(module))
    chosen, left = {}, []
    for name, pool in found.items():
        if any(_selects(selector, name, pool) for selector in exclude):
            continue
        if include is None:
            special = pool.function or pool.is_adaptive or pool.only_subsamples
            wanted = pool.runs in functional.NAMES and not special  # max or average pools of torch
        else:
            wanted = any(_selects(selector, name, pool) for selector in include)
        if wanted:
            chosen[name] = pool
        elif pool.function and not (pool.is_adaptive or pool.is_replaced):
            left.append(name)
    _check(module, found, chosen, include, exclude)
    if any(isinstance(selector, str) for selector in include or ()):
        left = []
    return chosen, left


def _find(module: nn.Module) -> Iterator[tuple[str, Pool]]:
    for name, child in module.named_modules(remove_duplicate=False):
        if pool_class(child):
            yield name, Pool(child)
            continue
        # A subclass with a forward of its own around that of torch.nn, which calls the function.
        bases = (base for base in WINDOWED + ADAPTIVE if isinstance(child, base))
        around = {functional.function_name(base) for base in bases}.intersection(functional.NAMES)
        cls: Any = type(child)
        for function in sorted(functional.functions_called(cls) | around):
            yield f"{name}.{function}()".lstrip("."), Pool(child, function)


def _selectors(argument: str, value: Any) -> list[type | str]:
    """Classes and patterns, from one or more classes and names."""
    values = [value] if isinstance(value, (str, type)) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, (str, type)) for v in values):
        raise TypeError(f"{argument} must be classes and names of modules, got {value!r}")
    return [
        _torch_class(v) if isinstance(v, str) and v.startswith("torch.nn.") else v for v in values
    ]


def _torch_class(name: str) -> type:
    found = getattr(nn, name.removeprefix("torch.nn."), None)
    if not isinstance(found, type):
        raise UserError(f"torch.nn has no class {name.removeprefix('torch.nn.')!r}")
    return found


def _selects(selector: type | str, name: str, pool: Pool) -> bool:
    if isinstance(selector, type):
        return pool.function is None and isinstance(pool.module, selector)
    if pool.is_adaptive or pool.only_subsamples:
        return name == selector
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: n + 1]), selector) for n in range(len(parts)))


def _check(
    module: nn.Module,
    found: dict[str, Pool],
    chosen: dict[str, Pool],
    include: list[type | str] | None,
    exclude: list[type | str],
) -> None:
    listing = ", ".join(f"{name or 'itself'} ({pool})" for name, pool in found.items())
    pools = f"{type(module).__name__} has {f'the pools {listing}' if listing else 'no pools'}"
    for argument, selectors in (("include", include or ()), ("exclude", exclude)):
        for selector in selectors:
            if isinstance(selector, str) and not any(
                _selects(selector, name, pool) for name, pool in found.items()
            ):
                raise UserError(f"{argument} has {selector!r}, which matches no pool; {pools}")
    if not chosen:
        raise UserError(
            f"no pool to replace with include={include!r} and exclude={exclude!r}; {pools}"
        )
    if "" in chosen:
        raise UserError(
            f"module is itself a pool, {module}: it cannot be replaced in place, only pools "
            "inside of a module can"
        )
    # While a forward with functional pools runs, the pools of its children cannot be told apart.
    for name, pool in chosen.items():
        inside = name.removesuffix(f"{pool.function}()")
        for other_name, other in found.items() if pool.function else ():
            stays = other_name not in chosen and not (other.is_replaced or other.only_subsamples)
            if stays and other_name.startswith(inside) and other.runs == pool.function:
                raise UserError(
                    f"{name} cannot be replaced while {other_name} inside of "
                    f"{type(pool.module).__name__} stays: select both or neither"
                )
