#!/usr/bin/env python
"""Downsamples images by every pooling method and compares them with the originals, as in Table 1 of
the SoftPool paper.

The tables have the mean SSIM and PSNR (dB) beside the paper's. --csv saves the values of every
image, --plot draws the means.

Example: python tools/image_similarity.py photos/ --kernel 2 3 5 --csv photos.csv --plot photos.png
"""

import os

import cli


def format_value(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if metric == "ssim" else f"{value:.2f}"


def show(rows: list[dict]) -> None:
    """Prints a table of the means for each kernel, and how they compare with the paper's."""
    from rich.console import Console
    from rich.table import Table

    from mmsoftpool.analysis import paper, similarity

    console = Console(width=None if os.isatty(1) else 160)
    table = similarity.means(rows)
    comparison = similarity.compare_with_paper(rows)
    images = len({row["image"] for row in rows})
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        places = {row["metric"]: row["places"] for row in comparison if row["kernel"] == kernel}
        screen = Table(title=f"kernel and stride {kernel}, {images} images", title_justify="left")
        screen.add_column("method")
        for name in ("SSIM", "rank", "PSNR", "rank"):
            screen.add_column(name, justify="right", style="bold" if name != "rank" else None)
        for dataset in paper.SIMILARITY:
            for metric in paper.METRICS:
                screen.add_column(f"{dataset}\n{metric.upper()}", justify="right", style="dim")
        for (k, method), values in table.items():
            if k != kernel:
                continue
            cells = [method + ("*" if method in paper.TRAINABLE else "")]
            for metric in paper.METRICS:
                cells += [format_value(values[metric], metric), str(places[metric][method])]
            cells += [
                format_value(paper.similarity(dataset, method, kernel, metric), metric)
                for dataset in paper.SIMILARITY
                for metric in paper.METRICS
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
        choices=cli.METHODS,
        default=cli.METHODS,
        metavar="METHOD",
        help=f"the pooling methods, of {', '.join(cli.METHODS)} (default: all of them)",
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
    from mmsoftpool.analysis import similarity
    from mmsoftpool.files import check_output
    from mmsoftpool.visualization import check_picture

    if args.csv:
        check_output(args.csv)
    if args.plot:
        check_picture(args.plot)
    if args.resume and not args.csv:
        raise ValueError("resume needs csv, the file of the interrupted run")
    rows, skipped = similarity.image_similarity(
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
        similarity.plot(rows, args.plot, os.path.basename(os.path.normpath(args.folder)))
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    cli.run(main, make_parser())
