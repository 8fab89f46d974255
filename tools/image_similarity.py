#!/usr/bin/env python
"""Downsamples images by every pooling method and compares them with the originals, as in Table 1 of
the SoftPool paper: mean SSIM and PSNR (dB) beside the paper's, per image in a CSV file, as a plot.

Example: python tools/image_similarity.py photos/ --kernel 2 3 5 --csv photos.csv --plot photos.png
"""

import os

from rich.console import Console
from rich.table import Table

from mmsoftpool import cli
from mmsoftpool.analysis import paper, similarity
from mmsoftpool.models.pooling_methods import METHODS


def number(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if metric == "ssim" else f"{value:.2f}"


def show(rows: list[dict], console: Console) -> None:
    table = similarity.means(rows)
    comparison = similarity.compare_with_paper(rows)
    images = len({row["image"] for row in rows})
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        places = {row["metric"]: row["places"] for row in comparison if row["kernel"] == kernel}
        screen = Table(title=f"kernel and stride {kernel}, {images} images", title_justify="left")
        screen.add_column("method")
        for name in ("SSIM", "place", "PSNR", "place"):
            screen.add_column(name, justify="right", style="bold" if name != "place" else None)
        for dataset in paper.SIMILARITY:
            for metric in paper.METRICS:
                screen.add_column(f"{dataset}\n{metric.upper()}", justify="right", style="dim")
        for (k, method), values in table.items():
            if k != kernel:
                continue
            cells = [method + ("*" if method in paper.TRAINABLE else "")]
            for metric in paper.METRICS:
                cells += [number(values[metric], metric), str(places[metric][method])]
            cells += [
                number(paper.similarity(dataset, method, kernel, metric), metric)
                for dataset in paper.SIMILARITY
                for metric in paper.METRICS
            ]
            screen.add_row(*cells)
        console.print(screen)
    console.print("* with its weights from before training. Dim: Tables 1 and 3 of the paper.")
    for row in comparison:
        text = f"k = {row['kernel']}, {row['metric'].upper()}:"
        if "correlation" in row:
            low, high = min(row["correlation"].values()), max(row["correlation"].values())
            text += f" rank correlation with the paper's data sets {low:.2f} to {high:.2f};"
        if "difference" in row:
            place = row["places"]["softpool"]
            text += (
                f" SoftPool has place {place} of {len(row['places'])} (the paper: 1), "
                f"{row['difference']:+.4f} against average pooling, "
                f"higher on {row['better']} of {row['images']} images"
            )
        if not text.endswith(":"):
            print(text)


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("folder", help="folder with images")
    parser.add_argument(
        "--kernel", nargs="+", type=int, default=[2, 3, 5], help="kernel sizes and strides"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--match", choices=similarity.MATCHES, default="original",
        help="at which size the two are compared: the original's, to which the pooled image is "
        "enlarged by area interpolation as in the paper's supplement S1, or the pooled one, to "
        "which the original is reduced (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=float, default=1.0,
        help="value of white for the methods; with 255 SoftPool is nearly max pooling "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--expectation", action="store_true",
        help="take the expectation of stochastic and s3 instead of one draw",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--csv", metavar="FILE", help="file for the values of every image")
    parser.add_argument(
        "--resume", action="store_true",
        help="keep what --csv has already with the same settings, and add what is missing",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="picture of the means")
    return parser


def main(args):
    if args.scale <= 0:
        raise ValueError(f"--scale must be positive, got {args.scale}")
    for path in filter(None, (args.csv, args.plot)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ValueError(f"no folder {os.path.dirname(path)} to write {path} into")
    if args.resume and not args.csv:
        raise ValueError("--resume needs --csv, the file of the run that goes on")
    rows, skipped = similarity.image_similarity(
        args.folder, args.kernel, args.methods, args.match, args.scale, args.expectation, args.seed,
        args.csv, args.resume,
    )  # fmt: skip
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    show(rows, Console(width=None if os.isatty(1) else 160))
    if args.csv:
        print(f"wrote {args.csv}")
    if args.plot:
        similarity.plot(rows, args.plot, os.path.basename(os.path.normpath(args.folder)))
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    cli.run(main, make_parser())
