"""kill -9 at random moments of a run of the demo; the same command then ends in the same result.

The usual tests kill one training twice. With MMSOFTPOOL_FUZZ, as `make fuzz` sets it, ten moments
are drawn from two trainings, an evaluation, an A/B experiment and a submission.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from make_shapes import make_shapes
from mmsoftpool.files import read_pickle
from mmsoftpool.hooks import find_intact_checkpoint

from .common import LONGER, ROOT, config_path

DEMO = config_path("demo_retinanet_softpool")
#: A line of output that tells what the run does.
EVENT = re.compile(
    r"(\[run .*?\] )?(Epoch|Iter)\((train|val|test)\) +\[[][/ \d]+\]"
    r"|(Saving) checkpoint at \d+|(part) \d+ of \d+"
)


def kind(event: str) -> str:
    match = EVENT.fullmatch(event)
    run = "A/B " if match[1] else ""
    return run + next(group for group in (match[3], match[4], match[5]) if group)


class Demo:
    """The commands of a run of the demo on a few images, in a folder of their own."""

    def __init__(self, inputs: Path, folder: Path):
        self.folder = folder
        options = (
            "--cfg-options",
            f"data_root={inputs}",
            "randomness.deterministic=True",
            "train_dataloader.batch_size=4",
            "val_dataloader.batch_size=2",
            "test_dataloader.batch_size=2",
            "default_hooks.logger.interval=1",
            "default_hooks.checkpoint.max_keep_ckpts=1",
            "model.backbone.base_channels=8",
            "model.neck.in_channels=[8,16,32,64]",
            "model.test_cfg.score_thr=0",
        )
        weights = folder / "train" / "epoch_3.pth"
        dev = ("--ann-file", inputs / "info.json", "--image-dir", inputs / "val", "--part-size", 2)
        self.commands = {
            "train": ("train", DEMO, "--resume", *options, "train_cfg.max_epochs=3"),
            "iterations": ("train", inputs / "iterations.py", "--resume", *options),
            "test": ("test", DEMO, weights, "--out", folder / "predictions.pkl", *options),
            "ab": (
                *("ab", config_path("demo_retinanet_maxpool"), DEMO, "--seeds", "3"),
                *("--resamples", 10, *options, "train_cfg.max_epochs=2"),
            ),
            "dev": ("test-dev", DEMO, weights, "--name", "x", *dev, *options),
        }

    def run(self, name: str, moments=()) -> list[str]:
        """Runs a command; kills it at each moment, an event and a delay, and runs it again.

        Returns:
            The events in the output of the last, complete, execution.
        """
        tool, *arguments = map(str, self.commands[name])
        command = [sys.executable, "-u", "-m", "mmsoftpool", tool, *arguments]
        command += ["--work-dir", str(self.folder / name)]
        for moment in (*moments, None):
            events, lines = [], []
            with subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            ) as process:
                for line in process.stdout:
                    lines.append(line)
                    found = EVENT.search(line)
                    if found:
                        events.append(found[0])
                    if moment and found and found[0] == moment[0]:
                        time.sleep(moment[1])
                        os.killpg(process.pid, signal.SIGKILL)
            expected = -signal.SIGKILL if moment else 0
            assert process.returncode == expected, (moment, "".join(lines[-30:]))
        return events

    def training(self, name: str) -> dict:
        """Weights, optimizer and logged curves of a training; the logs of a resumed one joined."""
        work_dir = self.folder / name
        path, skipped = find_intact_checkpoint(work_dir)
        saved = torch.load(path, weights_only=False)
        losses, scores = {}, {}
        for log in sorted(work_dir.glob("*/vis_data/scalars.json")):
            for line in log.read_text().split("\n")[:-1]:
                entry = json.loads(line)
                (losses if "loss" in entry else scores)[entry["step"]] = {
                    key: value for key, value in entry.items() if "time" not in key
                }
        optimizer = {
            f"{number} {key}": value
            for number, state in saved["optimizer"]["state"].items()
            for key, value in state.items()
        }
        files = sorted(p.name for p in work_dir.iterdir() if p.suffix == ".pth")
        schedule = [
            {k: v for k, v in scheduler.items() if k != "verbose"}
            for scheduler in saved["param_schedulers"]
        ]
        return dict(
            losses=losses, scores=scores, files=files, skipped=skipped, schedule=schedule
        ) | dict(**saved["state_dict"], **optimizer)

    def results(self, name: str) -> dict:
        """All that a command leaves, without times and paths."""
        if name in ("train", "iterations"):
            return self.training(name)
        if name == "test":
            return {
                f"{image['img_id']} {key}": image["pred_instances"][key]
                for image in read_pickle(self.folder / "predictions.pkl", "predictions")
                for key in ("bboxes", "scores", "labels")
            }
        patterns = ("**/results.*.json", "comparison_*.md") if name == "ab" else ("*/*/*.json",)
        found = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for pattern in patterns
            for path in sorted((self.folder / name).glob(pattern))
        }
        if name == "ab":
            for run in sorted((self.folder / name).glob("*/seed_3")):
                trained = self.training(run.relative_to(self.folder))
                found |= {f"{run.parent.name} {key}": value for key, value in trained.items()}
        return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=16, val=6)
    val = json.loads((root / "annotations" / "instances_val.json").read_text())
    (root / "info.json").write_text(json.dumps({**val, "annotations": []}))
    (root / "iterations.py").write_text(
        f"_base_ = {DEMO!r}\n"
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=10, val_interval=4)\n"
        "param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10)]\n"
        "default_hooks = dict(\n"
        "    checkpoint=dict(by_epoch=False, interval=3), logger=dict(log_metric_by_epoch=False)\n"
        ")\n"
        "log_processor = dict(by_epoch=False)\n"
    )
    return root


def draw(events: dict[str, list[str]], count: int, rng: random.Random) -> dict[str, list]:
    """Draws moments: one of every kind of event, the rest from all of them."""
    everything = [(name, event) for name in events for event in dict.fromkeys(events[name])]
    kinds = defaultdict(list)
    for name, event in everything:
        kinds[name, kind(event)].append((name, event))
    drawn = [rng.choice(members) for members in rng.sample(list(kinds.values()), len(kinds))]
    drawn = drawn[:count]
    drawn += rng.sample(
        [moment for moment in everything if moment not in drawn], count - len(drawn)
    )
    moments = defaultdict(list)
    for name, event in sorted(drawn, key=everything.index):
        moments[name].append((event, rng.uniform(0, 0.03 if "Saving" in event else 0.2)))
    return moments


def assert_same(whole: dict, killed: dict) -> None:
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, killed[name]), name
        else:
            assert value == killed[name], name


def test_a_killed_run_of_the_demo_ends_in_the_same_bits(inputs, tmp_path):
    seed = 0 if LONGER == 1 else random.randrange(2**32)
    rng = random.Random(seed)
    whole, killed = Demo(inputs, tmp_path / "whole"), Demo(inputs, tmp_path / "killed")
    names = ["train"] if LONGER == 1 else list(whole.commands)
    events = {name: whole.run(name) for name in names}
    moments = draw(events, 2 if LONGER == 1 else 10, rng)
    print(f"seed {seed}:", *moments.items(), sep="\n")
    for name in names:
        killed.run(name, moments[name])
        assert_same(whole.results(name), killed.results(name))
