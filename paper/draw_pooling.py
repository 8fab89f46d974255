#!/usr/bin/env python
"""Draws the effect of pooling on a photo or on the activations of a detector.

By default, every pooling method pools a region of the photo, and a detail of it is enlarged. With
--config and --checkpoint, the picture has the activations of the detector's stem before and after
max pooling and SoftPool.

Examples:
  python paper/draw_pooling.py photo.png --kernel 3 5 --out pooling.png
  python paper/draw_pooling.py photo.png --methods average maximum softpool --region 200 50 240 240
  python paper/draw_pooling.py photo.jpg --config configs/demo/demo_retinanet_softpool.py \\
      --checkpoint work_dirs/demo_retinanet_softpool/epoch_16.pth --out stem.png
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmdet.utils import get_test_pipeline_cfg
from mmengine.dataset import Compose
from torch import Tensor

from image_similarity import check_methods, enlarge, pool_image, read_image
from measure_stem import pool_arguments, pool_input, stem_pool
from mmsoftpool import cli, soft_pool2d
from mmsoftpool.config import load_config, type_name
from mmsoftpool.errors import UserError
from mmsoftpool.evaluation.scores import check_alphas
from mmsoftpool.files import check_input
from mmsoftpool.ops.pooling import Pooling
from mmsoftpool.ops.reference import Windows
from mmsoftpool.pictures import check_picture, save_figure
from mmsoftpool.runner import load_model
from pooling_methods import METHODS

_NAMES = {
    "lp": "$L_p$",
    "lite-s3dpp": "Lite-S3DPP",
    "lip": "LIP",
    "s3": "S3Pool",
    "softpool": "SoftPool",
}
_ACCENT = "#ffd400"
Box = tuple[int, int, int, int]  # x, y, width, height


def check_box(name: str, box: Sequence[int], what: str, outer: Box) -> Box:
    """Returns ``box``, an argument of this name, if it is inside ``outer``.

    Raises:
        UserError: If it is not inside ``outer``, which the message calls ``what``.
    """
    x, y, w, h = box
    left, top, width, height = outer
    if min(w, h) < 1 or x < left or y < top or x + w > left + width or y + h > top + height:
        raise UserError(
            f"{name} must be X Y WIDTH HEIGHT inside {what}, {left} {top} {width} {height}, got "
            f"{x} {y} {w} {h}"
        )
    return x, y, w, h


def richest_box(image: Tensor, width: int, height: int) -> Box:
    """The box of a given size with the most contrast, the largest variance of brightness."""
    grey = image.mean(1)[0].double().numpy()
    sums, squares = cv2.integral2(grey)

    def window(table):
        return (
            table[height:, width:]
            - table[:-height, width:]
            - table[height:, :-width]
            + table[:-height, :-width]
        )

    area = width * height
    variance = window(squares) / area - (window(sums) / area) ** 2
    y, x = np.unravel_index(np.argmax(variance), variance.shape)
    return int(x), int(y), width, height


def _crop(image: Tensor, box: Box) -> np.ndarray:
    x, y, w, h = box
    return image[0, :, y : y + h, x : x + w].permute(1, 2, 0).numpy()


def _outline(axes, box: Box, origin: tuple[int, int], **style) -> None:
    x, y, w, h = box
    corner = (x - origin[0] - 0.5, y - origin[1] - 0.5)
    axes.add_patch(Rectangle(corner, w, h, fill=False, **style))


def draw_pooling(
    image: Tensor,
    out,
    kernels: Sequence[int] = (3, 5),
    methods: Sequence[str] = tuple(METHODS),
    region: Box | None = None,
    zoom: Box | None = None,
    scale: float = 1.0,
    columns: int = 6,
    alphas: Sequence[float] = (1.0,),
) -> None:
    """Draws a region of an image pooled by several methods, each with a magnified detail.

    Pooled images are enlarged to the size of the original, every pixel over its window. Stochastic
    methods are sampled once, trainable ones have their initial weights.

    Args:
        image: (1, 3, H, W), values 0 to 1.
        out (str | Path): Picture file.
        kernels: Kernel sizes, which are the strides too. Defaults to (3, 5).
        methods: Keys of ``METHODS``. Defaults to all.
        region: x, y, width and height of the region. Defaults to None, the square of half the
            image's shorter side with the most contrast.
        zoom: x, y, width and height of the detail, inside the region. Defaults to None, the square
            of a fifth of the region's shorter side with the most contrast.
        scale: The value of white that the methods see. Defaults to 1.
        columns: Largest number of panels in a row. Defaults to 6.
        alphas: Sharpness of SoftPool; it has a panel for each. Defaults to (1,).

    Raises:
        UserError: If an argument is out of its range, or a box is not inside the image.
    """
    check_methods(methods, scale)
    check_alphas(alphas)
    if columns < 1:
        raise UserError(f"columns must be at least 1, got {columns}")
    height, width = image.shape[2:]
    side = max(1, min(height, width) // 2)
    region = region or richest_box(image, side, side)
    region = check_box("region", region, "the image", (0, 0, width, height))
    x, y, w, h = region
    for kernel in kernels:
        if not 2 <= kernel <= min(w, h) // 2:
            raise UserError(
                f"kernels must be from 2 to half of the region's {w} x {h} pixels, got {kernel}"
            )
    if zoom is None:
        part = max(1, min(w, h) // 5)
        inside = richest_box(image[..., y : y + h, x : x + w], part, part)
        zoom = (inside[0] + x, inside[1] + y, *inside[2:])
    zoom = check_box("zoom", zoom, "the region", region)

    pools = [(m, a) for m in methods for a in (alphas if m == "softpool" else (1.0,))]
    # Everything in one row if it fits, otherwise a block of rows per kernel.
    original = ("original", 1.0)
    panels = [(*original, kernels[0])] + [(*pool, k) for k in kernels for pool in pools]
    one_row = len(panels) <= columns
    if not one_row:
        panels = [(*pool, k) for k in kernels for pool in (original, *pools)]
    per_block = len(panels) if one_row else len(pools) + 1
    columns = min(columns, per_block)
    rows_per_block = math.ceil(per_block / columns)
    rows = rows_per_block * (len(panels) // per_block)
    size = 1.75
    figure = Figure((size * columns, (size * h / w + 0.22) * rows))
    spacing = dict(wspace=0.04, hspace=0.15 * w / h)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=spacing)
    for axes in grid.flat:
        axes.axis("off")
    for i, (method, alpha, kernel) in enumerate(panels):
        block, place = divmod(i, per_block)
        row, column = divmod(place, columns)
        axes = grid[block * rows_per_block + row, column]
        title = _NAMES.get(method, method)
        if method == "original":
            shown = image
        else:
            shown = torch.ones_like(image)
            large = enlarge(pool_image(image, method, kernel, scale, alpha=alpha), kernel)
            shown[..., : large.shape[2], : large.shape[3]] = large
        if method == "softpool" and tuple(alphas) != (1.0,):
            title += rf", $\alpha$ = {alpha:g}"
        if one_row and len(kernels) > 1 and method != "original":
            title += f", {kernel} x {kernel}"
        elif not one_row and column == 0:
            label = f"{kernel} x {kernel}"
            style = dict(rotation=90, ha="right", va="center", fontsize=8.5)
            axes.text(-0.03, 0.5, label, transform=axes.transAxes, **style)
        axes.imshow(_crop(shown, region), interpolation="nearest", vmin=0, vmax=1)
        weight = "bold" if method == "softpool" else "normal"
        axes.set_title(title, fontsize=8.5, pad=3, weight=weight)
        _outline(axes, region, (x, y), ec="0.7", lw=0.6)
        _outline(axes, zoom, (x, y), ec=_ACCENT, lw=0.8)
        # The magnified detail goes into the corner farthest from the detail.
        left = zoom[0] + zoom[2] / 2 > x + w / 2
        below = zoom[1] + zoom[3] / 2 < y + h / 2
        times = 0.46 * min(w / zoom[2], h / zoom[3])
        part = (times * zoom[2] / w, times * zoom[3] / h)
        inset = axes.inset_axes(
            (0 if left else 1 - part[0], 0 if below else 1 - part[1], *part), zorder=3
        )
        inset.imshow(_crop(shown, zoom), interpolation="nearest", vmin=0, vmax=1, aspect="auto")
        inset.set(xticks=[], yticks=[])
        for spine in inset.spines.values():
            spine.set(color=_ACCENT, linewidth=1.2)
    save_figure(figure, out, bbox_inches="tight", pad_inches=0.05)


def stem_activations(cfg, checkpoint: str, image_file: str) -> tuple[np.ndarray, Tensor, dict]:
    """Computes the input of the pool in a detector's stem.

    Args:
        cfg (Config): The detector's config.
        checkpoint: File or URL of its weights, which must match the model exactly.
        image_file: The image.

    Returns:
        The resized image, RGB, (H, W, 3), values 0 to 1; the activations without the image's
        padding, (C, h, w); and the arguments of the pool.

    Raises:
        UserError: If the config has no ``test_dataloader``, the checkpoint does not fit, or the
            backbone has no ``maxpool``, the name of the stem's pool in mmdet's ResNets.
        FileNotFoundError: If there is no such checkpoint.
    """
    if "test_dataloader" not in cfg:
        raise UserError(
            f"cfg must have a test_dataloader, whose pipeline prepares the image; {cfg.filename} "
            "has none"
        )
    model = load_model(cfg, checkpoint)
    pool = stem_pool(model)
    steps = [
        step
        for step in get_test_pipeline_cfg(cfg)
        if type_name(step) not in ("LoadAnnotations", "PackDetInputs")
    ]
    pack = dict(type="mmdet.PackDetInputs", meta_keys=("ori_shape", "img_shape"))
    data = Compose([*steps, pack])(dict(img_path=str(image_file), img_id=0))
    batch = model.data_preprocessor(
        dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]])
    )
    before = pool_input(model, batch["inputs"])
    height, width = data["data_samples"].img_shape[:2]
    shown = data["inputs"].permute(1, 2, 0).numpy()[..., ::-1] / 255
    arguments = pool_arguments(pool)
    if hasattr(pool, "alpha"):
        arguments["alpha"] = pool.alpha
    stride = batch["inputs"].shape[-1] / before.shape[-1]
    activations = before[0, :, : math.ceil(height / stride), : math.ceil(width / stride)]
    return shown, activations, arguments


def draw_stem(
    image: np.ndarray, activations: Tensor, pooling: dict, out, channels: int = 4
) -> None:
    """Draws activations before and after max pooling and SoftPool.

    The first row is the mean of all channels, with the image in the corner; the others are the
    channels whose activations vary most. The columns are the activations before pooling, after max
    pooling and after SoftPool, on one scale; the difference of the two; and the largest softmax
    weight of each window, from 1 / taps, where SoftPool is average pooling, to 1, where it is max
    pooling.

    Args:
        image: (H, W, 3), values 0 to 1.
        activations: Input of the pools, (C, h, w).
        pooling: Arguments of the pools.
        out (str | Path): Picture file.
        channels: Number of single channels. Defaults to 4.

    Raises:
        UserError: If ``channels`` is less than 1.
    """
    if channels < 1:
        raise UserError(f"channels must be at least 1, got {channels}")
    checked = Pooling.check(2, **pooling)
    taps = Windows(activations.shape[1:], checked).gather(activations[None], -math.inf)[:, 0]
    # Not alpha times -inf, which is NaN for alpha = 0.
    logits = torch.where(taps == -math.inf, taps, checked.alpha * taps)
    largest, weights = taps.amax(0), logits.softmax(0)
    soft = soft_pool2d(activations, **pooling)
    order = activations.flatten(1).var(1).argsort(descending=True)[:channels].tolist()
    height, width = image.shape[:2]
    size = 1.6
    rows = len(order) + 1
    figure = Figure((5.7 * size, size * rows * height / width + 0.3), layout="constrained")
    grid = figure.subplots(rows, 5)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    titles = ("before pooling", "max pooling", "SoftPool", "max minus SoftPool", "largest weight")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    weight_style = dict(cmap="viridis", vmin=1 / len(weights), vmax=1)
    selections = [("mean of all channels", slice(None)), *((f"channel {c}", [c]) for c in order)]
    for line, (name, which) in zip(grid, selections, strict=True):
        before, after_max, after_soft = (
            maps[which].mean(0).numpy() for maps in (activations, largest, soft)
        )
        limits = dict(vmin=min(0.0, float(before.min())), vmax=float(after_max.max()))
        line[0].set_ylabel(name, fontsize=9)
        for axes, values in zip(line, (before, after_max, after_soft), strict=False):
            drawn = axes.imshow(values, cmap="magma", interpolation="nearest", **limits)
        bars = [(drawn, line[2])]
        for axes, values, style in (
            (line[3], after_max - after_soft, dict(cmap="cividis", vmin=0)),
            (line[4], weights.amax(0)[which].mean(0).numpy(), weight_style),
        ):
            bars.append((axes.imshow(values, interpolation="nearest", **style), axes))
        for drawn, axes in bars:
            bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02)
            bar.ax.tick_params(labelsize=6.5, length=2, pad=1)
            bar.outline.set_visible(False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    inset = grid[0, 0].inset_axes((0, 0, 0.5, 0.5))
    inset.imshow(image)
    inset.set(xticks=[], yticks=[])
    inset.spines[:].set_color("white")
    save_figure(figure, out, bbox_inches="tight", pad_inches=0.05)


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("image", help="the image file")
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="pooling.png",
        help="the picture to write, a .png, .jpg or .pdf file (default: %(default)s)",
    )
    photo = parser.add_argument_group("options for a photo")
    photo.add_argument(
        "--kernel",
        nargs="+",
        type=int,
        default=[3, 5],
        metavar="K",
        help="the kernel sizes, which are also the strides (default: 3 5)",
    )
    photo.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"the pooling methods, of {', '.join(METHODS)} (default: all of them)",
    )
    photo.add_argument(
        "--region",
        nargs=4,
        type=int,
        metavar=("X", "Y", "W", "H"),
        help="the region to draw, in pixels (default: the region with the highest contrast)",
    )
    photo.add_argument(
        "--zoom",
        nargs=4,
        type=int,
        metavar=("X", "Y", "W", "H"),
        help="the detail to enlarge, inside the region and in pixels of the image (default: the "
        "detail with the highest contrast)",
    )
    photo.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="the pixel value of white; the larger it is, the closer SoftPool is to max pooling "
        "(default: %(default)s)",
    )
    photo.add_argument(
        "--alpha",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="ALPHA",
        help="the sharpness of SoftPool, which has a panel for each (default: 1)",
    )
    photo.add_argument(
        "--columns",
        type=int,
        default=6,
        metavar="N",
        help="the number of panels in a row (default: %(default)s)",
    )
    stem = parser.add_argument_group("options for a detector's stem")
    stem.add_argument("--config", help="the config file")
    stem.add_argument("--checkpoint", metavar="FILE", help="the checkpoint of the detector")
    stem.add_argument(
        "--channels",
        type=int,
        default=4,
        metavar="N",
        help="the number of channels to draw (default: %(default)s)",
    )
    cli.add_cfg_options(stem)
    return parser


def main(args):
    check_picture(args.out)
    image = read_image(check_input(args.image, "image"))
    if image is None:
        raise UserError(f"{args.image} is not an image")
    if bool(args.config) != bool(args.checkpoint):
        raise UserError("config and checkpoint must be given together")
    if args.config:
        cfg = load_config(args.config, args.cfg_options)
        shown, activations, pooling = stem_activations(cfg, args.checkpoint, args.image)
        draw_stem(shown, activations, pooling, args.out, args.channels)
    else:
        draw_pooling(
            image,
            args.out,
            args.kernel,
            args.methods,
            args.region,
            args.zoom,
            args.scale,
            args.columns,
            args.alpha,
        )
    print(f"drew {args.out}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
