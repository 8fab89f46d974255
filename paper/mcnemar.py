#!/usr/bin/env python
"""Compares two classifiers on the same samples by McNemar's test (supplement, section S7).

From two files of predictions (CSV with the columns sample, prediction and label, or the pickle file
of mmpretrain's test.py --out), or from the four counts.

Examples:
  python paper/mcnemar.py maxpool.csv softpool.csv
  python paper/mcnemar.py --counts 31838 3795 3011 11356
"""

from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats import contingency_tables

from mmsoftpool import cli
from mmsoftpool.errors import UserError
from mmsoftpool.files import check_input, read_pickle


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on the four counts of two classifiers A and B.

    Args:
        both: Number of samples that both classify correctly.
        only_b: Number of samples that only B classifies correctly.
        only_a: Number of samples that only A classifies correctly.
        neither: Number of samples that both classify wrongly.

    Raises:
        UserError: If a count is negative, or all are 0.
    """

    both: int
    only_b: int
    only_a: int
    neither: int

    def __post_init__(self):
        for name, count in vars(self).items():
            if count < 0:
                raise UserError(f"{name} must be at least 0, got {count}")
        if not any(astuple(self)):
            raise UserError("there must be at least one sample, got four counts of 0")

    def test(self, exact: bool = False):
        """Runs statsmodels' test.

        Args:
            exact: Whether to use the binomial distribution, exact for few disagreements too.
                Defaults to False, the chi-square distribution with one degree of freedom and
                continuity correction (equation S1).

        Returns:
            An object with ``statistic`` and ``pvalue``; NaN if the classifiers never disagree.
        """
        table = [[self.both, self.only_b], [self.only_a, self.neither]]
        # The correction must not turn a difference of 0 into one of 1.
        return contingency_tables.mcnemar(table, exact, correction=self.only_a != self.only_b)

    def report(self, names: tuple[str, str] = ("A", "B")) -> str:
        """Formats the counts and the test as Markdown."""
        a, b = names
        samples = sum(astuple(self))
        accuracy = [(self.both + only) / samples for only in (self.only_a, self.only_b)]
        if self.only_a == self.only_b == 0:
            result = "no sample that only one of them classifies correctly"
        else:
            test, exact = self.test(), self.test(exact=True)
            result = f"chi-square {test.statistic:.2f}, p = {test.pvalue:.3g}"
            result += f" (exact binomial test: p = {exact.pvalue:.3g})"
        return (
            f"| {samples} samples | {a} right | {a} wrong |\n"
            "|---|---:|---:|\n"
            f"| {b} right | {self.both} | {self.only_b} |\n"
            f"| {b} wrong | {self.only_a} | {self.neither} |\n\n"
            f"Accuracy: {a} {accuracy[0]:.2%}, {b} {accuracy[1]:.2%}, difference "
            f"{100 * (accuracy[1] - accuracy[0]):+.2f} points.\n"
            f"McNemar's test: {result}.\n"
        )


def compare_predictions(first, second) -> McNemar:
    """Compares the predictions of two classifiers.

    Args:
        first (str | Path): Predictions of classifier A, see :func:`load_predictions`.
        second (str | Path): Predictions of classifier B, for the same samples in any order.

    Raises:
        FileNotFoundError: If a file is missing.
        UserError: If a file is not in a format of :func:`load_predictions`, or the two do not have
            the same samples.
    """
    a, b = load_predictions(first), load_predictions(second)
    if a.keys() != b.keys():
        missing = sorted(a.keys() ^ b.keys())
        raise UserError(
            f"{first} and {second} must have the same samples; {len(missing)} are only in one of "
            f"them, for example {missing[0]!r}"
        )
    different = [sample for sample in a if a[sample][1] != b[sample][1]]
    if different:
        raise UserError(
            f"{first} and {second} give different labels to {len(different)} samples, for example "
            f"{different[0]!r}"
        )
    right = [np.array([p == label for p, label in (x[s] for s in a)]) for x in (a, b)]
    return McNemar(
        both=int(np.sum(right[0] & right[1])),
        only_b=int(np.sum(~right[0] & right[1])),
        only_a=int(np.sum(right[0] & ~right[1])),
        neither=int(np.sum(~right[0] & ~right[1])),
    )


def load_predictions(path) -> dict[str, tuple[str, str]]:
    """Reads the predictions of a classifier.

    Args:
        path (str | Path): A CSV file with the columns ``sample``, ``prediction`` and ``label``, or
            the pickle file that mmpretrain's ``tools/test.py --out`` writes.

    Returns:
        dict: (prediction, label) by sample.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is not in one of these formats.
    """
    path = Path(path)
    if path.suffix in (".pkl", ".pickle"):
        samples = read_pickle(path, "prediction file")
        try:
            # The labels are tensors of one number.
            rows = [
                (s.get("img_path", str(i)), *(str(int(s[k])) for k in ("pred_label", "gt_label")))
                for i, s in enumerate(samples)
            ]
        except Exception as error:  # another object than a list of dicts of tensors
            raise UserError(
                f"{path} must be a list with pred_label and gt_label of each sample, as "
                f"mmpretrain's test.py --out writes: {type(error).__name__}: {error}"
            ) from error
    else:
        columns = ["sample", "prediction", "label"]
        try:
            table = pd.read_csv(check_input(path, "prediction file"), dtype=str, usecols=columns)
        except ValueError as error:  # of pandas, for a file that is damaged or something else
            raise UserError(
                f"{path} must be a CSV file with the columns {', '.join(columns)}: {error}"
            ) from error
        if table.isna().any(axis=None):
            raise UserError(f"{path} must have a value in each column of every line")
        rows = list(table[columns].itertuples(index=False, name=None))
    predictions = {name: (prediction, label) for name, prediction, label in rows}
    if len(predictions) != len(rows) or not rows:
        raise UserError(f"{path} must have at least one sample, and every sample once")
    return predictions


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="the prediction files of model A and of model B"
    )
    parser.add_argument(
        "--counts",
        nargs=4,
        type=int,
        metavar=("BOTH", "ONLY_B", "ONLY_A", "NEITHER"),
        help="instead of the files, the number of samples that both models, only B, only A and "
        "neither of them classify correctly",
    )
    parser.add_argument(
        "--names",
        nargs=2,
        default=["A", "B"],
        metavar=("A", "B"),
        help="the names of the models in the table (default: A B)",
    )
    return parser


def main(args):
    if args.counts and not args.files:
        result = McNemar(*args.counts)
    elif len(args.files) == 2 and not args.counts:
        result = compare_predictions(*args.files)
    else:
        raise UserError("give either two prediction files or the four counts")
    print(result.report(tuple(args.names)), end="")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
