#!/usr/bin/env python
"""Trains and evaluates configs with the same seeds, and compares each with the first one.

The result is the table of tools/compare.py. The same command skips finished runs and resumes
interrupted ones; more seeds and more configs can be added later.

Examples:
  python tools/ab.py configs/demo_retinanet_maxpool.py configs/demo_retinanet_softpool.py \\
      --seeds 0 1 2 3 4
  python tools/ab.py maxpool.py softpool.py alpha_2.py alpha_4.py --work-dir work_dirs/alpha
"""

from pathlib import Path

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("baseline", help="the config file that the others are compared with")
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="a config file to compare with the baseline"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="the seeds of the runs of each config (default: 0 1 2)",
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="the folder for all runs and results (default: work_dirs/BASELINE_vs_CONFIG, or "
        "work_dirs/BASELINE_vs_N_others for more than one CONFIG)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override settings of all configs, as in tools/train.py; data_root=DIR replaces the "
        "data root of all data sets and evaluators",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="the number of GPUs of a run (default: %(default)s)",
    )
    cli.add_train_arguments(parser)
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="the number of bootstrap samples of the comparison (default: %(default)s)",
    )
    return parser


def main(args):
    from mmsoftpool.evaluation.ab import compare_configs

    baseline, *others = (Path(config).stem for config in (args.baseline, *args.configs))
    compared = others[0] if len(others) == 1 else f"{len(others)}_others"
    work_dir = args.work_dir or Path("work_dirs", f"{baseline}_vs_{compared}")
    comparisons = compare_configs(
        [args.baseline, *args.configs],
        args.seeds,
        work_dir,
        Path(__file__).parent,
        cfg_options=args.cfg_options,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        gpus=args.gpus,
        resamples=args.resamples,
    )
    for metric, comparison in comparisons.items():
        print(f"\n{metric}\n\n{comparison.markdown()}")
    print(f"The tables and pictures are in {work_dir}.")


if __name__ == "__main__":
    cli.run(main, make_parser())
