#!/usr/bin/env python
"""Converts an ImageNet checkpoint of the SoftPool authors and prints the config lines to use it.

Example: python tools/convert_checkpoint.py resnet50.pth.tar resnet50_softpool.pth
"""

from mmsoftpool import cli
from mmsoftpool.convert import ARCHITECTURES, WINDOWS, convert_checkpoint


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("source", metavar="IN", help="the authors' checkpoint")
    parser.add_argument("target", metavar="OUT", help="file to write, with the weights alone")
    parser.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        metavar="ARCH",
        help=f"the architecture, if the file does not say it: {', '.join(ARCHITECTURES)}",
    )
    parser.add_argument(
        "--windows",
        choices=WINDOWS,
        default="shifted",
        help="the 2x2 windows of the training: shifted, [2p-1, 2p], before April 2022, or aligned, "
        "[2p, 2p+1], since then (default: %(default)s)",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run code that the file may contain; only for a file from people that you trust",
    )
    return parser


def main(args):
    lines = convert_checkpoint(**vars(args))
    print(f"wrote {args.target}; a detector's config starts from it with\n\n{lines}", end="")


if __name__ == "__main__":
    cli.run(main, make_parser())
