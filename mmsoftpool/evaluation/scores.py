"""Scores of trained networks under several conditions, kept in a file, so that a call resumes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner

from ..checks import check_dataset
from ..config import require
from ..errors import UserError
from ..files import file_hash, read_json, write_text
from ..ops.pooling import Pooling
from ..runner import build_runner, explain_errors


class KeptScores:
    """The metrics of evaluations in a JSON file, written after each and not evaluated again."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.known = read_json(path, f"results in {path.name}") if path.exists() else {}
        if not (
            isinstance(self.known, dict)
            and all(isinstance(scores, dict) for scores in self.known.values())
            and all(isinstance(x, float) for scores in self.known.values() for x in scores.values())
        ):
            raise UserError(f"{path} is damaged; delete it to evaluate everything again")

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def get(self, key: str, evaluate: Callable[[], dict]) -> dict[str, float]:
        """The metrics of a key; ``evaluate`` finds them where the file does not have them."""
        if key not in self.known:
            self.known[key] = {name: float(value) for name, value in evaluate().items()}
            write_text(self.path, json.dumps(self.known, indent=1))
        return self.known[key]


def identify(cfg: Config, checkpoint: str, include) -> str:
    """A name of a config, a checkpoint and an ``include``, another one for other weights."""
    cfg = cfg.copy()
    cfg.work_dir = ""
    weights = checkpoint if "://" in checkpoint else file_hash(checkpoint)[:16]
    include = include if isinstance(include, (list, tuple)) else [include]
    text = cfg.pretty_text + " ".join(map(str, include))
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {weights}"


def check_alphas(alphas: Sequence[float]) -> None:
    """Checks that values of the sharpness are in their range and different."""
    if len(set(alphas)) != len(alphas):
        raise UserError(f"alphas must be different numbers, got {list(alphas)}")
    for alpha in alphas:
        try:
            Pooling.check(2, 1, alpha=alpha)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error


def check_val(cfg: Config) -> Runner:
    """Builds the Runner of a config and checks its val split, before the first evaluation."""
    require(cfg, "model.backbone", "val_dataloader.dataset", "val_evaluator", "val_cfg")
    with explain_errors(cfg):
        runner = build_runner(cfg.copy())
        dataset, metrics = runner.val_dataloader.dataset, runner.val_evaluator.metrics
        check_dataset("val", dataset, metrics, runner.model)
    return runner


def load_runner(cfg: Config, checkpoint: str) -> Runner:
    """The Runner of a config with the weights of a checkpoint."""
    cfg = cfg.copy()
    cfg.load_from = checkpoint
    runner = build_runner(cfg)
    runner.call_hook("before_run")  # as Runner.val does, for hooks that keep weights of their own
    runner.load_or_resume()
    runner.model.eval()
    return runner


def main_metric(table: list[list[dict[str, float]]]) -> tuple[str, np.ndarray]:
    """The metric for a table of evaluations, and its scores, COCO's in percent.

    It is the AP of the boxes or masks of all classes. A detector that finds nothing has no metrics:
    its AP is 0.
    """
    names = {name for row in table for scores in row for name in scores}
    preferred = ("coco/bbox_mAP", "coco/segm_mAP", "accuracy/top1")
    means = sorted(name for name in names if name.endswith("mAP"))
    metric = next((n for n in (*preferred, *means, *sorted(names)) if n in names), preferred[0])
    scale = 100.0 if metric.startswith("coco/") else 1.0
    return metric, scale * np.array([[s.get(metric, 0.0) for s in row] for row in table])
