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
    parser.add_argument("--amp", action="store_true", help="train in mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by true batch size / auto_scale_lr.base_batch_size",
    )
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
