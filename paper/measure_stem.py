#!/usr/bin/env python
"""Measures what pools of different sharpness do to the activations of trained stems.

Prints for each stem, and draws for all, three properties that the paper argues with (sections 1 to
3): how much energy a pool keeps, how many inputs its gradient reaches, and how much the output
changes when the image moves by a pixel (Zhang, "Making Convolutional Networks Shift-Invariant
Again", 2019). The picture also has the histograms. The backbones must be mmdet's ResNets.

Example:
  python paper/measure_stem.py --out stems.png \\
      configs/demo/demo_retinanet_maxpool.py work_dirs/demo_retinanet_maxpool/epoch_16.pth \\
      configs/demo/demo_retinanet_softpool.py work_dirs/demo_retinanet_softpool/epoch_16.pth
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import Runner
from rich.progress import track
from torch import Tensor, nn

from mmsoftpool import cli, soft_pool2d
from mmsoftpool.config import config_names, load_config, require
from mmsoftpool.errors import UserError
from mmsoftpool.ops.pooling import Pooling
from mmsoftpool.pictures import check_picture, colours, save_figure
from mmsoftpool.runner import load_model

#: The values of alpha that are measured by default; infinity is max pooling.
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)
_LABELS = {0.0: "avg", math.inf: "max"}


def stem_pool(model: nn.Module) -> nn.Module:
    """The pool in the stem of a detector whose backbone is one of mmdet's ResNets.

    Raises:
        UserError: If the backbone has none.
    """
    pool = getattr(model.backbone, "maxpool", None)
    if pool is None:
        raise UserError(
            f"the backbone must have a stem pool named maxpool, {type(model.backbone).__name__} "
            "has none"
        )
    return pool


def pool_arguments(pool: nn.Module) -> dict:
    """The arguments of a pool that all pools have, for ``soft_pool2d`` and ``F.max_pool2d``."""
    keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return {key: getattr(pool, key) for key in keys if hasattr(pool, key)}


@torch.no_grad()
def pool_input(model: nn.Module, inputs: Tensor) -> Tensor:
    """The input of the pool in the stem, (N, C, h, w), for images (N, 3, H, W)."""
    seen = []
    hook = stem_pool(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model.backbone(inputs)
    finally:
        hook.remove()
    return seen[0]


@dataclass(frozen=True)
class StemMeasurement:
    """Result of :func:`measure_stem`, each array over ``alphas``.

    Attributes:
        alphas: The pools, infinity for max pooling.
        trained: The alpha of the stem's own pool, if it is one of them.
        energy: Mean square of the outputs over that of the inputs.
        gradient: Share of the inputs that the gradient reaches, for a gradient of 1 in every
            output: ``(sum |d|)^2 / (n sum d^2)`` of the n inputs' gradients d, which is 1 if all
            get the same and 1 / n if one gets everything.
        shift: Root mean square change of the outputs when the image moves by one pixel, over their
            standard deviation in their channel.
        edges: (bins + 1,) edges of the histograms, over the inputs of the first batch.
        before: (bins,) share of the inputs in each bin.
        after: (alphas, bins) the same for the outputs.
    """

    alphas: tuple[float, ...]
    trained: float | None
    energy: np.ndarray
    gradient: np.ndarray
    shift: np.ndarray
    edges: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def markdown(self) -> str:
        """Formats the three measurements as a table."""
        lines = ["| pool | energy | gradient | shift |", "|---|---:|---:|---:|"]
        for i, alpha in enumerate(self.alphas):
            name = _LABELS.get(alpha, f"alpha {alpha:g}")
            cells = (self.energy[i], self.gradient[i], self.shift[i])
            lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
        return "\n".join(lines) + "\n"


def measure_stem(
    cfg: Config,
    checkpoint: str,
    alphas: Sequence[float] = ALPHAS,
    images: int = 32,
    bins: int = 60,
) -> StemMeasurement:
    """Measures pools of different sharpness on the activations of one trained stem.

    Args:
        cfg: The config of the detector, from :func:`~mmsoftpool.config.load_config`. Its backbone
            is one of mmdet's ResNets.
        checkpoint: File or URL of its weights.
        alphas: The pools, infinity for max pooling. Defaults to :data:`ALPHAS`.
        images: Number of images of the val split. Defaults to 32.
        bins: Number of bins of the histograms. Defaults to 60.

    Raises:
        FileNotFoundError: If the data set or the checkpoint is missing.
        UserError: If an argument is out of its range, the checkpoint does not fit, the backbone
            has no ``maxpool``, or the config has no ``val_dataloader``.
    """
    if not alphas or not all(alpha >= 0 for alpha in alphas):
        raise UserError(f"alphas must be numbers of at least 0, at least one, got {list(alphas)}")
    for name, value in (("images", images), ("bins", bins)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    require(cfg, "model.backbone", "val_dataloader.dataset")
    model = load_model(cfg, checkpoint)
    own = stem_pool(model)
    arguments = pool_arguments(own)
    trained = math.inf if isinstance(own, nn.MaxPool2d) else getattr(own, "alpha", None)
    if isinstance(own, nn.AvgPool2d):
        trained = 0.0

    pooling = Pooling.check(2, **arguments)

    def pool(x: Tensor, alpha: float) -> Tensor:
        if alpha == math.inf:  # padding may be pairs, which F.max_pool2d does not take
            top, bottom, left, right = pooling.padding
            height, width = pooling.output_sizes(x.shape[2:])
            x = F.pad(x, (left, right, top, bottom), value=-math.inf)
            return F.max_pool2d(x, **{**arguments, "padding": 0})[..., :height, :width]
        return soft_pool2d(x, **arguments, alpha=alpha)

    sums = np.zeros((len(alphas), 5))  # of y^2, |d|, d^2, change^2, variance
    counts = np.zeros((len(alphas), bins))
    before, edges = np.zeros(bins), None
    total, elements, outputs, squares = 0, 0, 0, 0.0
    loader = Runner.build_dataloader(cfg.val_dataloader)
    batches = min(len(loader), math.ceil(images / loader.batch_size))
    for data in track(itertools.islice(loader, batches), "stem", total=batches):
        inputs = model.data_preprocessor(data, False)["inputs"][: images - total]
        total += len(inputs)
        # The image without its last and without its first column.
        x, other = (pool_input(model, part) for part in (inputs[..., :-1], inputs[..., 1:]))
        if edges is None:
            edges = np.linspace(float(x.min()), float(x.max()), bins + 1)
        before += np.histogram(x.numpy(force=True), edges)[0]
        squares += float(x.double().square().sum())
        elements += x.numel()
        for i, alpha in enumerate(alphas):
            leaf = x.detach().requires_grad_()
            y = pool(leaf, alpha)
            (gradient,) = torch.autograd.grad(y.sum(), leaf)
            y = y.detach()
            # Without the borders, where padding takes the place of what has moved out.
            change = (pool(other, alpha) - y)[..., 2:-2, 2:-2].double()
            sums[i] += [
                float(y.double().square().sum()),
                float(gradient.double().abs().sum()),
                float(gradient.double().square().sum()),
                float(change.square().sum()),
                float(y[..., 2:-2, 2:-2].double().var((0, 2, 3), correction=0).sum())
                * change[:, 0].numel(),
            ]
            counts[i] += np.histogram(y.numpy(force=True), edges)[0]
        outputs += y.numel()
    return StemMeasurement(
        alphas=tuple(alphas),
        trained=trained,
        energy=sums[:, 0] / outputs / (squares / elements),
        gradient=sums[:, 1] ** 2 / (elements * sums[:, 2]),
        shift=np.sqrt(sums[:, 3] / sums[:, 4]),
        edges=edges,
        before=before / elements,
        after=counts / outputs,
    )


def draw_stems(stems: dict[str, StemMeasurement], out) -> None:
    """Draws the measurements of one or more stems.

    The last panel has the histograms of the first one.

    Args:
        stems: The measurements by the name of the stem, all of the same alphas.
        out (str | Path): Picture file.
    """
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    grid = figure.subplots(2, 2)
    first = next(iter(stems.values()))
    places = np.arange(len(first.alphas))
    labels = [_LABELS.get(alpha, f"{alpha:g}") for alpha in first.alphas]
    panels = (
        ("energy", "Energy kept: mean square, output / input"),
        ("gradient", "Share of the inputs that the gradient reaches"),
        ("shift", "Change when the image moves by a pixel"),
    )
    for axes, (name, title) in zip(grid.flat, panels, strict=False):
        for stem, measured in stems.items():
            values, color = getattr(measured, name), colours(stems)[stem]
            axes.plot(places, values, color=color, label=stem)
            if measured.trained in measured.alphas:
                own = measured.alphas.index(measured.trained)
                axes.plot(own, values[own], "o", color=color, ms=7)
        axes.set(xticks=places, xticklabels=labels, xlabel="α", title=title)
        axes.set_ylim(bottom=0)
    if len(stems) > 1:
        grid[0, 0].legend(frameon=False, title="stem (dot: its own pool)")
    axes = grid[1, 1]
    axes.stairs(first.before, first.edges, color="0.7", fill=True, label="before")
    pools = ("average pooling", 0.0), ("SoftPool, α = 1", 1.0), ("SoftPool, α = 4", 4.0)
    for name, alpha in (*pools, ("max pooling", math.inf)):
        if alpha in first.alphas:
            label = _LABELS.get(alpha, rf"$\alpha$ = {alpha:g}")
            share = first.after[first.alphas.index(alpha)]
            axes.stairs(share, first.edges, color=colours([name])[name], label=label)
    axes.set(
        yscale="log",
        xlabel="activation",
        ylabel="share",
        title="Activations" + (f" ({next(iter(stems))})" if len(stems) > 1 else ""),
    )
    axes.legend(frameon=False)
    for axes in grid.flat:
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, out)


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "stems",
        nargs="+",
        metavar="CONFIG CHECKPOINT",
        help="a config file and a checkpoint of it, one pair or more",
    )
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=float,
        default=ALPHAS,
        metavar="A",
        help="the values of alpha; inf is max pooling (default: 0 0.5 1 2 4 8 16 32 64 inf)",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="the names of the stems in the picture (default: those of the configs)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=32,
        metavar="N",
        help="the number of images of the val split (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="stems.png",
        help="the picture to write, a .png, .jpg or .pdf file (default: %(default)s)",
    )
    cli.add_cfg_options(parser)
    return parser


def main(args):
    if len(args.stems) % 2:
        raise UserError(f"stems must be pairs of a config and a checkpoint, got {args.stems}")
    configs, checkpoints = args.stems[::2], args.stems[1::2]
    names = config_names(configs, args.names)
    check_picture(args.out)
    stems = {}
    for name, config, checkpoint in zip(names, configs, checkpoints, strict=True):
        cfg = load_config(config, args.cfg_options)
        stems[name] = measure_stem(cfg, checkpoint, args.alphas, args.images)
        print(f"\n{name}\n\n{stems[name].markdown()}")
    draw_stems(stems, args.out)
    print(f"The picture is in {args.out}.")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
