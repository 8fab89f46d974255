"""Building of a config's parts before the run, with errors that name what is wrong."""

import difflib
import inspect
import re
from contextlib import suppress

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, Registry, init_default_scope
from torch import nn

from .config import dicts


def build(registry: Registry, node: dict, cfg: Config, what: str):
    """Builds a part of a config in the config's scope.

    Args:
        registry: The registry of the part, one of mmengine's.
        node: The part.
        cfg: The config.
        what: A description of the part in the error message, such as ``'model'``.

    Raises:
        ValueError: If it cannot be built; the message has the nearest known name of an unknown type
            or argument.
    """
    init_default_scope(cfg.get("default_scope") or "mmdet")
    try:
        return registry.build(node)
    except Exception as error:  # whatever a constructor raises: the config is the user's
        raise ValueError(
            f"the {what} of {cfg.filename} cannot be built: {_explain(error, registry, node)}"
        ) from error


def build_model(cfg: Config) -> nn.Module:
    """Builds the model of a config; errors as for :func:`build`."""
    return build(MODELS, cfg.model, cfg, "model")


def _explain(error: Exception, registry: Registry, node: dict) -> str:
    text = str(error).strip("'\"")
    unknown = re.match(r"(\S+) is not in the \S+ registry", text)
    if unknown:
        roots = (registry, TRANSFORMS)
        known = [r for root in roots for r in (root, *root.children.values())]
        names = {name for entries in known for name in entries.module_dict}
        return f"type {unknown[1]!r} is not registered{_nearest(unknown[1], names)}"
    argument = re.search(r"unexpected keyword argument '(\w+)'", text)
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
