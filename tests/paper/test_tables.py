"""The paper's tables, against the text of the paper."""

import pytest

import benchmark
import tables
from pooling_methods import METHODS

from ..common import SHARED

TEXT = SHARED / "seeds" / "paper.txt"
LABELS = {
    "average": "Average",
    "maximum": "Maximum",
    "power-average": "Pow-average",
    "sum": "Sum",
    "lp": "L_p",
    "gate": "Gate",
    "lite-s3dpp": "Lite-S3DPP",
    "lip": "LIP",
    "stochastic": "Stochastic",
    "s3": "S3",
    "softpool": "SoftPool (Ours)",
}


@pytest.fixture(scope="module")
def lines():
    """The lines of the paper's text, with single spaces."""
    if not TEXT.exists():
        pytest.skip(f"no text of the paper at {TEXT}")
    return [" ".join(line.split()) for line in TEXT.read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
class TestTables:
    def test_table_1(self, lines, method):
        datasets = ("DIV2K", "Urban100", "Manga109")
        numbers = [number for name in datasets for number in tables.SIMILARITY[name][method]]
        text = " ".join(f"{number:.3f}" for number in numbers)
        (line,) = [line for line in lines if line.endswith(text)]
        assert LABELS[method] in line

    def test_table_3(self, lines, method):
        latency = "".join("{}/{}".format(*benchmark.PAPER[method][d]) for d in ("cpu", "cuda"))
        numbers = "".join(f"{number:.3f}" for number in tables.SIMILARITY["Flickr2K"][method])
        assert any(line.replace(" ", "").endswith(latency + numbers) for line in lines)


def test_soft_pool_is_first_in_every_column():
    for dataset in tables.SIMILARITY:
        for kernel in tables.KERNELS:
            for metric in tables.METRICS:
                values = [tables.similarity(dataset, m, kernel, metric) for m in METHODS]
                assert max(values) == tables.similarity(dataset, "softpool", kernel, metric)


def test_other_kernels_have_no_number():
    assert tables.similarity("DIV2K", "average", 4, "ssim") is None
