#!/usr/bin/env python
"""Compares two detectors, or two classifiers, on the same images.

Detectors: COCO's six metrics as in Table 8 of the paper, every difference with a confidence
interval from a paired bootstrap. The result files are those that CocoMetric writes with
outfile_prefix; several files of a model are its runs with several seeds.

Classifiers: McNemar's test (supplement, section S7), from two files of predictions (CSV with the
columns sample, prediction and label, or the pickle file of mmpretrain's test.py --out), or from the
four counts.

Examples:
  python tools/compare.py detectors data/coco/annotations/instances_val2017.json \\
      --a maxpool.bbox.json --b softpool.bbox.json --markdown table.md --plot table.png
  python tools/compare.py classifiers maxpool.csv softpool.csv
  python tools/compare.py classifiers --counts 31838 3795 3011 11356
"""

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, help="what to compare")
    detectors = commands.add_parser("detectors", help="COCO's metrics with bootstrap intervals")
    detectors.add_argument(
        "ann_file", help="the annotations in COCO's format, such as instances_val2017.json"
    )
    files = dict(nargs="+", required=True, metavar="FILE.json")
    detectors.add_argument("--a", help="the result files of model A, one for each run", **files)
    detectors.add_argument("--b", help="the result files of model B, one for each run", **files)
    detectors.add_argument(
        "--iou-type",
        choices=["bbox", "segm"],
        default="bbox",
        help="compare boxes or masks (default: %(default)s)",
    )
    detectors.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="the number of bootstrap samples (default: %(default)s)",
    )
    detectors.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="the confidence of the intervals, between 0 and 1 (default: %(default)s)",
    )
    detectors.add_argument(
        "--seed", type=int, default=0, help="the seed of the bootstrap (default: %(default)s)"
    )
    detectors.add_argument(
        "--plot", metavar="FILE.png", help="save a picture of the differences to this file"
    )
    classifiers = commands.add_parser("classifiers", help="McNemar's test")
    classifiers.add_argument(
        "files", nargs="*", metavar="FILE", help="the prediction files of model A and of model B"
    )
    classifiers.add_argument(
        "--counts",
        nargs=4,
        type=int,
        metavar=("BOTH", "ONLY_B", "ONLY_A", "NEITHER"),
        help="instead of the files, the number of samples that both models, only B, only A and "
        "neither of them classify correctly",
    )
    for command in (detectors, classifiers):
        command.add_argument(
            "--names",
            nargs=2,
            default=["A", "B"],
            metavar=("A", "B"),
            help="the names of the models in the table (default: A B)",
        )
        command.add_argument(
            "--markdown", metavar="FILE.md", help="save the table to this file as well"
        )
    return parser


def main(args):
    from mmsoftpool.evaluation.comparison import compare_detections
    from mmsoftpool.evaluation.mcnemar import McNemar, compare_predictions
    from mmsoftpool.files import check_output, write_atomically
    from mmsoftpool.visualization import check_picture

    if args.markdown:
        check_output(args.markdown)
    if args.command == "detectors" and args.plot:
        check_picture(args.plot)
    if args.command == "detectors":
        if args.names[0] == args.names[1]:
            raise ValueError(f"names must be different, got {args.names[0]} twice")
        comparison = compare_detections(
            args.ann_file,
            dict(zip(args.names, (args.a, args.b), strict=True)),
            iou_type=args.iou_type,
            resamples=args.resamples,
            confidence=args.confidence,
            seed=args.seed,
        )
        text = comparison.markdown()
    elif args.counts and not args.files:
        text = McNemar(*args.counts).report(tuple(args.names))
    elif len(args.files) == 2 and not args.counts:
        text = compare_predictions(*args.files).report(tuple(args.names))
    else:
        raise ValueError("give either two prediction files or the four counts")
    print(text, end="")
    if args.markdown:
        with write_atomically(args.markdown) as temporary:
            temporary.write_text(text)
    if args.command == "detectors" and args.plot:
        comparison.plot(args.plot)


if __name__ == "__main__":
    cli.run(main, make_parser())
