"""How much of an image is left after pooling: SSIM and PSNR, as in the paper's Tables 1 and 3.

The paper (section 4.2) compares "the original inputs with the downsampled outputs" and does not say
how their sizes are matched. Its supplement (S1) does for the pictures: inter-area interpolation of
the pooled image to the original's size, which for a whole factor repeats every pooled pixel over
its window. That is done here by default; pixels at the right and lower edge that no window covers
are left out. The other reading, the original reduced to the pooled size by the same interpolation,
compares with the windows' means: average pooling is then perfect by construction, which it is not
in the paper's tables.

Among all images that are constant on each window, that of the windows' means has the smallest
squared error: by default no method can have a higher PSNR than average pooling, on any image.
"""

import contextlib
import csv
import importlib.util
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from rich.progress import track
from scipy import stats
from torch import Tensor

from ..models.pooling_methods import METHODS

#: SSIM and PSNR for kernels 2, 3 and 5, from Table 1 and (Flickr2K) Table 3 of the paper.
PAPER = {
    "DIV2K": {
        "average": (0.714, 51.247, 0.578, 44.704, 0.417, 29.223),
        "maximum": (0.685, 49.826, 0.370, 41.944, 0.358, 22.041),
        "power-average": (0.419, 35.587, 0.286, 26.329, 0.178, 16.567),
        "sum": (0.408, 35.153, 0.268, 26.172, 0.193, 17.315),
        "lp": (0.686, 49.912, 0.542, 43.083, 0.347, 25.139),
        "gate": (0.689, 50.104, 0.560, 43.437, 0.353, 25.672),
        "lite-s3dpp": (0.702, 50.598, 0.562, 44.076, 0.396, 27.421),
        "lip": (0.711, 50.831, 0.559, 44.432, 0.401, 28.285),
        "stochastic": (0.631, 45.362, 0.479, 39.895, 0.295, 21.314),
        "s3": (0.609, 44.760, 0.454, 39.326, 0.280, 20.773),
        "softpool": (0.729, 51.436, 0.594, 44.747, 0.421, 29.583),
    },
    "Urban100": {
        "average": (0.691, 50.380, 0.563, 41.745, 0.372, 28.270),
        "maximum": (0.662, 48.266, 0.528, 40.709, 0.330, 20.654),
        "power-average": (0.312, 31.911, 0.219, 24.698, 0.124, 15.659),
        "sum": (0.301, 31.657, 0.208, 24.735, 0.123, 15.243),
        "lp": (0.676, 48.508, 0.534, 39.986, 0.326, 26.365),
        "gate": (0.675, 49.769, 0.537, 40.422, 0.328, 26.731),
        "lite-s3dpp": (0.684, 49.947, 0.551, 40.813, 0.365, 27.136),
        "lip": (0.689, 50.266, 0.558, 41.159, 0.370, 27.849),
        "stochastic": (0.616, 44.342, 0.463, 37.223, 0.286, 19.358),
        "s3": (0.608, 44.239, 0.459, 36.965, 0.272, 19.645),
        "softpool": (0.694, 50.687, 0.578, 41.851, 0.394, 28.326),
    },
    "Manga109": {
        "average": (0.695, 54.326, 0.582, 43.657, 0.396, 29.862),
        "maximum": (0.671, 50.085, 0.544, 41.128, 0.324, 22.307),
        "power-average": (0.381, 29.248, 0.276, 18.874, 0.160, 9.266),
        "sum": (0.374, 30.169, 0.271, 20.150, 0.168, 13.081),
        "lp": (0.675, 51.721, 0.561, 41.824, 0.367, 27.469),
        "gate": (0.679, 51.980, 0.569, 42.127, 0.374, 27.754),
        "lite-s3dpp": (0.691, 52.646, 0.573, 42.794, 0.386, 28.598),
        "lip": (0.689, 53.537, 0.579, 43.018, 0.391, 29.331),
        "stochastic": (0.583, 46.274, 0.427, 39.259, 0.255, 22.953),
        "s3": (0.576, 46.613, 0.426, 39.866, 0.232, 23.242),
        "softpool": (0.704, 54.563, 0.586, 43.782, 0.403, 30.114),
    },
    "Flickr2K": {
        "average": (0.709, 51.786, 0.572, 44.246, 0.408, 28.957),
        "maximum": (0.674, 47.613, 0.385, 40.735, 0.329, 21.368),
        "power-average": (0.392, 34.319, 0.271, 26.820, 0.163, 15.453),
        "sum": (0.386, 34.173, 0.265, 26.259, 0.161, 15.218),
        "lp": (0.683, 48.617, 0.437, 42.079, 0.341, 24.432),
        "gate": (0.687, 49.314, 0.449, 42.722, 0.358, 25.687),
        "lite-s3dpp": (0.691, 50.586, 0.534, 43.608, 0.385, 27.430),
        "lip": (0.696, 50.947, 0.548, 43.882, 0.390, 28.134),
        "stochastic": (0.625, 46.714, 0.474, 38.365, 0.264, 21.428),
        "s3": (0.611, 46.547, 0.476, 37.706, 0.252, 21.363),
        "softpool": (0.721, 52.356, 0.587, 44.893, 0.416, 29.341),
    },
}
_PAPER_KERNELS = (2, 3, 5)
#: What the paper calls trainable; here they have their weights from before training.
TRAINABLE = ("lp", "gate", "lite-s3dpp", "lip")
#: What the paper calls stochastic; they are drawn at random, as in training.
STOCHASTIC = ("stochastic", "s3")
METRICS = ("ssim", "psnr")
MATCHES = ("original", "pooled")
_SSIM_WINDOW = 11


