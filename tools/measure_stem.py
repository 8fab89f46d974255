#!/usr/bin/env python
"""Measures what pools of different sharpness do to the activations of trained stems.

Prints for each stem, and draws for all, how much energy a pool keeps, how many inputs its gradient
reaches, how much the output changes when the image moves by a pixel, and the histograms. The
backbones must be mmdet's ResNets.

Example:
  python tools/measure_stem.py --out stems.png \\
      configs/demo_retinanet_maxpool.py work_dirs/demo_retinanet_maxpool/epoch_16.pth \\
      configs/demo_retinanet_softpool.py work_dirs/demo_retinanet_softpool/epoch_16.pth
"""

from pathlib import Path

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "stems",
        nargs="+",
        metavar="CONFIG CHECKPOINT",
        help="a config file and a checkpoint of it, one pair or more",
    )
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=float,
        metavar="A",
        help="the values of alpha; inf is max pooling (default: 0 0.5 1 2 4 8 16 32 64 inf)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=32,
        metavar="N",
        help="the number of images of the val split (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="stems.png",
        help="the picture to write, a .png, .jpg or .pdf file (default: %(default)s)",
    )
    cli.add_cfg_options(parser)
    return parser


def main(args):
    if len(args.stems) % 2:
        raise ValueError(f"stems must be pairs of a config and a checkpoint, got {args.stems}")
    configs, checkpoints = args.stems[::2], args.stems[1::2]
    names = [Path(config).stem for config in configs]
    if len(set(names)) != len(names):
        raise ValueError(f"stems must be of configs with different names, got {names}")

    from mmsoftpool.analysis.stem import ALPHAS, draw_stems, measure_stem
    from mmsoftpool.engine import load_config
    from mmsoftpool.visualization import check_picture

    check_picture(args.out)
    stems = {}
    for name, config, checkpoint in zip(names, configs, checkpoints, strict=True):
        cfg = load_config(config, args.cfg_options)
        stems[name] = measure_stem(cfg, checkpoint, args.alphas or ALPHAS, args.images)
        print(f"\n{name}\n\n{stems[name].markdown()}")
    draw_stems(stems, args.out)
    print(f"The picture is in {args.out}.")


if __name__ == "__main__":
    cli.run(main, make_parser())
