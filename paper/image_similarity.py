#!/usr/bin/env python
"""Downsamples images by every pooling method and compares them with the originals, as in Tables 1
and 3 of the SoftPool paper.

The tables have the mean SSIM and PSNR (dB) beside the paper's. --csv saves the values of every
image, --plot draws the means.

Example:
  python paper/image_similarity.py photos/ --kernel 2 3 5 --csv photos.csv --plot photos.png

The paper (section 4.2) compares "the original inputs with the downsampled outputs" and does not
state how their sizes are matched. For the pictures its supplement (S1) does: the pooled image is
resized to the original's size by inter-area interpolation, which for an integer factor repeats
every pooled pixel over its window. This is the default here; pixels at the right and lower edges
that no window covers are ignored. The alternative reduces the original to the pooled size by the
same interpolation, which compares with the windows' means: average pooling is then perfect by
construction, which it is not in the paper's tables.

Of all images that are constant over each window, the windows' means have the smallest squared
error: by default no method can have a higher PSNR than average pooling, on any image.
"""

import importlib.util
import itertools
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.registry import MODELS
from rich.progress import track
from torch import Tensor

import tables
from mmsoftpool import cli
from mmsoftpool.errors import UserError
from mmsoftpool.files import check_input, check_output, write_atomically
from mmsoftpool.pictures import check_picture, save_figure
from pooling_methods import METHODS

#: The columns of the rows and of the CSV file.
COLUMNS = dict(
    image=str,
    kernel=int,
    method=str,
    ssim=float,
    psnr=float,
    match=str,
    scale=float,
    expectation=bool,
    seed=int,
)
MATCHES = ("original", "pooled")
_SSIM_WINDOW = 11


