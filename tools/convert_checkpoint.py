#!/usr/bin/env python
"""Converts an ImageNet checkpoint of the SoftPool authors and prints the config lines to use it.

Example: python tools/convert_checkpoint.py resnet50.pth.tar resnet50_softpool.pth
"""

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("source", metavar="IN", help="the authors' checkpoint")
    parser.add_argument("target", metavar="OUT", help="the file to write, with only the weights")
    parser.add_argument(
        "--arch",
        metavar="ARCH",
        help="the architecture, if it is not in the checkpoint: torchvision's name, such as "
        "resnet50, resnext101_32x4d or densenet121",
    )
    parser.add_argument(
        "--windows",
        choices=["shifted", "aligned"],
        default="shifted",
        help="the 2x2 windows that the weights were trained with: shifted, [2p-1, 2p], which the "
        "authors had before April 2022, or aligned, [2p, 2p+1], since then (default: %(default)s)",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="execute code that the checkpoint may contain; only for files from people you trust",
    )
    return parser


def main(args):
    from mmsoftpool.convert import convert_checkpoint

    lines = convert_checkpoint(**vars(args))
    print(f"wrote {args.target}; a detector's config starts from it with\n\n{lines}", end="")


if __name__ == "__main__":
    cli.run(main, make_parser())
