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

import contextlib
import csv
import importlib.util
import io
import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.registry import MODELS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats
from torch import Tensor

import tables
from mmsoftpool import cli
from mmsoftpool.errors import UserError
from mmsoftpool.files import check_output, read_text, write_atomically
from mmsoftpool.models.pooling_methods import METHODS
from mmsoftpool.pictures import check_picture, save_figure

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
) -> tuple[list[dict], dict[str, str]]:
    """Compares every image of a folder with its pooled versions.

    Args:
        folder (str | Path): Folder with images.
        kernels: Kernel sizes, which are the strides too. Defaults to (2, 3, 5).
        methods: Keys of ``METHODS``. Defaults to all.
        match: See :func:`similarity`.
        scale, expectation: See :func:`pool_image`.
        seed: Seeds the random samples, together with an image's name. Defaults to 0.
        csv_file (str | Path): File for the rows, written image by image. Defaults to None.
        resume: Whether to keep the rows of ``csv_file`` that have the same settings and add the
            missing ones. Defaults to False, which overwrites the file.

    Returns:
        A row per image, kernel and method with ``image``, ``kernel``, ``method``, ``ssim``,
        ``psnr`` and the settings; and the skipped files with the reason. An image that is too small
        for one of the kernels is skipped for all.

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
        for row in read_csv(csv_file):
            if settings.items() <= row.items():
                done[row["image"], row["kernel"], row["method"]] = row
    # The smallest image that holds SSIM's window, at the size at which the two are compared.
    smallest = max((1 if match == "original" else k) * _SSIM_WINDOW + k - 1 for k, _ in cases)
    rows, skipped, writer = [], {}, None
    with contextlib.ExitStack() as stack:
        for path in track(sorted(p for p in folder.iterdir() if p.is_file()), "images"):
            keys = [(path.name, *case) for case in cases]
            missing = [key for key in keys if key not in done]
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
                if writer is None:  # only now, so that an error above keeps the earlier file
                    file = stack.enter_context(_open_csv(csv_file, done.values()))
                    writer = csv.DictWriter(file, _COLUMNS)
            for name, kernel, method in missing:
                image_seed = seed + zlib.crc32(name.encode())
                pooled = pool_image(image, method, kernel, scale, expectation, image_seed)
                values = similarity(image, pooled, kernel, match)
                row = dict(image=name, kernel=kernel, method=method, **values, **settings)
                done[name, kernel, method] = row
                writer.writerow(row)
                file.flush()
            rows += [done[key] for key in keys]
    if not rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise UserError(f"no image to compare in {folder.absolute()} ({reasons or 'empty'})")
    return rows, skipped


_COLUMNS = dict(
    image=str,
    kernel=int,
    method=str,
    ssim=float,
    psnr=float,
    match=str,
    scale=float,
    expectation=lambda text: text == "True",
    seed=int,
)


def _open_csv(path, rows):
    """Writes ``rows`` to the file ``path``, in one step, and opens it to append more."""
    if path is None:
        return open(os.devnull, "w")
    with write_atomically(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return open(path, "a", newline="")


def read_csv(path) -> list[dict]:
    """Reads the rows of :func:`image_similarity` from its file, but for an incomplete last line.

    Raises:
        UserError: If the file has other contents.
    """
    text = read_text(path, "CSV file").rpartition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if reader.fieldnames != list(_COLUMNS):
            raise UserError(f"the first line has the columns {reader.fieldnames}")
        return [{key: read(row[key]) for key, read in _COLUMNS.items()} for row in reader]
    except (csv.Error, TypeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by image_similarity and cannot be resumed: {error}"
        ) from error


def means(rows: list[dict]) -> dict[tuple[int, str], dict[str, float]]:
    """Means over the images by (kernel, method), in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["method"]), []).append(row)
    return {
        key: {metric: float(np.mean([row[metric] for row in group])) for metric in tables.METRICS}
        for key, group in groups.items()
    }


def ranks(values: dict[str, float]) -> dict[str, int]:
    """Ranks of the methods, 1 for the largest value; values equal to 4 decimals share a rank."""
    places = stats.rankdata([-round(v, 4) for v in values.values()], "min")
    return dict(zip(values, map(int, places), strict=True))


