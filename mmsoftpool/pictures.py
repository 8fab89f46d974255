"""How every picture of this package is written."""

from pathlib import Path

from .errors import UserError
from .files import check_output, write_atomically


def check_picture(path) -> None:
    """Checks, before the work, that a picture can be written at its end.

    Args:
        path (str | Path): The file; its suffix is the format, such as ``.png``, ``.jpg``, ``.pdf``.

    Raises:
        UserError: If matplotlib cannot write that format.
        OSError: If the file cannot be written.
    """
    from matplotlib.backend_bases import FigureCanvasBase  # here: the rest requires only torch

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower()[1:] not in formats:
        allowed = ", ".join(f".{name}" for name in formats)
        raise UserError(f"a picture must end in one of {allowed}, got {path}")
    check_output(path)


def save_figure(figure, path, **options) -> None:
    """Writes a picture file.

    Args:
        figure (matplotlib.figure.Figure): The picture. A figure made by this class, without pyplot,
            needs no window system and does not have to be closed.
        path (str | Path): The file, see :func:`check_picture`.
        **options: As for ``Figure.savefig``.

    Raises:
        UserError, OSError: See :func:`check_picture`.
    """
    check_picture(path)
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        options["pil_kwargs"] = dict(quality=88, optimize=True)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150, **options)