def check_methods(methods: Sequence[str], scale: float) -> None:
    """Checks the arguments that :func:`pool_image` and the pictures share.

    Raises:
        UserError: If one of them is out of its range.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"methods must be of {', '.join(METHODS)}, got {method!r}")
    if not scale > 0:
        raise UserError(f"scale must be positive, got {scale}")


def read_image(path) -> Tensor | None:
    """Reads an image file.

    Returns:
        RGB, (1, 3, H, W), float32, values 0 to 1; None if the file is not an image.
    """
    data = np.fromfile(path, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        return None
    return torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None] / 255


def pool_image(
    image: Tensor,
    method: str,
    kernel: int,
    scale: float = 1.0,
    expectation: bool = False,
    seed: int = 0,
    alpha: float = 1.0,
) -> Tensor:
    """Pools an image; trainable methods have their initial weights.

    Args:
        image: (1, 3, H, W), values 0 to 1.
        method: A key of ``METHODS``.
        kernel: Kernel size and stride.
        scale: The value of white that the method sees; the result is divided by it. Only SoftPool
            and Lite-S3DPP depend on it. Defaults to 1.
        expectation: Whether the stochastic methods return their expectation. Defaults to False, a
            random sample.
        seed: Seed of that sample. Defaults to 0.
        alpha: Sharpness of SoftPool. Defaults to 1.

    Returns:
        (1, 3, H // kernel, W // kernel), clipped to 0 to 1 as an image file is.
    """
    sharpness = dict(alpha=alpha) if method == "softpool" else {}
    pool = MODELS.build(dict(METHODS[method], kernel_size=kernel, **sharpness))
    pool.train(method in tables.STOCHASTIC and not expectation)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (pool(image * scale) / scale).clamp(0, 1)


def enlarge(pooled: Tensor, kernel: int) -> Tensor:
    """Inter-area interpolation by an integer factor: every pixel fills its window."""
    return F.interpolate(pooled, scale_factor=kernel, mode="nearest")


def similarity(image: Tensor, pooled: Tensor, kernel: int, match: str = "original") -> dict:
    """SSIM and PSNR between an image and its pooled version.

    SSIM has the settings of Wang et al. (2004), the paper's [41]: an 11×11 Gaussian window with
    sigma 1.5, averaged over the colours. PSNR is in dB, from the mean squared error of all colours.

    Args:
        image: (1, 3, H, W), values 0 to 1.
        pooled: (1, 3, H // kernel, W // kernel).
        kernel: Kernel size and stride of the pooling.
        match: ``'original'`` enlarges the pooled image to the original's size, ``'pooled'`` reduces
            the original. Defaults to ``'original'``.

    Returns:
        ``ssim`` and ``psnr``; PSNR is inf for equal images.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # optional

    covered = image[..., : pooled.shape[2] * kernel, : pooled.shape[3] * kernel]
    if match == "original":
        pair = covered, enlarge(pooled, kernel)
    else:
        pair = F.avg_pool2d(covered, kernel), pooled
    a, b = (x[0].permute(1, 2, 0).double().numpy() for x in pair)
    ssim = structural_similarity(
        a,
        b,
        channel_axis=2,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(a, b, data_range=1)
    return dict(ssim=float(ssim), psnr=float(psnr))


def image_similarity(
    folder,
    kernels: Sequence[int] = tables.KERNELS,
    methods: Sequence[str] = tuple(METHODS),
    match: str = "original",
    scale: float = 1.0,
    expectation: bool = False,
    seed: int = 0,
    csv_file=None,
    resume: bool = False,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Compares every image of a folder with its pooled versions.

    Args:
        folder (str | Path): Folder with images.
        kernels: Kernel sizes, which are the strides too. Defaults to (2, 3, 5).
        methods: Keys of ``METHODS``. Defaults to all.
        match: See :func:`similarity`.
        scale, expectation: See :func:`pool_image`.
        seed: Seeds the random samples, together with an image's name. Defaults to 0.
        csv_file (str | Path): File for the rows, written anew after every image. Defaults to None.
        resume: Whether to keep the rows of ``csv_file`` that have the same settings and add the
            missing ones. Defaults to False, which overwrites the file.

    Returns:
        A row per image, kernel and method with the columns of :data:`COLUMNS`; and the skipped
        files with the reason. An image that is too small for one of the kernels is skipped for all.

    Raises:
        UserError: If an argument is out of its range, the folder has no image that is large
            enough, ``csv_file`` has other contents, or scikit-image is not installed.
        FileNotFoundError: If there is no such folder.
    """
    if importlib.util.find_spec("skimage") is None:
        raise UserError("SSIM and PSNR need scikit-image: pip install scikit-image")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder.absolute()}")
    if match not in MATCHES:
        raise UserError(f"match must be one of {', '.join(MATCHES)}, got {match!r}")
    if min(kernels) < 2:
        raise UserError(f"kernels must be at least 2, got {min(kernels)}")
    check_methods(methods, scale)
    cases = [(k, m) for k in dict.fromkeys(kernels) for m in dict.fromkeys(methods)]
    settings = dict(match=match, scale=scale, expectation=expectation, seed=seed)
    done = {}
    if resume and csv_file is not None and Path(csv_file).exists():
        for row in read_rows(csv_file).to_dict("records"):
            if settings.items() <= row.items():
                done[row["image"], row["kernel"], row["method"]] = row
    # The smallest image that holds SSIM's window, at the size at which the two are compared.
    smallest = max((1 if match == "original" else k) * _SSIM_WINDOW + k - 1 for k, _ in cases)
    keys, skipped = [], {}
    for path in track(sorted(p for p in folder.iterdir() if p.is_file()), "images"):
        wanted = [(path.name, *case) for case in cases]
        missing = [key for key in wanted if key not in done]
        if missing:
            image = read_image(path)
            if image is None:
                skipped[path.name] = "not an image"
                continue
            height, width = image.shape[2:]
            if min(height, width) < smallest:
                skipped[path.name] = (
                    f"{width} x {height} pixels, must be at least {smallest} x {smallest}"
                )
                continue
        for name, kernel, method in missing:
            image_seed = seed + zlib.crc32(name.encode())
            pooled = pool_image(image, method, kernel, scale, expectation, image_seed)
            values = similarity(image, pooled, kernel, match)
            row = dict(image=name, kernel=kernel, method=method, **values, **settings)
            done[name, kernel, method] = row
        if missing and csv_file is not None:
            with write_atomically(csv_file) as temporary:
                pd.DataFrame(done.values()).to_csv(temporary, index=False)
        keys += wanted
    if not keys:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise UserError(f"no image to compare in {folder.absolute()} ({reasons or 'empty'})")
    return pd.DataFrame([done[key] for key in keys]), skipped


def read_rows(path) -> pd.DataFrame:
    """Reads the rows of :func:`image_similarity` from its file.

    Raises:
        UserError: If the file has other contents.
    """
    try:
        rows = pd.read_csv(
            check_input(path, "CSV file"),
            float_precision="round_trip",
            dtype=COLUMNS,
            keep_default_na=False,
        )
        if list(rows) != list(COLUMNS):
            raise ValueError(f"the first line has the columns {list(rows)}")
        return rows
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by image_similarity and cannot be resumed: {error}"
        ) from error


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the images by kernel and method, in the order of the rows."""
    return rows.groupby(["kernel", "method"], sort=False)[list(tables.METRICS)].mean()


def ranks(values: pd.Series) -> pd.Series:
    """Ranks, 1 for the largest value; values equal to 4 decimals share a rank."""
    return values.round(4).rank(ascending=False, method="min").astype(int)


def of_the_paper(methods: Iterable[str], kernel: int) -> pd.DataFrame:
    """The paper's numbers, a column for each data set and metric; none for other kernels."""
    columns = itertools.product(tables.SIMILARITY, tables.METRICS)
    columns = list(columns) if kernel in tables.KERNELS else []
    numbers = {
        (dataset, metric): [tables.similarity(dataset, m, kernel, metric) for m in methods]
        for dataset, metric in columns
    }
    return pd.DataFrame(numbers, index=list(methods))


def compare_with_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Compares the order of the methods on these images with the paper's.

    Returns:
        A row per kernel and metric: ``low`` and ``high``, the range over the data sets of
        Spearman's correlation with the paper's values (for the paper's kernels and three or more
        methods); and, with both SoftPool and average pooling, ``rank``, SoftPool's, ``difference``,
        the mean of SoftPool minus average, and ``better``, the number of ``images`` on which
        SoftPool is higher.
    """
    result = {}
    for (kernel, group), metric in itertools.product(
        rows.groupby("kernel", sort=False), tables.METRICS
    ):
        values = group.pivot(index="image", columns="method", values=metric)
        ours = values.mean().round(4)
        row = result[kernel, metric] = {}
        if len(ours) > 2 and kernel in tables.KERNELS:
            theirs = of_the_paper(ours.index, kernel).xs(metric, axis=1, level=1)
            correlation = theirs.corrwith(ours, method="spearman")
            row.update(low=correlation.min(), high=correlation.max())
        if {"softpool", "average"} <= set(ours.index):
            difference = values["softpool"] - values["average"]
            row.update(rank=ranks(ours)["softpool"], difference=difference.mean())
            row.update(better=(difference > 0).sum(), images=len(values))
    return pd.DataFrame.from_dict(result, orient="index")


def plot(rows: pd.DataFrame, path, title: str = "these images") -> None:
    """Draws the means (dots) over the range of the paper's data sets (bars), one panel per kernel.

    Args:
        rows: From :func:`image_similarity`.
        path (str | Path): Picture file.
        title: Name of the images in the legend. Defaults to ``'these images'``.
    """
    table = means(rows)
    kernels = table.index.unique("kernel")
    figure = Figure((2.6 * len(kernels) + 1.2, 6.2), layout="constrained")
    grid = figure.subplots(2, len(kernels), squeeze=False, sharex="row", sharey=True)
    panels = itertools.product(enumerate(tables.METRICS), enumerate(kernels))
    for (i, metric), (j, kernel) in panels:
        axes, ours = grid[i, j], table.loc[kernel][metric]
        colours = ["tab:red" if method == "softpool" else "tab:blue" for method in ours.index]
        theirs = of_the_paper(ours.index, kernel)
        if not theirs.empty:
            theirs = theirs.xs(metric, axis=1, level=1)
            style = dict(lw=5, color="0.8", zorder=0, label="the paper's data sets")
            axes.hlines(ours.index, theirs.min(axis=1), theirs.max(axis=1), **style)
        axes.scatter(ours, ours.index, s=25, c=colours, label=title)
        axes.set_title(f"{kernel} x {kernel}", fontsize=9)
        axes.set_xlabel({"ssim": "SSIM", "psnr": "PSNR (dB)"}[metric])
        axes.grid(alpha=0.3)
    grid[0, 0].invert_yaxis()
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


def show(rows: pd.DataFrame) -> None:
    """Prints a table of the means for each kernel, and how they compare with the paper's."""
    images = rows["image"].nunique()
    for kernel, ours in means(rows).groupby("kernel", sort=False):
        ours = ours.droplevel("kernel")
        columns = {}
        for metric in tables.METRICS:
            columns["these images", metric] = ours[metric]
            columns["these images", f"{metric} rank"] = ranks(ours[metric])
        table = pd.DataFrame({**columns, **of_the_paper(ours.index, kernel)}).rename_axis(None)
        table = table.rename(lambda m: f"{m}*" if m in tables.TRAINABLE else m)
        print(f"\nkernel and stride {kernel}, {images} images")
        print(table.to_string(float_format="{:.3f}".format))
    print("\n* with untrained weights. The named data sets: Tables 1 and 3 of the paper.")
    comparison = compare_with_paper(rows)
    if comparison.size:
        print("\nLow and high: rank correlation with these. Then: SoftPool beside average pooling.")
        print(comparison.to_string(float_format="{:+.4f}".format, na_rep=""))


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("folder", help="the folder with the images")
    parser.add_argument(
        "--kernel",
        nargs="+",
        type=int,
        default=[2, 3, 5],
        metavar="K",
        help="the kernel sizes, which are also the strides (default: 2 3 5)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"the pooling methods, of {', '.join(METHODS)} (default: all of them)",
    )
    parser.add_argument(
        "--match",
        choices=["original", "pooled"],
        default="original",
        help="the size at which the images are compared: original enlarges the pooled image by "
        "area interpolation, as in the paper's supplement S1; pooled reduces the original image "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="the pixel value of white; with 255, SoftPool is nearly max pooling "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--expectation",
        action="store_true",
        help="use the expectation of the methods stochastic and s3 instead of one draw",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the seed of the draws (default: %(default)s)"
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="save the values of every image to this CSV file"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the values of an interrupted run in the CSV file and compute the missing ones",
    )
    parser.add_argument("--plot", metavar="FILE", help="save a picture of the means to this file")
    return parser


def main(args):
    if args.csv:
        check_output(args.csv)
    if args.plot:
        check_picture(args.plot)
    if args.resume and not args.csv:
        raise UserError("resume needs csv, the file of the interrupted run")
    rows, skipped = image_similarity(
        args.folder,
        args.kernel,
        args.methods,
        args.match,
        args.scale,
        args.expectation,
        args.seed,
        args.csv,
        args.resume,
    )
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    show(rows)
    if args.csv:
        print(f"wrote {args.csv}")
    if args.plot:
        plot(rows, args.plot, os.path.basename(os.path.normpath(args.folder)))
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
