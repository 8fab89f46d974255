"""Resuming after an interruption, a damaged checkpoint, a full disk."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from make_shapes import make_shapes
from mmsoftpool.hooks import EpochSeedHook, find_intact_checkpoint
from mmsoftpool.hooks.resume import SeededBatches
from mmsoftpool.runner import train

from ..common import BEST, ROOT

DEMO = "configs/demo/demo_retinanet_softpool.py"


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


def test_a_full_disk_is_reported_and_a_damaged_checkpoint_skipped(run_tool, tmp_path, options):
    command = ("train", ROOT / DEMO, "--resume", "--work-dir", tmp_path, *options)
    assert run_tool(*command, "train_cfg.max_epochs=1")[0] == 0
    (tmp_path / "epoch_2.pth").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    status, _, err = run_tool(*command)
    assert status == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot write {tmp_path}/epoch_2.pth: No space left on device")

    (tmp_path / "epoch_2.pth").unlink()
    intact = (tmp_path / "epoch_1.pth").read_bytes()
    (tmp_path / "epoch_2.pth").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_2.pth"))
    status, out, err = run_tool(*command)
    assert status == 0
    assert f"skipping damaged or missing checkpoint {tmp_path}/epoch_2.pth" in err
    assert f"resuming from {tmp_path}/epoch_1.pth" in out
    assert torch.load(tmp_path / "epoch_3.pth", weights_only=False)["meta"]["epoch"] == 3


@pytest.mark.parametrize("diff_rank_seed", [False, True])
def test_all_ranks_draw_with_one_seed(diff_rank_seed):
    # With diff_rank_seed mmengine adds the rank to runner.seed; this is rank 3's.
    cfg = Config(dict(randomness=dict(diff_rank_seed=diff_rank_seed)))
    sampler = SimpleNamespace(seed=7)
    loader = SimpleNamespace(sampler=None, batch_sampler=SimpleNamespace(sampler=sampler))
    EpochSeedHook().before_train(SimpleNamespace(cfg=cfg, seed=5 + 3, train_dataloader=loader))
    assert sampler.seed == (7 if diff_rank_seed else 8)


def weights(cfg) -> dict:
    """The weights and the optimizer's state in the latest checkpoint of a run."""
    path, skipped = find_intact_checkpoint(cfg.work_dir)
    assert not skipped
    saved = torch.load(path, weights_only=False)
    momentum = {n: s["momentum_buffer"] for n, s in saved["optimizer"]["state"].items()}
    return dict(**saved["state_dict"], **{f"momentum {n}": value for n, value in momentum.items()})


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class TestMissedValidation:
    """Each score is a validation; None interrupts the run there, after its checkpoint is saved."""

    @staticmethod
    def validated(cfg) -> list[tuple[int, float]]:
        found = {}
        for log in sorted(Path(cfg.work_dir).glob("*/vis_data/scalars.json")):
            for line in log.read_text().splitlines():
                entry = json.loads(line)
                if "AP" in entry:
                    found.setdefault(entry["step"], []).append(entry["AP"])
        return sorted((step, *values) for step, values in found.items())

    def test_is_repeated(self, toy):
        interrupted = toy("run", (0.1, None), **BEST)
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
        resumed = toy("run", (0.9, 0.5), **BEST)
        train(resumed, resume=True)
        assert self.validated(resumed) == [(1, 0.1), (2, 0.9), (3, 0.5)]
        names = {path.name for path in Path(resumed.work_dir).glob("*.pth")}
        assert names == {"epoch_3.pth", "best_AP_epoch_2.pth"}

    def test_of_the_last_epoch_is_repeated_with_its_best_score(self, toy):
        with pytest.raises(KeyboardInterrupt):
            train(toy("run", (0.1, 0.2, None), **BEST))
        train(toy("run", (0.9,), **BEST), resume=True)
        saved = torch.load(toy("run").work_dir + "/epoch_3.pth", weights_only=False)
        assert saved["message_hub"]["runtime_info"]["best_score"] == 0.9

    def test_a_complete_one_is_not_repeated(self, toy):
        train(toy("run", (0.1, 0.2, 0.3)))
        train(toy("run", ()), resume=True)
        train(toy("run", (0.4,), **{"train_cfg.max_epochs": 4}), resume=True)

    def test_one_that_is_not_due_is_not_repeated(self, toy):
        settings = {"train_cfg.val_begin": 2}
        run = toy("run", (), **settings)
        run.train_cfg.max_epochs = 1
        train(run)
        train(toy("run", (0.2, 0.3), **settings), resume=True)

    def test_that_of_an_earlier_run_in_the_folder_does_not_count(self, toy):
        train(toy("run", (0.1,), **{"train_cfg.max_epochs": 1}))
        with pytest.raises(KeyboardInterrupt):
            train(toy("run", (None,)))
        cfg = toy("run", (0.3, 0.4, 0.5))
        train(cfg, resume=True)
        assert [scores[-1] for scores in self.validated(cfg)] == [0.3, 0.4, 0.5]


ITERATIONS = {
    "train_cfg": dict(type="IterBasedTrainLoop", max_iters=14, val_interval=4),
    "default_hooks.checkpoint.by_epoch": False,
    "default_hooks.checkpoint.interval": 5,
    "default_hooks.logger": dict(type="LoggerHook", log_metric_by_epoch=False),
}


class TestLoopOfIterations:
    """A pass has six batches (persistent: three); checkpoints after 5, 10 and 14 iterations."""

    @pytest.mark.parametrize(
        ("sampler", "loader"),
        [
            ("DefaultSampler", {}),
            ("InfiniteSampler", {}),
            ("DefaultSampler", dict(num_workers=2)),
            ("InfiniteSampler", dict(num_workers=2)),
            ("DefaultSampler", dict(num_workers=2, persistent_workers=True, batch_size=4)),
        ],
    )
    def test_a_run_killed_twice_ends_in_the_same_weights(self, toy, sampler, loader):
        settings = {
            **ITERATIONS,
            "train_dataloader.sampler.type": sampler,
            **{f"train_dataloader.{key}": value for key, value in loader.items()},
        }
        whole = toy("whole", **settings)
        train(whole)
        for scores in ((0.5, None), (0.5, None)):  # after 8 iterations and, from 5 on, after 12
            with pytest.raises(KeyboardInterrupt):
                train(toy("killed", scores, **settings), resume=True)
        resumed = toy("killed", **settings)
        runner = train(resumed, resume=True)
        assert runner.iter == 14
        assert_same(weights(whole), weights(resumed))

    def test_every_batch_has_random_numbers_of_its_own(self, toy):
        cfg = toy("run", **ITERATIONS, **{"train_dataloader.num_workers": 2})
        loader = Runner.build_dataloader(cfg.train_dataloader)
        batches = SeededBatches(loader, (0, 0, 0))
        numbers = torch.cat([torch.stack(next(batches)["inputs"])[:, 1:] for _ in range(13)])
        assert len(numbers.flatten().unique()) == numbers.numel() == 13 * 2 * 3

    def test_it_must_save_by_iteration(self, toy):
        cfg = toy("run", **{**ITERATIONS, "default_hooks.checkpoint.by_epoch": True})
        with pytest.raises(ValueError, match=r"default_hooks\.checkpoint\.by_epoch must be False"):
            train(cfg)

    def test_validations_are_logged_by_iteration(self, toy):
        cfg = toy("run", (0.1, 0.2, 0.3, 0.4), **ITERATIONS)
        train(cfg)
        assert TestMissedValidation.validated(cfg) == [(4, 0.1), (8, 0.2), (12, 0.3), (14, 0.4)]
