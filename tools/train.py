#!/usr/bin/env python
"""Trains a detector from a config, as MMDetection's tools/train.py does.

Example: python tools/train.py configs/retinanet_r50_softpool.py --cfg-options data_root=/data/coco
"""

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", help="the config file")
    cli.add_train_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="resume from CHECKPOINT or, if no file is given, from the latest intact checkpoint in "
        "the work dir; without one, a new run starts",
    )
    cli.add_common_arguments(parser)
    return parser


def main(args):
    from mmsoftpool import engine

    cfg = engine.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    engine.train(cfg, args.amp, args.auto_scale_lr, args.resume)


if __name__ == "__main__":
    cli.run(main, make_parser())
