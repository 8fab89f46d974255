#!/usr/bin/env python
"""Tests, sanitizes and measures the operator on a GPU and writes one JSON and one Markdown file.

Needs torch and pytest. Build the libraries first, or let `make gpu-report` do both:
  python setup.py -q egg_info build_ext --inplace

Examples:
  python tools/gpu_report.py
  python tools/gpu_report.py --dry-run
  python tools/gpu_report.py --device cpu --shape 1 8 32 32 --rounds 1 --cases 1 --out /tmp
"""

import shlex

import cli
from mmsoftpool.analysis import gpu_report


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="the device to measure; cpu is a rehearsal (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, and run nothing"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=gpu_report.PARTS,
        default=list(gpu_report.PARTS),
        help="the parts to run (default: all)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="stop after so many minutes; the build takes one more (default: %(default)s)",
    )
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        default=[4, 64, 400, 672],
        metavar=("N", "C", "H", "W"),
        help="the shape of the operator's input (default: 4 64 400 672)",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=[800, 1344],
        metavar=("H", "W"),
        help="the height and width of the detectors' images (default: 800 1344)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        metavar="N",
        help="the number of rounds; the results are medians over them (default: %(default)s)",
    )
    parser.add_argument(
        "--cases",
        type=int,
        metavar="N",
        help="measure the operator in the first N cases only (default: all)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=str(gpu_report.ROOT / "benchmarks"),
        help="the folder of the files, which are named after the device (default: benchmarks)",
    )
    return parser


def main(args):
    for name in ("minutes", "rounds", "cases"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}")
    if args.dry_run:
        programs = gpu_report.commands()
        for part in args.parts:
            print(f"== {part}")
            for command in programs.get(part, []):
                print(shlex.join(command))
            if part == "operator":
                for case in gpu_report.operator_cases()[: args.cases]:
                    print(*case)
            if part == "detectors":
                print(*gpu_report.CONFIGS, sep="\n")
        return
    report = gpu_report.Report(
        *(args.device, args.out, args.minutes, tuple(args.shape), tuple(args.size), args.rounds),
        args.cases,
    )
    report.run(args.parts)


if __name__ == "__main__":
    cli.run(main, make_parser())
