"""A/B experiments: training and evaluation of configs with the same seeds, and comparison."""

import difflib
import fcntl
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..config import coco_metrics, config_names, load_config, require
from ..errors import UserError
from ..files import write_text
from ..hooks import find_intact_checkpoint
from .comparison import Comparison, compare_detections


@dataclass(frozen=True)
class _Run:
    """One training and evaluation: a config, a seed and the folder for its files."""

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
    configs: list[str],
    seeds: list[int],
    work_dir: str | Path,
    *,
    cfg_options: list[str] = (),
    amp: bool = False,
    auto_scale_lr: bool = False,
    gpus: int = 1,
    resamples: int = 1000,
    names: list[str] | None = None,
) -> dict[str, Comparison]:
    """Trains and evaluates configs with the same seeds, and compares each with the first one.

    Every run is a process of ``mmsoftpool train`` and one of ``mmsoftpool test``, in
    ``work_dir/CONFIG/seed_N``; their output is in the file ``log`` there. The same call later skips
    finished runs and resumes an interrupted run from its last checkpoint. Calls with other seeds or
    other configs may share ``work_dir`` and run at the same time.

    Args:
        configs: The config files, at least two with different names, all evaluated on the same
            annotations and classes. The first one is the baseline.
        seeds: Seeds of the runs of every config, different numbers of at least 0.
        work_dir: The folder for all results.
        cfg_options: Settings for all configs, each as ``key=value``. Defaults to none.
        amp: Whether to train in mixed precision. Defaults to False.
        auto_scale_lr: Whether to scale the learning rate by the true batch size. Defaults to False.
        gpus: Number of processes of a run, each with a GPU of its own; torchrun starts them if
            there are several. Defaults to 1.
        resamples: Number of bootstrap samples of the comparison. Defaults to 1000.
        names: What tables and pictures call the configs. Defaults to the names of their files.

    Returns:
        dict: The comparison for each metric (``bbox``, ``segm``), also written to
        ``work_dir/comparison_METRIC.md`` and ``.png``.

    Raises:
        FileNotFoundError: If a config is missing.
        UserError: If an argument is wrong, the configs cannot be compared, or ``work_dir`` has
            runs with other settings.
        BlockingIOError: If another process executes one of the runs.
        ChildProcessError: If a run fails.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be different numbers of at least 0, got {list(seeds)}")
    if gpus < 1:
        raise UserError(f"gpus must be at least 1, got {gpus}")
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
    stems = [Path(config).stem for config in configs]
    if len(stems) < 2 or len(set(stems)) != len(stems):
        raise UserError(f"configs must be at least two with different names, got {stems}")
    names = config_names(configs, names)
    work_dir, cfg_options = Path(work_dir), list(cfg_options)
    folders = {config: work_dir / stem for config, stem in zip(configs, stems, strict=True)}
    cfgs = [load_config(config, cfg_options, work_dir=str(f)) for config, f in folders.items()]
    evaluations = [_evaluation(config, cfg) for config, cfg in zip(configs, cfgs, strict=True)]
    for config, evaluation in zip(configs, evaluations, strict=True):
        parts = zip(("annotations", "metrics", "classes"), evaluations[0], evaluation, strict=True)
        different = [name for name, first, other in parts if first != other]
        if different:
            raise UserError(
                f"{configs[0]} and {config} must be evaluated on the same annotations, metrics and "
                f"classes, got other {' and '.join(different)}"
            )
    for cfg, (config, folder) in zip(cfgs, folders.items(), strict=True):
        _check_settings(config, cfg, folder)
    ann_file, metrics, classes = evaluations[0]
    # Seed by seed, so that an interrupted experiment has complete pairs.
    runs = [
        _Run(config, seed, folder / f"seed_{seed}", metrics)
        for seed in seeds
        for config, folder in folders.items()
    ]
    flags = ["--amp"] * amp + ["--auto-scale-lr"] * auto_scale_lr
    _run_all(runs, cfg_options, flags, gpus)

    comparisons = {}
    for metric in metrics:
        results = {
            name: [run.results(metric) for run in runs[i :: len(names)]]
            for i, name in enumerate(names)
        }
        comparison = compare_detections(
            ann_file, results, classes=classes, iou_type=metric, resamples=resamples
        )
        write_text(work_dir / f"comparison_{metric}.md", comparison.markdown())
        comparison.plot(work_dir / f"comparison_{metric}.png")
        comparisons[metric] = comparison
    return comparisons


def _evaluation(config: str, cfg: Config) -> tuple[str, tuple, tuple]:
    """The annotation file, the metrics and the classes of a config's evaluation."""
    require(cfg, "test_dataloader.dataset")
    metrics = tuple(coco_metrics(cfg))
    ann_file = cfg.test_evaluator.get("ann_file")
    if not isinstance(ann_file, str):
        raise UserError(f"test_evaluator.ann_file of {config} must be a file, got {ann_file!r}")
    init_default_scope(cfg.get("default_scope") or "mmdet")
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, "lazy_init": True})
    return ann_file, metrics, tuple(dataset.metainfo["classes"])


