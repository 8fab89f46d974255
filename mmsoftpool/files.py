"""Writing of files: complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Gives a temporary file name for a file to be written, and renames the file at the end.

    A reader finds the earlier file or the complete new one, never a part of it, and an error or an
    interruption while writing leaves the earlier file as it was. What is not a regular file, such
    as ``/dev/stdout``, is written to directly.

    Args:
        path: The file to write; its folder must exist. A symbolic link stays a link.

    Yields:
        Path: A file in the same folder and with the same suffix, not there yet, to write to. It is
        removed if the block raises.

    Raises:
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> with write_atomically("table.md") as temporary:
        ...     temporary.write_text("| AP |")
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    # The process's number, because two runs may write the same file at the same time.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        unnamed = isinstance(error, OSError) and error.filename in (None, str(temporary))
        if unnamed and error.errno:
            error.filename = str(path)  # the name that the user knows
        raise
