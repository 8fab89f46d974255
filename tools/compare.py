#!/usr/bin/env python
"""Compares two detectors, or two classifiers, on the same images.

Detectors: COCO's six metrics as in Table 8 of the paper, every difference with a confidence
interval from a paired bootstrap. The files are what CocoMetric writes with outfile_prefix; several
for a model are its runs with several seeds. Classifiers: McNemar's test (supplement, section S7),
from two files (CSV with the columns sample, prediction, label, or the pickle of mmpretrain's
test.py --out) or from the four counts.

Example: python tools/compare.py detectors data/coco/annotations/instances_val2017.json \\
             --a maxpool.bbox.json --b softpool.bbox.json --markdown table.md --plot table.png
         python tools/compare.py classifiers maxpool.csv softpool.csv
         python tools/compare.py classifiers --counts 31838 3795 3011 11356
"""

from pathlib import Path

from mmsoftpool import cli
from mmsoftpool.evaluation.comparison import compare_detections
from mmsoftpool.evaluation.mcnemar import McNemar, compare_predictions


def make_parser():
    parser = cli.make_parser(__doc__)
    tools = parser.add_subparsers(dest="what", required=True)
    detectors = tools.add_parser("detectors", help="COCO metrics with bootstrap intervals")
    detectors.add_argument("ann_file", help="annotations, as instances_val2017.json")
    several = dict(nargs="+", required=True, metavar="FILE.json")
    detectors.add_argument("--a", help="results of model A, one file for each run", **several)
    detectors.add_argument("--b", help="results of model B", **several)
    detectors.add_argument(
        "--iou-type", choices=["bbox", "segm"], default="bbox", help="(default: %(default)s)"
    )
    detectors.add_argument(
        "--resamples", type=int, default=1000, help="bootstrap samples (default: %(default)s)"
    )
    detectors.add_argument(
        "--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)"
    )
    detectors.add_argument(
        "--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)"
    )
    detectors.add_argument("--plot", metavar="FILE.png", help="draw the differences")
    classifiers = tools.add_parser("classifiers", help="McNemar's test")
    classifiers.add_argument("files", nargs="*", metavar="FILE", help="predictions of A and of B")
    classifiers.add_argument(
        "--counts",
        nargs=4,
        type=int,
        metavar=("BOTH", "ONLY_B", "ONLY_A", "NEITHER"),
        help="numbers of samples that both, B alone, A alone and neither of them get right",
    )
    for sub in (detectors, classifiers):
        sub.add_argument(
            "--names", nargs=2, default=["A", "B"], metavar=("A", "B"), help="of the models"
        )
        sub.add_argument("--markdown", metavar="FILE.md", help="write the table to a file too")
    return parser


def main(args):
    if args.what == "detectors":
        comparison = compare_detections(
            args.ann_file,
            args.a,
            args.b,
            names=tuple(args.names),
            iou_type=args.iou_type,
            resamples=args.resamples,
            confidence=args.confidence,
            seed=args.seed,
        )
        if args.plot:
            comparison.plot(args.plot)
        text = comparison.markdown()
    elif args.counts and not args.files:
        text = McNemar(*args.counts).report(tuple(args.names))
    elif len(args.files) == 2 and not args.counts:
        text = compare_predictions(*args.files).report(tuple(args.names))
    else:
        raise ValueError("give two prediction files, or --counts")
    print(text, end="")
    if args.markdown:
        Path(args.markdown).write_text(text)


if __name__ == "__main__":
    cli.run(main, make_parser())
