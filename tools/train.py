#!/usr/bin/env python
"""Trains a detector from a config, as MMDetection's tools/train.py does.

Example: python tools/train.py configs/retinanet_r50_softpool.py --cfg-options data_root=/data/coco
"""

import argparse

from mmsoftpool import apis


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file")
    apis.add_train_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from CHECKPOINT, or without one from the last checkpoint in the work dir",
    )
    apis.add_common_arguments(parser)
    args = parser.parse_args()
    cfg = apis.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    apis.train(cfg, args.amp, args.auto_scale_lr, args.resume)


if __name__ == "__main__":
    apis.run_tool(main)
