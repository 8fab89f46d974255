"""Trains and evaluates two configs with the same seeds, and compares what comes out."""

import argparse
import difflib
import fcntl
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import DictAction

from ..engine import coco_metrics, find_good_checkpoint, load_config
from .comparison import Comparison, compare_detections


@dataclass(frozen=True)
class _Run:
    """One of the trainings: a config, a seed, and the folder that holds all of it."""

    config: str
    seed: int
    folder: Path
    metrics: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{Path(self.config).stem}, seed {self.seed}"

    def results(self, metric: str) -> Path:
        return self.folder / f"results.{metric}.json"

    @property
    def finished(self) -> bool:
        return all(self.results(metric).is_file() for metric in self.metrics)


def compare_configs(
    config_a: str,
    config_b: str,
    seeds: list[int],
    work_dir: str | Path,
    tools: str | Path,
    *,
    cfg_options: list[str] = (),
    train_arguments: list[str] = (),
    gpus: int = 1,
    resamples: int = 1000,
) -> dict[str, Comparison]:
    """Trains and evaluates both configs with every seed and compares them.

    Every run is a ``train.py`` and a ``test.py`` of its own, in ``work_dir/CONFIG/seed_N``, where
    ``log`` has their output. A run that is finished is kept and one that was interrupted goes on
    from its last checkpoint when this is called again. Two calls with other seeds may share a
    folder and run at the same time.

    Args:
        config_a: The first config file.
        config_b: The second one; evaluated on the same annotations.
        seeds: Of the runs, each at least 0.
        work_dir: Where everything goes.
        tools: The folder with ``train.py`` and ``test.py``.
        cfg_options: ``key=value`` for both configs, as for ``--cfg-options``. Defaults to none.
        train_arguments: More arguments for ``train.py``, such as ``--amp``. Defaults to none.
        gpus: Processes of a run; more than 1 are started by torchrun. Defaults to 1.
        resamples: Bootstrap samples of the comparison. Defaults to 1000.

    Returns:
        dict: For each metric (``bbox``, ``segm``) the comparison, also written to
        ``work_dir/comparison_METRIC.md`` and ``.png``.

    Raises:
        ValueError: If the two cannot be compared, the folder holds runs with other settings, or a
            run fails.
    """
    if len(set(seeds)) != len(seeds) or min(seeds, default=-1) < 0:
        raise ValueError(f"--seeds must be different numbers from 0 on, got {list(seeds)}")
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    names = tuple(Path(config).stem for config in (config_a, config_b))
    if names[0] == names[1]:
        raise ValueError(f"the two configs must have different names, got {names[0]} twice")
    work_dir = Path(work_dir)
    evaluations = [
        _check_settings(config, list(cfg_options), work_dir / name)
        for config, name in zip((config_a, config_b), names, strict=True)
    ]
    if evaluations[0] != evaluations[1]:
        raise ValueError(
            f"{config_a} and {config_b} must be evaluated alike, got (annotations, metrics) "
            f"{evaluations[0]} and {evaluations[1]}"
        )
    ann_file, metrics = evaluations[0]
    # Seed by seed, so that an early look at the folder finds pairs.
    runs = [
        _Run(config, seed, work_dir / name / f"seed_{seed}", metrics)
        for seed in seeds
        for config, name in zip((config_a, config_b), names, strict=True)
    ]
    _run_all(runs, Path(tools), list(cfg_options), list(train_arguments), gpus)

    comparisons = {}
    for metric in metrics:
        results = [[run.results(metric) for run in runs[i::2]] for i in (0, 1)]
        comparison = compare_detections(
            ann_file, *results, names=names, iou_type=metric, resamples=resamples
        )
        (work_dir / f"comparison_{metric}.md").write_text(comparison.markdown())
        comparison.plot(work_dir / f"comparison_{metric}.png")
        comparisons[metric] = comparison
    return comparisons


