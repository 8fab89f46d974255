"""Checkpoints: no moment of a run, and no full disk, loses an earlier one."""

import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

from mmsoftpool.hooks import find_intact_checkpoint
from mmsoftpool.runner import train

from ..common import BEST


def saved(cfg) -> list[str]:
    return sorted(path.name for path in Path(cfg.work_dir).rglob("*.pth"))


@contextmanager
def files_limited_to(size: int):
    """The kernel cuts every file at this size, and the write fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestSaving:
    def test_a_write_that_fails_half_way_leaves_the_earlier_checkpoint(self, toy):
        train(toy("run", **{"train_cfg.max_epochs": 1}))
        cfg = toy("run")
        size = Path(cfg.work_dir, "epoch_1.pth").stat().st_size
        with files_limited_to(size // 2), pytest.raises(OSError) as error:
            train(cfg, resume=True)
        assert str(error.value) == (
            f"cannot write {cfg.work_dir}/epoch_2.pth: File too large; free some space, then "
            "resume from the last intact checkpoint"
        )
        assert saved(cfg) == ["epoch_1.pth"]
        assert find_intact_checkpoint(cfg.work_dir) == (f"{cfg.work_dir}/epoch_1.pth", [])

    def test_a_log_that_cannot_be_written_is_one_line(self, toy, capsys):
        logger = MMLogger.get_current_instance()  # that of an earlier test, which has a file too
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        cfg = toy("run")
        message = f"cannot write {cfg.work_dir}.*: File too large"
        with files_limited_to(64), pytest.raises(OSError, match=message):
            train(cfg)
        assert "Traceback" not in capsys.readouterr().err

    def test_a_best_one_that_cannot_be_written_leaves_the_earlier_best(self, toy):
        train(toy("run", (0.1,), **BEST, **{"train_cfg.max_epochs": 1}))
        only_best = {"default_hooks.checkpoint.save_last": False}
        only_best |= {"default_hooks.checkpoint.interval": 9}
        cfg = toy("run", (0.2, 0.3), **BEST, **only_best)
        size = Path(cfg.work_dir, "best_AP_epoch_1.pth").stat().st_size
        message = r"cannot write .*/best_AP_epoch_2\.pth: File too large"
        with files_limited_to(size // 2), pytest.raises(OSError, match=message):
            train(cfg, resume=True)
        assert saved(cfg) == ["best_AP_epoch_1.pth", "epoch_1.pth"]

    def test_outdated_ones_are_removed(self, toy):
        cfg = toy("run", (0.1, 0.2, 0.3), **BEST)
        train(cfg)
        assert saved(cfg) == ["best_AP_epoch_3.pth", "epoch_3.pth"]
        cfg = toy("two", **{"default_hooks.checkpoint.max_keep_ckpts": 2})
        train(cfg)
        assert saved(cfg) == ["epoch_2.pth", "epoch_3.pth"]

    def test_one_that_a_kill_kept_is_removed_when_the_run_resumes(self, toy):
        cfg = toy("run", **{"train_cfg.max_epochs": 1})
        train(cfg)
        first = Path(cfg.work_dir, "epoch_1.pth")
        content = first.read_bytes()
        train(toy("run", **{"train_cfg.max_epochs": 2}), resume=True)
        first.write_bytes(content)  # as if killed between writing the second and removing it
        train(toy("run"), resume=True)
        assert saved(cfg) == ["epoch_3.pth"]

    def test_the_copy_of_a_run_leaves_the_best_checkpoint_of_the_original(self, toy):
        original = toy("original", (0.1,), **BEST, **{"train_cfg.max_epochs": 1})
        train(original)
        copy = toy("copy", (0.2, 0.3), **BEST)
        shutil.copytree(original.work_dir, copy.work_dir)
        train(copy, resume=True)
        assert saved(original) == ["best_AP_epoch_1.pth", "epoch_1.pth"]
        assert saved(copy) == ["best_AP_epoch_3.pth", "epoch_3.pth"]


class TestFindIntactCheckpoint:
    @pytest.fixture
    def saved(self, tmp_path):
        """A run's folder with the checkpoints of epochs 1, 2 and 10, saved in this order."""
        folder = tmp_path / "run"
        folder.mkdir()
        paths = [folder / f"epoch_{i}.pth" for i in (1, 2, 10)]
        for age, path in enumerate(reversed(paths)):
            torch.save(dict(state_dict={"w": torch.arange(1000.0)}), path)
            os.utime(path, (1e9 - age, 1e9 - age))
        return paths

    def test_an_empty_folder_has_none(self, tmp_path):
        assert find_intact_checkpoint(tmp_path) == (None, [])

    def test_the_latest_is_taken(self, saved):
        assert find_intact_checkpoint(saved[0].parent) == (str(saved[2]), [])

    @pytest.mark.parametrize("place", [b"", b"PK\x01\x02"], ids=["content", "directory"])
    def test_one_wrong_bit_is_damage(self, saved, place):
        content = bytearray(saved[2].read_bytes())
        # The directory's flags follow a signature and two versions; the first is encryption.
        content[content.index(place) + 8 if place else len(content) // 2] ^= 1
        saved[2].write_bytes(content)
        os.utime(saved[2], (1e9, 1e9))
        assert find_intact_checkpoint(saved[0].parent) == (str(saved[1]), [str(saved[2])])

    def test_last_checkpoint_comes_first(self, saved):
        (saved[0].parent / "last_checkpoint").write_text(str(saved[0]))
        assert find_intact_checkpoint(saved[0].parent) == (str(saved[0]), [])

    def test_a_missing_last_checkpoint_is_skipped(self, saved):
        missing = saved[0].parent / "epoch_11.pth"
        (saved[0].parent / "last_checkpoint").write_text(str(missing))
        assert find_intact_checkpoint(saved[0].parent) == (str(saved[2]), [str(missing)])

    def test_the_copy_of_a_run_resumes_from_its_own_weights(self, saved, tmp_path):
        (saved[0].parent / "last_checkpoint").write_text(str(saved[1]))
        shutil.copytree(saved[0].parent, tmp_path / "copy")
        assert find_intact_checkpoint(tmp_path / "copy") == (str(tmp_path / "copy/epoch_2.pth"), [])
        (tmp_path / "copy" / "epoch_2.pth").unlink()
        found, skipped = find_intact_checkpoint(tmp_path / "copy")
        assert found == str(tmp_path / "copy" / "epoch_10.pth")
        assert skipped == [str(tmp_path / "copy" / "epoch_2.pth")]
