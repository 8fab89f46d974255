"""Resuming after a kill, a damaged checkpoint, a full disk."""

import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmsoftpool.datasets.shapes import make_shapes
from mmsoftpool.engine import EpochSeedHook, find_intact_checkpoint

from ..common import ROOT

DEMO = "configs/demo_retinanet_softpool.py"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The demo on few images: three epochs of four iterations, with augmentation in workers."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=16, val=2)
    return (
        "--cfg-options",
        f"data_root={root}",
        "randomness.deterministic=True",
        "train_cfg.max_epochs=3",
        "train_cfg.val_interval=3",
        "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=2",
        "default_hooks.logger.interval=1",
        "default_hooks.checkpoint.max_keep_ckpts=3",
        "model.backbone.base_channels=8",
        "model.neck.in_channels=[8,16,32,64]",
    )


def test_a_killed_run_ends_in_the_weights_of_an_uninterrupted_one(run_script, tmp_path, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_script("tools/train.py", DEMO, "--work-dir", whole, *options)

    command = [sys.executable, "-u", "tools/train.py", DEMO, "--work-dir", str(killed), *options]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            if re.search(r"Epoch\(train\) +\[2\]\[2/4\]", line):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "epoch_2.pth").exists()

    out = run_script("tools/train.py", DEMO, "--work-dir", killed, "--resume", *options).stdout
    assert f"resuming from {killed}/epoch_1.pth" in out
    for epoch in (2, 3):
        a, b = (
            torch.load(path / f"epoch_{epoch}.pth", weights_only=False) for path in (whole, killed)
        )
        assert a["state_dict"].keys() == b["state_dict"].keys()
        for name, value in a["state_dict"].items():
            assert torch.equal(value, b["state_dict"][name]), name


def test_a_full_disk_is_reported_and_a_damaged_checkpoint_skipped(run_script, tmp_path, options):
    run_script("tools/train.py", DEMO, "--work-dir", tmp_path, *options, "train_cfg.max_epochs=1")
    (tmp_path / "epoch_2.pth").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    result = run_script(
        "tools/train.py", DEMO, "--resume", "--work-dir", tmp_path, *options, check=False
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot write to {tmp_path}: No space left on device")
    assert "Traceback" not in result.stderr

    (tmp_path / "epoch_2.pth").unlink()
    intact = (tmp_path / "epoch_1.pth").read_bytes()
    (tmp_path / "epoch_2.pth").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_2.pth"))
    result = run_script("tools/train.py", DEMO, "--resume", "--work-dir", tmp_path, *options)
    assert f"skipping damaged or missing checkpoint {tmp_path}/epoch_2.pth" in result.stderr
    assert f"resuming from {tmp_path}/epoch_1.pth" in result.stdout
    assert torch.load(tmp_path / "epoch_3.pth", weights_only=False)["meta"]["epoch"] == 3


@pytest.mark.parametrize("diff_rank_seed", [False, True])
def test_all_ranks_draw_with_one_seed(diff_rank_seed):
    # With diff_rank_seed mmengine adds the rank to runner.seed; this is rank 3's.
    cfg = Config(dict(randomness=dict(diff_rank_seed=diff_rank_seed)))
    sampler = SimpleNamespace(seed=7)
    loader = SimpleNamespace(sampler=None, batch_sampler=SimpleNamespace(sampler=sampler))
    EpochSeedHook().before_train(SimpleNamespace(cfg=cfg, seed=5 + 3, train_dataloader=loader))
    assert sampler.seed == (7 if diff_rank_seed else 8)


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

    def test_one_wrong_bit_is_damage(self, saved):
        content = bytearray(saved[2].read_bytes())
        content[len(content) // 2] ^= 1
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