def _check_settings(config: str, cfg_options: list[str], folder: Path) -> tuple[str, tuple]:
    """Notes a config with its options in ``folder``, or checks that it is the one noted there.

    Returns:
        The annotation file and the metrics of its evaluation.
    """
    cfg = load_config(config, _parse_options(cfg_options), work_dir=str(folder))
    metrics = tuple(coco_metrics(cfg))
    noted, settings = folder / "config.py", cfg.pretty_text
    if not noted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(settings)
    elif noted.read_text() != settings:
        changes = difflib.unified_diff(
            noted.read_text().splitlines(), settings.splitlines(), n=0, lineterm=""
        )
        raise ValueError(
            f"{folder} holds runs of {config} with other settings; name another --work-dir or "
            "delete it. The change: " + " ".join(list(changes)[2:])
        )
    return cfg.test_evaluator.ann_file, metrics


def _parse_options(cfg_options: list[str]) -> dict:
    """Reads ``key=value`` as the tools' ``--cfg-options`` does."""
    for option in cfg_options:
        if "=" not in option:
            raise ValueError(f"--cfg-options must be KEY=VALUE, got {option}")
    if not cfg_options:
        return {}
    parser = argparse.ArgumentParser()
    parser.add_argument("options", nargs="+", action=DictAction)
    return parser.parse_args(cfg_options).options


def _run_all(runs: list[_Run], tools: Path, cfg_options, train_arguments, gpus) -> None:
    durations = []
    for number, run in enumerate(runs, 1):
        title = f"run {number} of {len(runs)}: {run.name}"
        if run.finished:
            print(f"== {title} is finished", flush=True)
            continue
        left = sum(not other.finished for other in runs[number - 1 :])
        about = ""
        if durations:
            minutes = left * sum(durations) / len(durations) / 60
            about = f", about {minutes:.0f} minutes for the {left} that are left"
        print(f"== {title}{about}", flush=True)
        start = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        # The processes of a run inherit the lock, so it is held as long as one of them is alive.
        with (run.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"{run.folder} is being run by another process; wait for it or end it"
                ) from error
            _train_and_test(run, title, tools, cfg_options, train_arguments, gpus, lock)
        durations.append(time.monotonic() - start)


def _train_and_test(run, title, tools, cfg_options, train_arguments, gpus, lock) -> None:
    launch = [sys.executable]
    arguments = ["--work-dir", str(run.folder)]
    if gpus > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        arguments += ["--launcher", "pytorch"]
    options = ["--cfg-options", *cfg_options, f"randomness.seed={run.seed}"]
    train = [*launch, str(tools / "train.py"), run.config, "--resume", *train_arguments]
    _execute([*train, *arguments, *options], run, title, lock)
    checkpoint, _ = find_good_checkpoint(run.folder)
    if checkpoint is None:
        raise ValueError(f"{run.name} has left no checkpoint in {run.folder}")
    test = [*launch, str(tools / "test.py"), run.config, checkpoint]
    unfinished = run.folder / "unfinished"
    options.append(f"test_evaluator.outfile_prefix={unfinished}")
    _execute([*test, *arguments, *options], run, title, lock)
    for metric in run.metrics:
        os.replace(f"{unfinished}.{metric}.json", run.results(metric))


def _execute(command: list[str], run: _Run, title: str, lock) -> None:
    """Runs a command; its output goes to the run's log, and its progress to the screen."""
    path = run.folder / "log"
    with path.open("a") as log:
        print("$", " ".join(command), file=log, flush=True)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[lock.fileno()],
        ) as process:
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    if " Epoch(" in line or " Iter(" in line:
                        progress = line[line.find(" Epoch(") :] if " Epoch(" in line else line
                        print(f"[{title}]{progress.rstrip()}", flush=True)
            except KeyboardInterrupt:
                process.wait()  # it was interrupted too
                raise ValueError("interrupted; the same command goes on from here") from None
    if process.returncode != 0:
        last = "".join(path.read_text(errors="replace").splitlines(keepends=True)[-15:])
        print(last, file=sys.stderr)
        raise ValueError(
            f"{run.name} failed with exit status {process.returncode}, see above and {path}; the "
            "same command goes on from its last checkpoint"
        )
