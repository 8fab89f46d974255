#!/usr/bin/env python
"""Draws one window under average pooling, SoftPool and max pooling.

Shows the values, the weight of each tap, the output, and the gradient that reaches each tap.

Example:
  python paper/draw_window.py --out docs/window.png
"""

import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mmsoftpool import cli, soft_pool2d
from mmsoftpool.pictures import check_picture, save_figure

#: Activations as a convolution and ReLU give them.
WINDOW = torch.tensor([[0.0, 0.3, 0.8], [0.2, 1.9, 1.1], [0.0, 0.6, 0.4]])
_TITLES = {0.0: "average", 1.0: "SoftPool, α = 1", 4.0: "SoftPool, α = 4", math.inf: "max"}


def pool(window: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Pools a window to one value.

    Args:
        window: (H, W).
        alpha: The sharpness; infinity is max pooling.

    Returns:
        The weights (H, W), the gradient of the output (H, W), and the output.
    """
    x = window[None, None].clone().requires_grad_()
    kernel_size = tuple(window.shape)
    if math.isinf(alpha):
        y, weights = F.max_pool2d(x, kernel_size), (window == window.max()).float()
    else:
        y, weights = (
            soft_pool2d(x, kernel_size, alpha=alpha),
            (alpha * window).flatten().softmax(0).view_as(window),
        )
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return weights, gradient[0, 0], y.item()


def _draw_grid(axes, values: Tensor, cmap: str, limit: float, digits: int) -> None:
    axes.imshow(values, cmap=cmap, vmin=-limit if cmap == "RdBu_r" else 0, vmax=limit)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            dark = abs(value) > 0.6 * limit
            text = f"{value:.{digits}f}".replace("-0.00", "0.00")
            color = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_window(out: str) -> None:
    """Draws :data:`WINDOW` into the picture file ``out``."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    grid = figure.add_gridspec(2, 1 + len(_TITLES), wspace=0.08)
    axes = figure.add_subplot(grid[:, 0])
    _draw_grid(axes, WINDOW, "Greens", 2.6, 1)
    axes.set_title("a window", fontsize=11)
    for column, (alpha, title) in enumerate(_TITLES.items(), 1):
        weights, gradient, output = pool(WINDOW, alpha)
        for row, (values, cmap, name) in enumerate(
            ((weights, "Blues", "weights"), (gradient, "RdBu_r", "gradient"))
        ):
            axes = figure.add_subplot(grid[row, column])
            _draw_grid(axes, values, cmap, 1.0, 2)
            if column == 1:
                axes.set_ylabel(name, fontsize=11)
            if row == 0:
                axes.set_title(f"{title}\ny = {output:.2f}", fontsize=11)
    save_figure(figure, out)


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--out", default="window.png", metavar="FILE", help="the picture (default: %(default)s)"
    )
    return parser


def main(args):
    check_picture(args.out)
    draw_window(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
