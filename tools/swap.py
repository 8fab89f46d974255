#!/usr/bin/env python
"""Evaluates a network trained with max pooling with SoftPool instead, without training it.

Prints and draws the score on the val split for each sharpness alpha, to choose one for a checkpoint
that exists. The config is that of the training; several checkpoints of it are averaged. The same
command resumes after an interruption.

Examples:
  python tools/swap.py configs/demo_retinanet_maxpool.py \\
      work_dirs/demo_retinanet_maxpool/epoch_16.pth --batch-norm 50
  mim download mmdet --config retinanet_r50_fpn_1x_coco
  python tools/swap.py retinanet_r50_fpn_1x_coco.py retinanet_r50_fpn_1x_coco_*.pth
"""

from pathlib import Path

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", help="the config file of the training")
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint file or its URL"
    )
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=float,
        metavar="A",
        help="the values of alpha (default: 0 0.5 1 2 4 8 16 32 64)",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        metavar="NAME",
        help="the pools of the backbone to replace: classes such as torch.nn.AvgPool2d, or names "
        "in which * and ? are wildcards (default: torch.nn.MaxPool2d)",
    )
    parser.add_argument(
        "--batch-norm",
        type=int,
        default=0,
        metavar="N",
        help="draw a second curve, with the statistics of batch norm estimated anew from N "
        "training batches after each swap (default: no second curve)",
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="the folder for swap.md, swap.png and swap.json (default: work_dirs/CONFIG_swap)",
    )
    cli.add_cfg_options(parser)
    return parser


def main(args):
    from mmsoftpool.engine import load_config
    from mmsoftpool.evaluation.swap import ALPHAS, evaluate_swap

    work_dir = args.work_dir or f"work_dirs/{Path(args.config).stem}_swap"
    swap = evaluate_swap(
        load_config(args.config, args.cfg_options, work_dir),
        args.checkpoints,
        args.alphas or ALPHAS,
        include=args.include or "torch.nn.MaxPool2d",
        batch_norm=args.batch_norm,
    )
    print(f"\n{swap.markdown()}\nThe table and the picture are in {work_dir}.")


if __name__ == "__main__":
    cli.run(main, make_parser())
