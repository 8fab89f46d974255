"""The swap without training: a network trained with max pooling, evaluated with SoftPool (the
paper's column "pre-trained" in Table 2), over the sharpness alpha."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import Runner, set_random_seed
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import require
from ..errors import UserError
from ..files import write_text
from ..pictures import metric_label, save_figure
from ..replace import replace_pooling
from ..runner import explain_errors, load_model
from .scores import KeptScores, check_alphas, check_val, identify, load_runner, main_metric

#: The values of alpha that are tried by default.
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class Swap:
    """Result of :func:`evaluate_swap`; all scores are of ``metric``, COCO's in percent.

    Attributes:
        metric: Name of the metric, such as ``'coco/bbox_mAP'``.
        alphas: The values of alpha.
        trained: (checkpoints,) scores with the pool of the training.
        swapped: (checkpoints, alphas) scores with SoftPool.
        renewed: (checkpoints, 1 + alphas) the same with new statistics of batch norm, first with
            the pool of the training; None if they were not asked for.
    """

    metric: str
    alphas: tuple[float, ...]
    trained: np.ndarray
    swapped: np.ndarray
    renewed: np.ndarray | None = None

    def markdown(self) -> str:
        """Formats the means over the checkpoints as a table, and the scores of each below it."""
        scores = np.column_stack([self.trained, self.swapped])
        curves = [scores] if self.renewed is None else [scores, self.renewed]
        columns = [metric_label(self.metric), "change", "new batch norm", "change"]
        columns = columns[: 2 * len(curves)]
        names = ["pool of the training", *(f"alpha {alpha:g}" for alpha in self.alphas)]
        lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
        for i, name in enumerate(names):
            cells = []
            for curve in curves:
                change = (curve[:, i] - self.trained).mean()
                cells.append(f"{curve[:, i].mean():.1f}")
                # The first cell is what all are compared with.
                cells.append(f"{change:+.1f}" if i or len(cells) > 1 else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if len(self.trained) > 1:
            lines += ["", "Each checkpoint:", ""]
            for i, name in enumerate(names):
                each = (", ".join(f"{score:.1f}" for score in curve[:, i]) for curve in curves)
                lines.append(f"- {name}: {'; new batch norm '.join(each)}")
        return "\n".join(lines) + "\n"

    def plot(self, out) -> None:
        """Draws the change of the score over alpha into the picture file ``out``.

        A line is the mean of the checkpoints, a dot one of them.
        """
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.6", lw=1)
        places = np.arange(len(self.alphas))
        curves = [("statistics of the training", self.swapped)]
        if self.renewed is not None:
            curves.append(("new batch norm statistics", self.renewed[:, 1:]))
        # No pool has these colours: a picture of several pools has others.
        for color, (label, curve) in zip(("C9", "0.4"), curves, strict=False):
            change = curve - self.trained[:, None]
            axes.plot(places, change.mean(0), color=color, label=label)
            for one in change:
                axes.plot(places, one, ".", color=color, ms=5, alpha=0.6)
        if len(curves) > 1:
            axes.legend(frameon=False, loc="lower right")
        axes.set(
            xticks=places,
            xticklabels=[f"{alpha:g}" for alpha in self.alphas],
            xlabel="α (0: average pooling)",
            ylabel=f"{metric_label(self.metric)} minus that of the trained pool",
            title="SoftPool in place of the pool of the training",
        )
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        save_figure(figure, out)


def evaluate_swap(
    cfg: Config,
    checkpoints: Sequence[str],
    alphas: Sequence[float] = ALPHAS,
    *,
    include="torch.nn.MaxPool2d",
    batch_norm: int = 0,
) -> Swap:
    """Evaluates trained networks on the val split with their own pool and with SoftPool instead.

    The scores are kept in ``swap.json`` in the config's ``work_dir``. A later call takes from there
    what has the same config, weights and settings, and evaluates the rest.

    Args:
        cfg: The config of the training, from :func:`~mmsoftpool.config.load_config`.
        checkpoints: Files or URLs of weights that fit it, such as those of several seeds.
        alphas: Values of alpha. Defaults to :data:`ALPHAS`.
        include: The pools of the backbone to replace, for :func:`~mmsoftpool.replace_pooling`.
            Defaults to ``'torch.nn.MaxPool2d'``, its max pools.
        batch_norm: Number of training batches from which the statistics of batch norm are estimated
            anew for a second curve. Defaults to 0, no second curve.

    Returns:
        The scores, also written to ``swap.md`` and ``swap.png`` in ``work_dir``.

    Raises:
        FileNotFoundError: If the data set or a checkpoint is missing.
        UserError: If an argument is out of its range, a checkpoint does not fit the config, the
            backbone has no such pool, or the config lacks a part that is needed.
    """
    if not checkpoints:
        raise UserError("checkpoints must be at least one file or URL, got none")
    if not alphas:
        raise UserError("alphas must be at least one number, got none")
    check_alphas(alphas)
    if batch_norm < 0:
        raise UserError(f"batch_norm must be at least 0, got {batch_norm}")
    runner = check_val(cfg)
    if batch_norm:
        require(cfg, "train_dataloader.dataset")
        with explain_errors(cfg):
            batches = len(runner.build_dataloader(cfg.train_dataloader))
        if batch_norm > batches:
            raise UserError(
                f"batch_norm must be at most the {batches} batches of the train split, got "
                f"{batch_norm}"
            )
    work_dir = Path(cfg.work_dir)
    known = KeptScores(work_dir / "swap.json")

    for checkpoint in checkpoints:  # mistakes are found before the first evaluation
        replace_pooling(load_model(cfg, checkpoint).backbone, include=include)

    curves = []
    for checkpoint in checkpoints:
        identity, runner, scores = identify(cfg, checkpoint, include), None, []
        for batches in [0, batch_norm] if batch_norm else [0]:
            for alpha in (None, *alphas):
                key = f"{identity} alpha={alpha} batch_norm={batches}"
                if key not in known:
                    if runner is None or alpha is None:  # with the pool of the training again
                        runner, pools = load_runner(cfg, checkpoint), {}
                    if alpha is not None and not pools:
                        pools = replace_pooling(runner.model.backbone, include=include)
                    for pool in pools.values():
                        pool.alpha = alpha
                    if batches:
                        _renew_batch_norm(runner, batches)
                    name = "the pool of the training" if alpha is None else f"alpha {alpha:g}"
                    print(f"== {checkpoint}: {name}{', new batch norm' if batches else ''}")
                scores.append(known.get(key, lambda runner=runner: runner.val()))
        curves.append(scores)
    metric, table = main_metric(curves)
    trained, swapped, renewed = np.split(table, [1, 1 + len(alphas)], axis=1)
    renewed = renewed if batch_norm else None
    swap = Swap(metric, tuple(alphas), trained[:, 0], swapped, renewed)
    write_text(work_dir / "swap.md", swap.markdown())
    swap.plot(work_dir / "swap.png")
    return swap


@torch.no_grad()
def _renew_batch_norm(runner: Runner, batches: int) -> None:
    """Estimates the statistics of the backbone's batch norm from the first training batches."""
    model = runner.model
    for module in model.backbone.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over the batches
            module.train()
    set_random_seed(0)  # the same images, in the same augmentation, for every pool
    # A new loader: one that has been iterated would continue with other random numbers.
    loader = Runner.build_dataloader(runner.cfg.train_dataloader, seed=0)
    for data in itertools.islice(loader, batches):
        model.backbone(model.data_preprocessor(data, True)["inputs"])
    model.eval()
