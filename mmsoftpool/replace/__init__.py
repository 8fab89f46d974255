"""Replacing the pools of any network, as the paper does in whole families of networks (Stergiou et
al., ICCV 2021, sections 4.4 to 4.7). Requires only torch.

:mod:`.selection` finds the pools and selects among them by class and by name, :mod:`.modules` makes
the new ones, :mod:`.functional` replaces calls such as ``F.avg_pool2d`` in a ``forward``.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import UserError
from . import functional, modules, selection

__all__ = ["replace_pooling"]


def replace_pooling(
    module: nn.Module,
    pool: type[nn.Module] | dict[str, Any] = dict(type="SoftPool2d"),
    *,
    include: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
    exclude: str | type[nn.Module] | Sequence[str | type[nn.Module]] = (),
) -> dict[str, nn.Module]:
    """Replaces the max and average pools in a network by SoftPool, in place.

    Every new pool has the kernel, stride, padding, dilation and ceil_mode of the one it replaces,
    so all shapes stay as they were. It takes over what others have put on the old one: attributes,
    hooks, parameters, buffers and submodules. No parameter or buffer is renamed: checkpoints of the
    network load as before, and weights that are already loaded stay.

    Padding carries no weight in SoftPool, also where it replaces an average pool that counted the
    padded zeros (``count_include_pad=True``).

    Some pools stay unless ``include`` has their full name or their class: adaptive ones, which are
    mostly global, and those with a kernel of 1, which only subsample. An adaptive pool is replaced
    by the new pool's adaptive variant, ``AdaptiveSoftPool2d`` for ``SoftPool2d``. A pool class
    without one runs over windows of input size / output size, and an input size that does not
    divide then raises a ValueError.

    Functional pools, such as ``F.avg_pool2d(...)`` called in a ``forward``, are not modules. They
    are found by name in the code of a module's class and are listed as its children: the pool in
    timm's ``Mixed_5b`` is ``'Mixed_5b.avg_pool2d()'``. As such calls may also do other things than
    pooling features (finding local maxima, for example), they are replaced only where ``include``
    has a name that selects them, ``'Mixed_5b'`` or ``'*'``; otherwise a warning names those that
    stay. A functional adaptive pool needs its full name,
    ``'features.adaptive_avg_pool2d()'``, and there is no warning. Not replaced: calls in functions
    outside of a class, and a mean over axes. A call inside ``torch.utils.checkpoint`` in that same
    ``forward`` raises a RuntimeError when it runs: the recomputation would run the old pool. A
    module that is checkpointed as a whole may have functional pools.

    A module with replaced functional pools gets a subclass of its class, with the same name, so
    ``isinstance`` holds and ``type(module) is ...`` does not. It can be copied, pickled, replicated
    by ``nn.DataParallel``, compiled, exported and, where the arguments of its functional pools do
    not depend on the input, traced by torch.fx.

    Args:
        module: The network.
        pool: The new pool: a class, or a config dict with ``type``, a class or its name, and more
            of its arguments, such as ``alpha=4.0`` or ``gradient='paper'``; with a ``kernel_size``
            among them they are its whole geometry, and nothing is taken from the old pool. Names
            are those of this package and of torch.nn and, where mmengine is installed, all that
            its registries have. A name that ends in ``2d`` stands for its 1d, 2d or 3d variant,
            as the old pool requires. Defaults to ``dict(type='SoftPool2d')``.
        include: What to replace: one or more classes and names. A class (or its name with
            ``torch.nn.`` before it) selects its pools; a name, in which ``*`` and ``?`` are
            wildcards, the module of that qualified name and all pools inside. Defaults to None:
            all ``nn.MaxPool`` and ``nn.AvgPool`` modules.
        exclude: What to keep of that, in the same form. Defaults to none.

    Returns:
        The new pools by their qualified names, in the network's order. For a functional pool,
        whose arguments are known only in the call, the value is an example with a kernel of 2 or,
        if adaptive, an output size of 1.

    Raises:
        UserError: A ValueError, if nothing matches, if a name matches no pool, or if the new pool
            has no counterpart for a setting of the old one (``return_indices``,
            ``divisor_override``). The network is then unchanged.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
        >>> list(replace_pooling(net))
        ['1']
        >>> net(torch.rand(1, 3, 10, 10)).shape
        torch.Size([1, 8, 1, 1])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    factory = modules.PoolFactory.from_config(pool)
    chosen, warned = selection.select(module, include, exclude)
    if warned:
        warnings.warn(
            f"functional pools stay as they are: {', '.join(warned)}. Name them in include to "
            "replace them, or in exclude to silence this warning",
            stacklevel=2,
        )

    made, new = {}, {}  # all are made before the first is put in its place
    for name, (old, function) in chosen.items():
        try:
            if function:
                new[name] = functional.example(old, function, factory)
                continue
            if id(old) not in made:  # a pool with two names stays one
                made[id(old)] = modules.counterpart(old, factory)
            new[name] = made[id(old)]
        except ValueError as error:
            raise UserError(f"{name} cannot be replaced: {error}; exclude it") from error
    device = next((p.device for p in module.parameters()), None)  # for pools with parameters
    for name, (old, function) in chosen.items():
        if function:
            functional.replace_calls(old, function, factory)
        else:
            parent, _, child = name.rpartition(".")
            made_pool = new[name].train(old.training).to(device)
            modules.carry_over(old, made_pool)
            setattr(module.get_submodule(parent), child, made_pool)
    return new
