#!/usr/bin/env python
"""Draws what pooling does: a region of a photo pooled by every method, with a zoomed detail; or,
with --config and --checkpoint, a detector's stem activations before and after max pooling and
SoftPool.

Examples:
  python tools/draw_pooling.py photo.png --kernel 3 5 --out pooling.png
  python tools/draw_pooling.py photo.png --methods average maximum softpool --region 200 50 240 240
  python tools/draw_pooling.py photo.jpg --config configs/demo_retinanet_softpool.py \\
      --checkpoint work_dirs/demo_retinanet_softpool/epoch_16.pth --out stem.png
"""

import os

from mmengine.config import DictAction

from mmsoftpool import cli, engine
from mmsoftpool.analysis.similarity import read_image
from mmsoftpool.models.pooling_methods import METHODS
from mmsoftpool.visualization import pooling as pooling_pictures


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("image", help="image file")
    parser.add_argument(
        "--out",
        default="pooling.png",
        help="picture file, .png, .jpg or .pdf (default: %(default)s)",
    )
    photo = parser.add_argument_group("a photo")
    photo.add_argument(
        "--kernel", nargs="+", type=int, default=[3, 5], help="kernel sizes and strides"
    )
    photo.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    photo.add_argument(
        "--region", nargs=4, type=int, metavar=("X", "Y", "W", "H"),
        help="what is shown, in pixels (default: where there is most contrast)",
    )  # fmt: skip
    photo.add_argument(
        "--zoom", nargs=4, type=int, metavar=("X", "Y", "W", "H"),
        help="the detail inside the region, in pixels of the image (default: most contrast)",
    )  # fmt: skip
    photo.add_argument(
        "--scale", type=float, default=1.0,
        help="value of white for the methods; SoftPool comes the nearer to max pooling the larger "
        "it is (default: %(default)s)",
    )  # fmt: skip
    photo.add_argument("--columns", type=int, default=6, help="panels in a row (default: 6)")
    stem = parser.add_argument_group("a detector's stem")
    stem.add_argument("--config", help="config file")
    stem.add_argument("--checkpoint", metavar="FILE", help="the detector's weights")
    stem.add_argument("--channels", type=int, default=4, help="channels drawn (default: 4)")
    stem.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE",
        help="override settings of the config",
    )  # fmt: skip
    return parser


def main(args):
    folder, suffix = os.path.dirname(args.out) or ".", os.path.splitext(args.out)[1].lower()
    if not os.path.isdir(folder) or suffix not in (".png", ".jpg", ".jpeg", ".pdf"):
        raise ValueError(
            f"--out must be a .png, .jpg or .pdf file in a folder that exists, got {args.out}"
        )
    if not os.path.isfile(args.image):
        raise ValueError(f"no image at {os.path.abspath(args.image)}")
    image = read_image(args.image)
    if image is None:
        raise ValueError(f"{args.image} is not an image")
    if bool(args.config) != bool(args.checkpoint):
        raise ValueError("--config and --checkpoint go together")
    if args.scale <= 0 or args.columns < 1 or args.channels < 1:
        raise ValueError("--scale, --columns and --channels must be positive")
    if args.config:
        cfg = engine.load_config(args.config, args.cfg_options)
        shown, activations, pooling = pooling_pictures.stem_activations(
            cfg, args.checkpoint, args.image
        )
        pooling_pictures.draw_stem(shown, activations, pooling, args.out, args.channels)
    else:
        pooling_pictures.draw_pooling(
            image, args.out, args.kernel, args.methods, args.region, args.zoom, args.scale,
            args.columns,
        )  # fmt: skip
    print(f"drew {args.out}")


if __name__ == "__main__":
    cli.run(main, make_parser())
