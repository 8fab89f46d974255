"""Files are written completely or not at all."""

import os

import pytest

from mmsoftpool.files import write_atomically


def test_the_temporary_file_has_the_folder_and_suffix_of_the_target(tmp_path):
    with write_atomically(tmp_path / "table.md") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".md"
        temporary.write_text("new")
        assert not (tmp_path / "table.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_keeps_the_earlier_file_and_leaves_no_other(tmp_path, error):
    path = tmp_path / "table.md"
    path.write_text("earlier")
    with pytest.raises(error), write_atomically(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "earlier"


def test_of_an_exclusive_file_a_kill_leaves_one_temporary_at_most(tmp_path):
    for _ in range(2):  # as if killed in the block, and started again
        killed = write_atomically(tmp_path / "epoch_1.pth", exclusive=True)
        killed.__enter__().write_text("half")
        (leftover,) = tmp_path.iterdir()
    with write_atomically(tmp_path / "epoch_1.pth", exclusive=True) as temporary:
        assert temporary == leftover
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1.pth"]


def test_a_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("one", "two"):  # also where the target does not exist yet
        with write_atomically(tmp_path / "link") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "two"


def test_a_pipe_is_written_to_directly(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with write_atomically(pipe) as temporary:
        temporary.write_text("text")
    assert os.read(reader, 10) == b"text" and pipe.is_fifo()
    os.close(reader)


def test_a_missing_folder_is_named(tmp_path):
    message = f"no folder {tmp_path}/missing to write table.md into"
    path = tmp_path / "missing" / "table.md"
    with pytest.raises(FileNotFoundError, match=message), write_atomically(path):
        pass


def test_an_error_of_the_system_names_the_target(tmp_path):
    path = tmp_path / ("x" * 254)  # the temporary file's name is too long
    with pytest.raises(OSError, match=f"'{path}'"), write_atomically(path) as temporary:
        temporary.write_text("")


def test_a_full_disk_names_the_target(tmp_path):
    message = f"No space left on device: '{tmp_path}/table.md'"
    with pytest.raises(OSError, match=message), write_atomically(tmp_path / "table.md") as path:
        path.symlink_to("/dev/full")
        path.write_text("text")