def _check_settings(config: str, cfg: Config, folder: Path) -> None:
    """Records a config with its options in ``folder``, or checks that they have not changed."""
    record, settings = folder / "config.py", cfg.pretty_text
    folder.mkdir(parents=True, exist_ok=True)
    # Two calls with other settings that start at the same time must not both find no record.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            write_text(record, settings)
        earlier = record.read_text("utf-8", errors="replace")
    # The folder may be named in another way, or have been moved.
    lines = [re.sub("(?m)^work_dir.*", "", text).splitlines() for text in (earlier, settings)]
    changes = list(difflib.unified_diff(*lines, n=0, lineterm=""))
    if changes:
        raise UserError(
            f"{folder} has runs of {config} with other settings; choose another work_dir or delete "
            f"it. The changes: {' '.join(changes[2:])}"
        )


def _run_all(runs: list[_Run], cfg_options: list[str], flags: list[str], gpus: int) -> None:
    """Executes the runs that are not finished, one after the other."""
    durations = []
    for number, run in enumerate(runs, 1):
        title = f"run {number} of {len(runs)}: {run.name}"
        if run.finished:
            print(f"== {title}: already finished", flush=True)
            continue
        about = ""
        if durations:
            left = sum(not other.finished for other in runs[number - 1 :])
            minutes = left * sum(durations) / len(durations) / 60
            about = f" (about {minutes:.0f} minutes for the remaining {left})"
        print(f"== {title}{about}", flush=True)
        start = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        # The processes of a run inherit the lock, so it is held until the last of them ends.
        with (run.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BlockingIOError(
                    f"another process is executing the run in {run.folder}"
                ) from error
            _train_and_test(run, title, cfg_options, flags, gpus, lock)
        durations.append(time.monotonic() - start)


def _train_and_test(run: _Run, title: str, cfg_options, flags, gpus, lock) -> None:
    """Trains a config, or resumes its training, and evaluates the last checkpoint."""
    launch = [sys.executable]
    arguments = ["--work-dir", str(run.folder)]
    if gpus > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        arguments += ["--launcher", "pytorch"]
    options = ["--cfg-options", *cfg_options, f"randomness.seed={run.seed}"]
    train = [*launch, "-m", "mmsoftpool", "train", run.config, "--resume", *flags]
    _execute([*train, *arguments, *options], run, title, lock)
    checkpoint, _ = find_intact_checkpoint(run.folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{run.name} saved no checkpoint in {run.folder}")
    test = [*launch, "-m", "mmsoftpool", "test", run.config, checkpoint]
    unfinished = run.folder / "unfinished"
    options.append(f"test_evaluator.outfile_prefix={unfinished}")
    _execute([*test, *arguments, *options], run, title, lock)
    for metric in run.metrics:
        os.replace(f"{unfinished}.{metric}.json", run.results(metric))


def _execute(command: list[str], run: _Run, title: str, lock) -> None:
    """Executes a command, writes its output to the log of the run and prints its progress."""
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
                    progress = re.search(r" (Epoch|Iter)\(.*", line)
                    if progress:
                        print(f"[{title}]{progress[0].rstrip()}", flush=True)
            except KeyboardInterrupt:
                process.wait()  # the terminal has interrupted it as well
                raise
    if process.returncode != 0:
        last = "".join(path.read_text(errors="replace").splitlines(keepends=True)[-15:])
        print(last, file=sys.stderr)
        raise ChildProcessError(
            f"{run.name} failed with exit status {process.returncode}, see above and {path}; the "
            "same command resumes from its last checkpoint"
        )
