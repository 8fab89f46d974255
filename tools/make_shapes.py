#!/usr/bin/env python
"""Draws a small synthetic detection data set in COCO format: shapes with boxes and masks.

Example: python tools/make_shapes.py data/shapes
"""

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("root", help="the folder for the data set")
    for name, default, help in (
        ("train", 800, "the number of training images"),
        ("val", 100, "the number of validation images"),
        ("size", 160, "the height and width of the images in pixels, at least 64"),
        ("seed", 0, "the seed; the same seed draws the same images"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    return parser


def main(args):
    from mmsoftpool.datasets.shapes import make_shapes

    make_shapes(**vars(args))


if __name__ == "__main__":
    cli.run(main, make_parser())
