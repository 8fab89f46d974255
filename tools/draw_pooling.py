#!/usr/bin/env python
"""Draws the effect of pooling on a photo or on the activations of a detector.

By default, every pooling method pools a region of the photo, and a detail of it is enlarged. With
--config and --checkpoint, the picture has the activations of the detector's stem before and after
max pooling and SoftPool.

Examples:
  python tools/draw_pooling.py photo.png --kernel 3 5 --out pooling.png
  python tools/draw_pooling.py photo.png --methods average maximum softpool --region 200 50 240 240
  python tools/draw_pooling.py photo.jpg --config configs/demo_retinanet_softpool.py \\
      --checkpoint work_dirs/demo_retinanet_softpool/epoch_16.pth --out stem.png
"""

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("image", help="the image file")
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="pooling.png",
        help="the picture to write, a .png, .jpg or .pdf file (default: %(default)s)",
    )
    photo = parser.add_argument_group("options for a photo")
    photo.add_argument(
        "--kernel",
        nargs="+",
        type=int,
        default=[3, 5],
        metavar="K",
        help="the kernel sizes, which are also the strides (default: 3 5)",
    )
    photo.add_argument(
        "--methods",
        nargs="+",
        choices=cli.METHODS,
        default=cli.METHODS,
        metavar="METHOD",
        help=f"the pooling methods, of {', '.join(cli.METHODS)} (default: all of them)",
    )
    photo.add_argument(
        "--region",
        nargs=4,
        type=int,
        metavar=("X", "Y", "W", "H"),
        help="the region to draw, in pixels (default: the region with the highest contrast)",
    )
    photo.add_argument(
        "--zoom",
        nargs=4,
        type=int,
        metavar=("X", "Y", "W", "H"),
        help="the detail to enlarge, inside the region and in pixels of the image (default: the "
        "detail with the highest contrast)",
    )
    photo.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="the pixel value of white; the larger it is, the closer SoftPool is to max pooling "
        "(default: %(default)s)",
    )
    photo.add_argument(
        "--alpha",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="ALPHA",
        help="the sharpness of SoftPool, which has a panel for each (default: 1)",
    )
    photo.add_argument(
        "--columns",
        type=int,
        default=6,
        metavar="N",
        help="the number of panels in a row (default: %(default)s)",
    )
    stem = parser.add_argument_group("options for a detector's stem")
    stem.add_argument("--config", help="the config file")
    stem.add_argument("--checkpoint", metavar="FILE", help="the checkpoint of the detector")
    stem.add_argument(
        "--channels",
        type=int,
        default=4,
        metavar="N",
        help="the number of channels to draw (default: %(default)s)",
    )
    cli.add_cfg_options(stem)
    return parser


def main(args):
    from mmsoftpool import engine
    from mmsoftpool.analysis.similarity import read_image
    from mmsoftpool.files import check_input
    from mmsoftpool.visualization import check_picture
    from mmsoftpool.visualization import pooling as visualization

    check_picture(args.out)
    image = read_image(check_input(args.image, "image"))
    if image is None:
        raise ValueError(f"{args.image} is not an image")
    if bool(args.config) != bool(args.checkpoint):
        raise ValueError("config and checkpoint must be given together")
    if args.config:
        cfg = engine.load_config(args.config, args.cfg_options)
        shown, activations, pooling = visualization.stem_activations(
            cfg, args.checkpoint, args.image
        )
        visualization.draw_stem(shown, activations, pooling, args.out, args.channels)
    else:
        visualization.draw_pooling(
            image,
            args.out,
            args.kernel,
            args.methods,
            args.region,
            args.zoom,
            args.scale,
            args.columns,
            args.alpha,
        )
    print(f"drew {args.out}")


if __name__ == "__main__":
    cli.run(main, make_parser())