def compare_with_paper(rows: list[dict]) -> list[dict]:
    """Compares the order of the methods on these images with the paper's.

    Returns:
        A row per kernel and metric: ``places``, the ranks of the methods; ``correlation``,
        Spearman's with the paper's values by data set (for the paper's kernels and three or more
        methods); and, with both SoftPool and average pooling, ``difference``, the mean of SoftPool
        minus average, and ``better``, the number of ``images`` on which SoftPool is higher.
    """
    result = []
    table = means(rows)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        for metric in tables.METRICS:
            ours = {m: round(v[metric], 4) for (k, m), v in table.items() if k == kernel}
            row = dict(kernel=kernel, metric=metric, places=ranks(ours))
            if len(ours) > 2 and kernel in tables.KERNELS:
                row["correlation"] = {
                    dataset: float(
                        stats.spearmanr(
                            list(ours.values()),
                            [tables.similarity(dataset, m, kernel, metric) for m in ours],
                        ).statistic
                    )
                    for dataset in tables.SIMILARITY
                }
            if {"softpool", "average"} <= ours.keys():
                soft, average = (
                    np.array(
                        [r[metric] for r in rows if (r["kernel"], r["method"]) == (kernel, method)]
                    )
                    for method in ("softpool", "average")
                )
                row["difference"] = float(np.mean(soft - average))
                row["better"], row["images"] = int((soft > average).sum()), len(soft)
            result.append(row)
    return result


def plot(rows: list[dict], path, title: str = "these images") -> None:
    """Draws the means (dots) over the range of the paper's data sets (bars), one panel per kernel.

    Args:
        rows: From :func:`image_similarity`.
        path (str | Path): Picture file.
        title: Name of the images in the legend. Defaults to ``'these images'``.
    """
    table = means(rows)
    kernels = list(dict.fromkeys(kernel for kernel, _ in table))
    methods = list(dict.fromkeys(method for _, method in table))
    figure = Figure((2.6 * len(kernels) + 1.2, 6.2), layout="constrained")
    grid = figure.subplots(2, len(kernels), squeeze=False, sharex="row", sharey=True)
    for (i, metric), (j, kernel) in itertools.product(
        enumerate(tables.METRICS), enumerate(kernels)
    ):
        axes = grid[i, j]
        for y, method in enumerate(methods):
            colour = "tab:red" if method == "softpool" else "tab:blue"
            value = table[kernel, method][metric]
            if np.isfinite(value):
                label = title if (i, j, y) == (0, 0, 0) else None
                axes.plot(value, y, "o", color=colour, ms=5, label=label)
            if kernel in tables.KERNELS:
                theirs = [
                    tables.similarity(dataset, method, kernel, metric)
                    for dataset in tables.SIMILARITY
                ]
                label = "the paper's data sets" if (i, j, y) == (0, 0, 0) else None
                axes.plot(
                    [min(theirs), max(theirs)], [y, y], lw=5, color="0.8", zorder=0, label=label
                )
        axes.set_yticks(range(len(methods)), methods)
        axes.set_title(f"{kernel} x {kernel}", fontsize=9)
        axes.set_xlabel({"ssim": "SSIM", "psnr": "PSNR (dB)"}[metric])
        axes.grid(alpha=0.3)
    grid[0, 0].invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


def format_value(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if metric == "ssim" else f"{value:.2f}"


def show(rows: list[dict]) -> None:
    """Prints a table of the means for each kernel, and how they compare with the paper's."""
    console = Console(width=None if os.isatty(1) else 160)
    table = means(rows)
    comparison = compare_with_paper(rows)
    images = len({row["image"] for row in rows})
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        places = {row["metric"]: row["places"] for row in comparison if row["kernel"] == kernel}
        screen = Table(title=f"kernel and stride {kernel}, {images} images", title_justify="left")
        screen.add_column("method")
        for name in ("SSIM", "rank", "PSNR", "rank"):
            screen.add_column(name, justify="right", style="bold" if name != "rank" else None)
        for dataset in tables.SIMILARITY:
            for metric in tables.METRICS:
                screen.add_column(f"{dataset}\n{metric.upper()}", justify="right", style="dim")
        for (k, method), values in table.items():
            if k != kernel:
                continue
            cells = [method + ("*" if method in tables.TRAINABLE else "")]
            for metric in tables.METRICS:
                cells += [format_value(values[metric], metric), str(places[metric][method])]
            cells += [
                format_value(tables.similarity(dataset, method, kernel, metric), metric)
                for dataset in tables.SIMILARITY
                for metric in tables.METRICS
            ]
            screen.add_row(*cells)
        console.print(screen)
    console.print("* with untrained weights. Dim: Tables 1 and 3 of the paper.")
    for row in comparison:
        text = f"k = {row['kernel']}, {row['metric'].upper()}:"
        if "correlation" in row:
            low, high = min(row["correlation"].values()), max(row["correlation"].values())
            text += f" rank correlation with the paper's data sets {low:.2f} to {high:.2f};"
        if "difference" in row:
            place = row["places"]["softpool"]
            text += (
                f" SoftPool has rank {place} of {len(row['places'])} (the paper: 1), "
                f"{row['difference']:+.4f} against average pooling, "
                f"higher on {row['better']} of {row['images']} images"
            )
        if not text.endswith(":"):
            print(text)


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
