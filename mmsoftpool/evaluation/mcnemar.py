"""McNemar's test for two classifiers on the same samples (supplement, section S7)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, chi2

from ..files import read_csv, read_pickle


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on the four counts of two classifiers A and B.

    Args:
        both: Number of samples that both classify correctly.
        only_b: Number of samples that only B classifies correctly.
        only_a: Number of samples that only A classifies correctly.
        neither: Number of samples that both classify wrongly.

    Raises:
        ValueError: If a count is negative, or all are 0.
    """

    both: int
    only_b: int
    only_a: int
    neither: int

    def __post_init__(self):
        for name, count in vars(self).items():
            if count < 0:
                raise ValueError(f"{name} must be at least 0, got {count}")
        if self.samples == 0:
            raise ValueError("there must be at least one sample, got four counts of 0")

    @property
    def samples(self) -> int:
        return self.both + self.only_b + self.only_a + self.neither

    @property
    def statistic(self) -> float:
        """Chi-square statistic, one degree of freedom, with continuity correction (equation S1)."""
        disagreements = self.only_a + self.only_b
        if disagreements == 0:
            return 0.0
        # The correction must not turn a difference of 0 into one of 1.
        return max(abs(self.only_a - self.only_b) - 1, 0) ** 2 / disagreements

    @property
    def p_value(self) -> float:
        """Probability of at least this statistic if both classifiers are equally good."""
        return float(chi2.sf(self.statistic, 1))

    @property
    def exact_p_value(self) -> float:
        """The same probability from the binomial distribution, exact for few disagreements too."""
        disagreements = self.only_a + self.only_b
        return 1.0 if disagreements == 0 else float(binomtest(self.only_a, disagreements).pvalue)

    def report(self, names: tuple[str, str] = ("A", "B")) -> str:
        """Formats the counts and the test as Markdown."""
        a, b = names
        accuracy = [(self.both + only) / self.samples for only in (self.only_a, self.only_b)]
        return (
            f"| {self.samples} samples | {a} right | {a} wrong |\n"
            "|---|---:|---:|\n"
            f"| {b} right | {self.both} | {self.only_b} |\n"
            f"| {b} wrong | {self.only_a} | {self.neither} |\n\n"
            f"Accuracy: {a} {accuracy[0]:.2%}, {b} {accuracy[1]:.2%}, difference "
            f"{100 * (accuracy[1] - accuracy[0]):+.2f} points.\n"
            f"McNemar's test: chi-square {self.statistic:.2f}, p = {self.p_value:.3g} "
            f"(exact binomial test: p = {self.exact_p_value:.3g}).\n"
        )


def compare_predictions(first, second) -> McNemar:
    """Compares the predictions of two classifiers.

    Args:
        first (str | Path): Predictions of classifier A, see :func:`load_predictions`.
        second (str | Path): Predictions of classifier B, for the same samples in any order.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not in a format of :func:`load_predictions`, or the two do not have
            the same samples.
    """
    a, b = load_predictions(first), load_predictions(second)
    if a.keys() != b.keys():
        missing = sorted(a.keys() ^ b.keys())
        raise ValueError(
            f"{first} and {second} must have the same samples; {len(missing)} are only in one of "
            f"them, for example {missing[0]!r}"
        )
    different = [sample for sample in a if a[sample][1] != b[sample][1]]
    if different:
        raise ValueError(
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
        ValueError: If it is not in one of these formats.
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
            raise ValueError(
                f"{path} must be a list with pred_label and gt_label of each sample, as "
                f"mmpretrain's test.py --out writes: {type(error).__name__}: {error}"
            ) from error
    else:
        rows = read_csv(path, "prediction file", ("sample", "prediction", "label"))
    predictions = {name: (prediction, label) for name, prediction, label in rows}
    if len(predictions) != len(rows) or not rows:
        raise ValueError(f"{path} must have at least one sample, and every sample once")
    return predictions
