"""Files of the user: read with errors that name them, written completely or not at all."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError


def check_input(path: str | Path, what: str, advice: str = "") -> Path:
    """Checks that a file exists; the error describes it by ``what`` and ends in ``advice``."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path.absolute()} is a folder, not a file: no {what}{advice}")
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path.absolute()}{advice}")
    return path


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_json(path: str | Path, what: str, advice: str = ""):
    """Reads a JSON file, in which NaN and Infinity are allowed; see :func:`check_input`."""
    return parse_json(check_input(path, what, advice).read_bytes(), path)


def parse_json(content: bytes, source):
    """Parses JSON that was read from ``source``; a UserError names it."""
    try:
        return json.loads(content)
    # ValueError also for bytes that are not UTF-8 and for integers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON, or is damaged or truncated: {error}") from error


def read_pickle(path: str | Path, what: str):
    """Reads a pickle file, which may run code; see :func:`check_input`."""
    content = check_input(path, what).read_bytes()
    try:
        return pickle.loads(content)
    except Exception as error:  # damaged files raise errors of any kind
        raise UserError(
            f"{path} is damaged or not a pickle file: {type(error).__name__}: {error}"
        ) from error


def check_output(path: str | Path) -> None:
    """Checks, before the work, that a file can be written at its end; an OSError says why not."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    target = path if path.exists() and not path.is_file() else path.parent
    if not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {path}: {target} is not writable")


@contextmanager
def write_atomically(path: str | Path, exclusive: bool = False) -> Iterator[Path]:
    """Yields a file in the same folder and with the same suffix to write to, renamed at the end.

    A reader finds the earlier file or the complete new one, and an error or an interruption leaves
    the earlier one unchanged. A symbolic link stays a link; other than regular files, such as
    ``/dev/stdout``, are written to directly. With ``exclusive``, where no other process writes the
    same file, the next call overwrites what a killed process left.
    """
    given = Path(os.path.realpath(path))
    temporary = given
    if given.is_file() or not given.exists():
        check_output(given)
        mark = "unfinished" if exclusive else os.getpid()
        temporary = given.with_name(f".{given.stem}.{mark}{given.suffix}")
    try:
        yield temporary
        if temporary != given:
            temporary.replace(given)
    except BaseException as error:
        if temporary != given:
            with suppress(OSError):
                temporary.unlink()
        unnamed = isinstance(error, OSError) and error.filename in (None, str(temporary))
        if unnamed and error.errno:
            error.filename = str(path)  # the name that the user knows
        raise


def write_text(path: str | Path, text: str, **options) -> None:
    """Writes a text file in UTF-8; ``options`` as for :func:`write_atomically`."""
    with write_atomically(path, **options) as temporary:
        temporary.write_text(text, encoding="utf-8")
