"""tools/ab.py: every pair is trained once, and an interruption costs nothing."""

import fcntl
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


def test_trains_the_pair_and_goes_on_after_an_interruption(run_script, tmp_path, options):
    command = ("tools/ab.py", *CONFIGS, "--seeds", 3, "--work-dir", tmp_path, "--resamples", 10)
    command += options
    first, second = (tmp_path / name / "seed_3" for name in NAMES)
    # Another process is at the second run: the first is done, then it stops.
    second.mkdir(parents=True)
    with (second / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stopped = run_script(*command, check=False)
    assert stopped.returncode == 2
    assert f"error: {second} is being run by another process" in stopped.stderr
    assert "randomness.seed=3" in (first / "log").read_text()
    assert (first / "results.bbox.json").exists() and not (second / "results.bbox.json").exists()

    # As if the first run had been interrupted between training and test.
    (first / "results.bbox.json").unlink()
    out = run_script(*command).stdout
    progress = re.findall(r"\[run (\d) of 2: (\w+), seed 3\] Epoch\((\w+)\)", out)
    assert list(dict.fromkeys(progress)) == [
        ("1", NAMES[0], "test"),  # it is not trained again
        ("2", NAMES[1], "train"),
        ("2", NAMES[1], "val"),
        ("2", NAMES[1], "test"),
    ]
    table = (tmp_path / "comparison_bbox.md").read_text()
    assert table in out and "4 images; 1 and 1 runs" in table
    assert (tmp_path / "comparison_bbox.png").exists()

    again = run_script(*command).stdout
    assert again.count("seed 3 is finished") == 2 and "Epoch(" not in again and table in again
    other = run_script(*command, "model.test_cfg.score_thr=0.5", check=False)
    assert other.returncode == 2
    assert "holds runs of configs/demo_retinanet_maxpool.py with other settings" in other.stderr
    assert "score_thr=0.5" in other.stderr


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