def paper_value(dataset: str, method: str, kernel: int, metric: str) -> float | None:
    """A number of the paper's tables, or None for a kernel that they do not have."""
    if kernel not in _PAPER_KERNELS:
        return None
    return PAPER[dataset][method][2 * _PAPER_KERNELS.index(kernel) + METRICS.index(metric)]


def read_image(path) -> Tensor | None:
    """An image file as (1, 3, H, W) RGB of 0 to 1 in float32, or None if it is none."""
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
) -> Tensor:
    """Pools an image by a method with its weights from before training.

    Args:
        image: (1, 3, H, W), values 0 to 1.
        method: A key of ``METHODS``.
        kernel: Kernel size and stride.
        scale: The value that white has for the method; what it gives is divided by it again. Only
            SoftPool and Lite-S3DPP depend on it. Defaults to 1.
        expectation: Whether the stochastic methods give their expectation. Defaults to False, one
            draw.
        seed: Seed of that draw. Defaults to 0.

    Returns:
        (1, 3, H // kernel, W // kernel), clipped to 0 to 1 as an image file is.
    """
    pool = MODELS.build(dict(METHODS[method], kernel_size=kernel))
    pool.train(method in STOCHASTIC and not expectation)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (pool(image * scale) / scale).clamp(0, 1)


def enlarge(pooled: Tensor, kernel: int) -> Tensor:
    """Inter-area interpolation by a whole factor: every pixel fills its window."""
    return F.interpolate(pooled, scale_factor=kernel, mode="nearest")


def similarity(image: Tensor, pooled: Tensor, kernel: int, match: str = "original") -> dict:
    """SSIM and PSNR between an image and what pooling left of it.

    SSIM has the settings of Wang et al. (2004), the paper's [41]: an 11×11 Gaussian window of sigma
    1.5, the mean over the colours. PSNR is in dB, from the squared error over all colours.

    Args:
        image: (1, 3, H, W), values 0 to 1.
        pooled: (1, 3, H // kernel, W // kernel).
        kernel: Kernel size and stride of the pooling.
        match: ``'original'``, the pooled image is enlarged to the original's size, or ``'pooled'``,
            the original is reduced. Defaults to ``'original'``.

    Returns:
        ``ssim`` and ``psnr``; PSNR is inf for equal images.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # an extra

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
    kernels: Sequence[int] = _PAPER_KERNELS,
    methods: Sequence[str] = tuple(METHODS),
    match: str = "original",
    scale: float = 1.0,
    expectation: bool = False,
    seed: int = 0,
    csv_file=None,
    resume: bool = False,
) -> tuple[list[dict], dict[str, str]]:
    """Compares every image of a folder with itself after pooling, by every method.

    Args:
        folder (str | Path): Folder with images.
        kernels: Kernel sizes, which are the strides too. Defaults to (2, 3, 5).
        methods: Keys of ``METHODS``. Defaults to all.
        match: See :func:`similarity`.
        scale, expectation: See :func:`pool_image`.
        seed: With an image's name, it seeds the draws for that image. Defaults to 0.
        csv_file (str | Path): File that gets the rows, image by image. Defaults to None.
        resume: Whether to take the rows of ``csv_file`` that have these settings as they are, and
            add what is missing. Defaults to False, a new file.

    Returns:
        A row per image, kernel and method with ``image``, ``kernel``, ``method``, ``ssim``,
        ``psnr`` and the settings; and the files that were left out, with the reason. An image that
        is too small for one of the kernels is left out for all.

    Raises:
        ValueError: If the folder is missing, no image is left, or scikit-image is not installed.
    """
    if importlib.util.find_spec("skimage") is None:
        raise ValueError("SSIM and PSNR need scikit-image: pip install scikit-image")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder.absolute()}")
    if min(kernels) < 2:
        raise ValueError(f"kernel must be at least 2, got {min(kernels)}")
    cases = [(k, m) for k in dict.fromkeys(kernels) for m in dict.fromkeys(methods)]
    settings = dict(match=match, scale=scale, expectation=expectation, seed=seed)
    done = {}
    if resume and csv_file is not None and Path(csv_file).exists():
        for row in read_csv(csv_file):
            if settings.items() <= row.items():
                done[row["image"], row["kernel"], row["method"]] = row
    # The smallest image in which SSIM's window fits where the two are compared.
    needed = max((1 if match == "original" else k) * _SSIM_WINDOW + k - 1 for k, _ in cases)
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
                if min(height, width) < needed:
                    skipped[path.name] = (
                        f"{width} x {height} pixels, at least {needed} a side are needed"
                    )
                    continue
                if writer is None:  # only now: no mistake above touches an earlier file
                    file = stack.enter_context(_open_csv(csv_file, done.values()))
                    writer = csv.DictWriter(file, _COLUMNS)
            for name, kernel, method in missing:
                draw = seed + zlib.crc32(name.encode())
                pooled = pool_image(image, method, kernel, scale, expectation, draw)
                values = similarity(image, pooled, kernel, match)
                row = dict(image=name, kernel=kernel, method=method, **values, **settings)
                done[name, kernel, method] = row
                writer.writerow(row)
                file.flush()
            rows += [done[key] for key in keys]
    if not rows:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"no image to compare in {folder.absolute()} ({reasons or 'it is empty'})")
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
    """The file ``path`` with ``rows`` in it, to be appended to; never without them, if killed."""
    if path is None:
        return open(os.devnull, "w")
    unfinished = f"{path}.unfinished"
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)
    return open(path, "a", newline="")


def read_csv(path) -> list[dict]:
    """Rows of :func:`image_similarity` from its file; an unfinished last line is left out.

    Raises:
        ValueError: If it is another file.
    """
    rows = []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(_COLUMNS):
            raise ValueError(f"{path} is not a file of image_similarity, so it cannot be resumed")
        for row in reader:
            if all(row.values()):
                rows.append({key: read(row[key]) for key, read in _COLUMNS.items()})
    return rows


def means(rows: list[dict]) -> dict[tuple[int, str], dict[str, float]]:
    """The means over the images, by (kernel, method), in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["method"]), []).append(row)
    return {
        key: {metric: float(np.mean([row[metric] for row in group])) for metric in METRICS}
        for key, group in groups.items()
    }


