#!/usr/bin/env python
"""Evaluates a detector from a config and a checkpoint, as MMDetection's tools/test.py does.

Example: python tools/test.py configs/retinanet_r50_softpool.py \\
             work_dirs/retinanet_r50_softpool/epoch_12.pth --show-dir pictures
"""

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", help="the config file")
    parser.add_argument("checkpoint", help="the checkpoint file or its URL")
    parser.add_argument(
        "--out", metavar="FILE.pkl", help="save the predictions to this pickle file"
    )
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="save pictures of the predictions and the ground truth to this folder",
    )
    parser.add_argument(
        "--wait-time",
        type=float,
        default=2,
        metavar="SECONDS",
        help="the time that each window is shown, in seconds (default: %(default)s)",
    )
    cli.add_common_arguments(parser)
    return parser


def main(args):
    from mmsoftpool import engine

    cfg = engine.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    engine.test(cfg, args.checkpoint, args.out, args.show, args.show_dir, args.wait_time)


if __name__ == "__main__":
    cli.run(main, make_parser())
