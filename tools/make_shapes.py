#!/usr/bin/env python
"""Draws a small detection data set in COCO format: textured shapes with boxes and masks.

Example: python tools/make_shapes.py data/shapes
"""

from mmsoftpool import cli
from mmsoftpool.datasets.shapes import make_shapes


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("root", help="folder for the data set")
    for name, default, help in (
        ("train", 800, "number of training images"),
        ("val", 100, "number of validation images"),
        ("size", 160, "height and width of the images in pixels, at least 64"),
        ("seed", 0, "seed: the same seed draws the same images"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{help} (default: %(default)s)"
        )
    return parser


def main(args):
    make_shapes(**vars(args))


if __name__ == "__main__":
    cli.run(main, make_parser())
