"""How every picture of this package is written."""

import itertools
from collections.abc import Collection
from pathlib import Path

from .errors import UserError
from .files import check_output, write_atomically

#: Each of these has its place among matplotlib's colours, C0, C1 and so on, in every picture.
_POOLS = (
    "max pooling",
    "SoftPool, α = 1",
    "SoftPool, α = 4",
    "SoftPool, α = 8",
    "SoftPool, α = 0.5",
    "average pooling",
    "random α",
    "annealed α",
    "SoftPool, α = 16",
)


def colours(names: Collection[str]) -> dict[str, str]:
    """A colour for each name. A pool has its own; the others take those that it leaves."""
    found = {name: f"C{_POOLS.index(name)}" for name in names if name in _POOLS}
    free = (f"C{i}" for i in itertools.count() if f"C{i}" not in found.values())
    return {name: found.get(name) or next(free) for name in names}


def metric_label(metric: str) -> str:
    """What tables and pictures call a metric: COCO's AP as papers do."""
    return {"coco/bbox_mAP": "box AP", "coco/segm_mAP": "mask AP"}.get(metric, metric)


def check_picture(path) -> None:
    """Checks, before the work, that a picture can be written; its suffix is the format."""
    from matplotlib.backend_bases import FigureCanvasBase  # here: the rest requires only torch

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower()[1:] not in formats:
        allowed = ", ".join(f".{name}" for name in formats)
        raise UserError(f"a picture must end in one of {allowed}, got {path}")
    check_output(path)


def save_figure(figure, path, **options) -> None:
    """Writes a figure; ``options`` as for ``Figure.savefig``.

    A figure made by matplotlib's class ``Figure``, without pyplot, needs no window system and does
    not have to be closed.
    """
    check_picture(path)
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        options["pil_kwargs"] = dict(quality=88, optimize=True)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150, **options)
