"""Files of the user: read with errors that name them, written completely or not at all."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError


def check_input(path: str | Path, what: str, advice: str = "") -> Path:
    """Checks that a file to be read exists.

    Args:
        path: The file.
        what: Its description in the error message, such as ``'annotation file'``.
        advice: Appended to the message. Defaults to none.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path.absolute()} is a folder, not a file: no {what}{advice}")
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path.absolute()}{advice}")
    return path


def read_text(path: str | Path, what: str, advice: str = "") -> str:
    """Reads a text file in UTF-8.

    Args:
        path: The file.
        what: Its description in the error messages, such as ``'prediction file'``.
        advice: Appended to the message if there is no such file. Defaults to none.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        UserError: If it is not UTF-8.
    """
    try:
        return check_input(path, what, advice).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: {error}") from error


def read_json(path: str | Path, what: str, advice: str = ""):
    """Reads a JSON file; arguments and errors as for :func:`read_text`.

    NaN and Infinity are read as such, as Python writes them: who needs finite numbers checks them
    with :func:`is_number`.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        UserError: If it is not JSON, or nested too deeply.
    """
    return parse_json(read_text(path, what, advice), path)


def parse_json(text: str | bytes, source):
    """Parses JSON that was read from ``source``.

    Raises:
        UserError: If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    # ValueError also for bytes that are not UTF-8 and for integers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON, or is damaged or truncated: {error}") from error


def read_pickle(path: str | Path, what: str):
    """Reads a pickle file, which may run code; arguments and errors as for :func:`read_text`.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        UserError: If it is damaged or not a pickle file.
    """
    with check_input(path, what).open("rb") as file:
        try:
            return pickle.load(file)
        except Exception as error:  # damaged files raise errors of any kind
            raise UserError(
                f"{path} is damaged or not a pickle file: {type(error).__name__}: {error}"
            ) from error


def is_number(value) -> bool:
    """Whether a value of a JSON file is a finite number: no bool, within the range of float64."""
    return type(value) in (int, float) and -1.7e308 < value < 1.7e308


def check_output(path: str | Path) -> None:
    """Checks, before the work, that a file can be written at its end.

    Raises:
        FileNotFoundError: If its folder does not exist.
        IsADirectoryError: If it is a folder.
        PermissionError: If its folder, or a special file such as a pipe, is not writable.
    """
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
    """Gives a temporary file name for a file to be written, and renames the file at the end.

    A reader finds the earlier file or the complete new one, never a part of it, and an error or an
    interruption while writing leaves the earlier file unchanged. Other than regular files, such as
    ``/dev/stdout``, are written to directly.

    Args:
        path: The file to write; its folder must exist. A symbolic link stays a link.
        exclusive: Whether no other process writes the same file. The temporary name is then always
            the same, so that the next call overwrites what a killed process left. Defaults to
            False.

    Yields:
        Path: A file in the same folder and with the same suffix to write to. It is removed if the
        block raises.

    Raises:
        OSError: As :func:`check_output`.

    Example:
        >>> with write_atomically("table.md") as temporary:
        ...     temporary.write_text("| AP |")
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