def ranks(values: dict[str, float]) -> dict[str, int]:
    """The place of each method, 1 for the largest; equal to 4 decimals is equal."""
    places = stats.rankdata([-round(v, 4) for v in values.values()], "min")
    return dict(zip(values, map(int, places), strict=True))


def compare_with_paper(rows: list[dict]) -> list[dict]:
    """Whether the paper's order of methods holds on these images.

    Returns:
        A row per kernel and metric: ``correlation``, Spearman's with the paper's order by data set
        (for kernels and three or more methods that the paper has); and, where SoftPool was compared
        with average pooling, ``difference``, the mean of SoftPool minus average, and ``better``, on
        how many of ``images`` SoftPool is the higher one.
    """
    result = []
    table = means(rows)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        for metric in METRICS:
            ours = {m: round(v[metric], 4) for (k, m), v in table.items() if k == kernel}
            row = dict(kernel=kernel, metric=metric, places=ranks(ours))
            if len(ours) > 2 and kernel in _PAPER_KERNELS:
                row["correlation"] = {
                    dataset: float(
                        stats.spearmanr(
                            list(ours.values()),
                            [paper_value(dataset, m, kernel, metric) for m in ours],
                        ).statistic
                    )
                    for dataset in PAPER
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
    """Draws the means (dots) over the range of the paper's data sets (bars), a panel per kernel.

    Args:
        rows: From :func:`image_similarity`.
        path (str | Path): Picture file.
        title: What the images are called in the legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = means(rows)
    kernels = list(dict.fromkeys(kernel for kernel, _ in table))
    methods = list(dict.fromkeys(method for _, method in table))
    figure, grid = plt.subplots(
        2,
        len(kernels),
        figsize=(2.6 * len(kernels) + 1.2, 6.2),
        squeeze=False,
        sharex="row",
        sharey=True,
        layout="constrained",
    )
    for (i, metric), (j, kernel) in (
        (a, b) for a in enumerate(METRICS) for b in enumerate(kernels)
    ):
        axes = grid[i, j]
        for y, method in enumerate(methods):
            colour = "tab:red" if method == "softpool" else "tab:blue"
            value = table[kernel, method][metric]
            if np.isfinite(value):
                label = title if (i, j, y) == (0, 0, 0) else None
                axes.plot(value, y, "o", color=colour, ms=5, label=label)
            if kernel in _PAPER_KERNELS:
                theirs = [paper_value(dataset, method, kernel, metric) for dataset in PAPER]
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
    figure.savefig(path, dpi=150)
    plt.close(figure)
