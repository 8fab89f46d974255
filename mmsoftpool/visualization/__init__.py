"""Pictures of pooling and of runs, and how every picture of this package is written."""

from pathlib import Path

from ..files import write_atomically


def save_figure(figure, path, **options) -> None:
    """Writes a picture file.

    Args:
        figure (matplotlib.figure.Figure): What to write. Made by its class, not by pyplot, it needs
            no window system and no closing.
        path (str | Path): The file; its suffix is the format, such as ``.png``, ``.jpg``, ``.pdf``.
        **options: As for ``Figure.savefig``.

    Raises:
        ValueError: If matplotlib cannot write that format.
        FileNotFoundError: If the file's folder does not exist.
    """
    suffix = Path(path).suffix.lower()
    formats = figure.canvas.get_supported_filetypes()
    if suffix[1:] not in formats:
        allowed = ", ".join(f".{name}" for name in formats)
        raise ValueError(f"path must end in one of {allowed}, got {path}")
    if suffix in (".jpg", ".jpeg"):
        options["pil_kwargs"] = dict(quality=88, optimize=True)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150, **options)
