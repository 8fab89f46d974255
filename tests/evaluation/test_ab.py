"""tools/ab.py: every pair is trained once, and an interruption costs nothing."""

import fcntl
import json
import re

import pytest

from mmsoftpool.datasets.shapes import make_shapes

CONFIGS = ("configs/demo_retinanet_maxpool.py", "configs/demo_retinanet_softpool.py")
NAMES = ("demo_retinanet_maxpool", "demo_retinanet_softpool")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=4, val=4)
    return (
        "--cfg-options",
        f"data_root={root}",
        "train_cfg.max_epochs=1",
        "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=0",
        "default_hooks.logger.interval=1",
        "model.backbone.base_channels=8",
        "model.neck.in_channels=[8,16,32,64]",
        "model.test_cfg.score_thr=0",
    )


def test_trains_all_pairs_and_goes_on_after_an_interruption(run_script, tmp_path, options):
    command = ("tools/ab.py", *CONFIGS, "--seeds", 3, 1, "--work-dir", tmp_path)
    command += ("--resamples", 10, *options)
    # Another process is at the third run: the first two are done, then it stops.
    busy = tmp_path / NAMES[0] / "seed_1"
    busy.mkdir(parents=True)
    with (busy / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = run_script(*command, check=False)
    assert first.returncode == 2
    assert f"error: {busy} is being run by another process" in first.stderr
    runs = [tmp_path / name / f"seed_{seed}" for seed in (3, 1) for name in NAMES]
    assert [(run / "results.bbox.json").exists() for run in runs] == [True, True, False, False]
    # The second run was interrupted between training and test.
    (runs[1] / "results.bbox.json").unlink()
    written = (runs[0] / "results.bbox.json").stat().st_mtime_ns

    out = run_script(*command).stdout
    assert re.findall(r"== run (\d) of 4: (\w+), seed (\d)( is finished)?", out) == [
        ("1", NAMES[0], "3", " is finished"),
        ("2", NAMES[1], "3", ""),
        ("3", NAMES[0], "1", ""),
        ("4", NAMES[1], "1", ""),
    ]
    assert (runs[0] / "results.bbox.json").stat().st_mtime_ns == written
    assert "[run 2 of 4: demo_retinanet_softpool, seed 3] Epoch(train)" not in out
    assert "[run 2 of 4: demo_retinanet_softpool, seed 3] Epoch(test)" in out
    assert re.search(r"\[run 4 of 4: demo_retinanet_softpool, seed 1\] Epoch\(train\)", out)
    table = (tmp_path / "comparison_bbox.md").read_text()
    assert table in out and "4 images; 2 and 2 runs" in table
    assert (tmp_path / "comparison_bbox.png").exists()
    # The seed reaches the training: same seed, same start; other seed, another.
    logs = [
        json.loads(next(run.glob("*/vis_data/scalars.json")).read_text().splitlines()[0])
        for run in runs
    ]
    assert logs[0]["loss"] != logs[2]["loss"] and logs[1]["loss"] != logs[3]["loss"]

    other = run_script(*command, "model.test_cfg.score_thr=0.5", check=False)
    assert other.returncode == 2
    assert "holds runs of configs/demo_retinanet_maxpool.py with other settings" in other.stderr
    assert "+" in other.stderr and "score_thr=0.5" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*CONFIGS, "--seeds", "1", "1"],
            "--seeds must be different numbers from 0 on, got [1, 1]",
        ),
        ([CONFIGS[0], CONFIGS[0]], "the two configs must have different names"),
        ([CONFIGS[0], "configs/retinanet_r18_softpool.py"], "must be evaluated alike"),
        ([CONFIGS[0], "configs/missing.py"], "no config file at"),
        ([*CONFIGS, "--gpus", "0"], "--gpus must be at least 1, got 0"),
    ],
)
def test_refuses(run_script, tmp_path, arguments, message):
    result = run_script("tools/ab.py", *arguments, "--work-dir", tmp_path, check=False)
    assert result.returncode == 2 and message in result.stderr


def test_a_failing_run_is_shown(run_script, tmp_path):
    result = run_script(
        "tools/ab.py", *CONFIGS, "--work-dir", tmp_path, "--cfg-options", "data_root=/missing",
        check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "error: no train annotations at /missing" in result.stderr
    assert "demo_retinanet_maxpool, seed 0 failed with exit status 2" in result.stderr
