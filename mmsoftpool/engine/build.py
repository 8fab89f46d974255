"""Building of a config's parts before the run, with errors that name what is wrong."""

import difflib
import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, OPTIMIZERS, TRANSFORMS, Registry, init_default_scope
from torch import nn

from .config import dicts

_UNEXPECTED = re.compile(r"unexpected keyword argument '(.*?)'")


def build(registry: Registry, node: dict, cfg: Config, what: str):
    """Builds a part of a config in the config's scope.

    What a constructor raises becomes one line, because its arguments are the config's: an error of
    a ``raise`` or ``assert`` statement, an argument that it does not take, and any error inside an
    installed package that it hands them to. The line then says where a module of the user's or of
    mmsoftpool called that package. An error in an expression of such a module itself, such as an
    AttributeError, is a bug in it and keeps its type and traceback.

    Args:
        registry: The registry of the part, one of mmengine's.
        node: The part.
        cfg: The config.
        what: A description of the part in the error message, such as ``'model'``.

    Raises:
        ValueError: If its arguments are wrong, as above; the message has the nearest known name of
            an unknown type or argument.
    """
    init_default_scope(cfg.get("default_scope") or "mmdet")
    with _explained(registry, node, cfg, what):
        return registry.build(node)


@contextmanager
def _explained(registry: Registry, node: dict, cfg: Config, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in frames if frame.filename != __file__]
        if _is_bug(error, frames, node):
            raise
        calls = [frame for frame in frames[:-1] if not _is_installed(frame.filename)]
        reason = _explain(error, registry, node)
        if calls:
            reason += f" (called from {calls[-1].filename}, line {calls[-1].lineno})"
        raise ValueError(f"the {what} of {cfg.filename} cannot be built: {reason}") from error


def build_model(cfg: Config) -> nn.Module:
    """Builds the model of a config; errors as for :func:`build`."""
    return build(MODELS, cfg.model, cfg, "model")


def build_optimizer(cfg: Config, model: nn.Module) -> OptimWrapper:
    """Builds the optimizer of a config for a model; errors as for :func:`build`."""
    with _explained(OPTIMIZERS, cfg.optim_wrapper, cfg, "optim_wrapper"):
        kind = (cfg.optim_wrapper.get("optimizer") or {}).get("type")
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            if isinstance(kind, str) and registry.get(kind) is None:
                raise KeyError(f"{kind} is not in the optimizer registry")
        return build_optim_wrapper(model, cfg.optim_wrapper)


def _is_bug(error: Exception, frames: list[traceback.FrameSummary], node: dict) -> bool:
    """Whether an expression in code that is not an installed package's has raised an error."""
    while frames and frames[-1].name == "__getattr__":  # torch's, of a module's missing attribute
        frames = frames[:-1]
    if not frames or _is_installed(frames[-1].filename):
        return False
    argument = _UNEXPECTED.search(str(error))
    if argument and any(argument[1] in part for part in dicts(node)):
        return False  # handed on to a base class
    return not frames[-1].line.startswith(("raise ", "assert "))


def _is_installed(filename: str) -> bool:
    """Whether a file belongs to Python or to an installed package other than mmsoftpool."""
    path = Path(filename)
    folders = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return any(path.is_relative_to(folder) for folder in folders) and not path.is_relative_to(
        Path(__file__).parents[1]
    )


def _explain(error: Exception, registry: Registry, node: dict) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    unknown = re.match(r"(\S+) is not in the \S+ registry", text)
    if unknown:
        roots = (registry, TRANSFORMS)
        known = [r for root in roots for r in (root, *root.children.values())]
        names = {name for entries in known for name in entries.module_dict}
        return f"type {unknown[1]!r} is not registered{_nearest(unknown[1], names)}"
    argument = _UNEXPECTED.search(text)
    if argument:
        return text + _nearest(argument[1], _parameters(registry, node, argument[1]))
    return f"{type(error).__name__}: {text}"


def _nearest(name: str, names: set[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _parameters(registry: Registry, node: dict, argument: str) -> set[str]:
    """Parameters of the types that a config gives an argument, with those of their bases."""
    found = set()
    for part in dicts(node):
        if argument not in part or "type" not in part:
            continue
        kind = part["type"]
        if isinstance(kind, str):
            with registry.switch_scope_and_registry(None) as scoped:
                kind = scoped.get(kind)
        for base in inspect.getmro(kind) if inspect.isclass(kind) else (kind,):
            with suppress(TypeError, ValueError):  # no signature
                found |= set(inspect.signature(base).parameters)
    return found
