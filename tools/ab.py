#!/usr/bin/env python
"""Trains and evaluates two configs with the same seeds, and compares them.

Ends in the table of tools/compare.py. Finished runs are kept, so that the same command goes on
after an interruption, and more seeds can be added later.

Example: python tools/ab.py configs/demo_retinanet_maxpool.py configs/demo_retinanet_softpool.py \\
             --seeds 0 1 2 3 4
"""

from pathlib import Path

from mmsoftpool import cli
from mmsoftpool.evaluation.ab import compare_configs


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config_a", help="config file, the baseline")
    parser.add_argument("config_b", help="config file that is compared with it")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="seeds of the runs of each config (default: 0 1 2)",
    )
    parser.add_argument(
        "--work-dir",
        help="where everything goes (default: work_dirs/CONFIG_A_vs_CONFIG_B)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override settings of both configs, as in tools/train.py; data_root=DIR for your data",
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a run (default: %(default)s)")
    cli.add_train_arguments(parser)
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        help="bootstrap samples of the comparison (default: %(default)s)",
    )
    return parser


def main(args):
    names = [Path(config).stem for config in (args.config_a, args.config_b)]
    work_dir = args.work_dir or Path("work_dirs", "_vs_".join(names))
    train_arguments = [
        flag for flag in ("--amp", "--auto-scale-lr") if vars(args)[flag[2:].replace("-", "_")]
    ]
    comparisons = compare_configs(
        args.config_a,
        args.config_b,
        args.seeds,
        work_dir,
        Path(__file__).parent,
        cfg_options=args.cfg_options,
        train_arguments=train_arguments,
        gpus=args.gpus,
        resamples=args.resamples,
    )
    for metric, comparison in comparisons.items():
        print(f"\n{metric}\n\n{comparison.markdown()}")
    print(f"The tables and pictures are in {work_dir}.")


if __name__ == "__main__":
    cli.run(main, make_parser())
