"""McNemar's test against the paper's Table 4 and closed forms."""

import csv
import pickle

import pytest
import torch

from mcnemar import McNemar, compare_predictions

# Counts of Table S2 (both right, SoftPool alone, original alone, both wrong), and chi-square and p
# of Table 4, as printed.
PAPER = {
    "ResNet18": ((31838, 3795, 3011, 11356), 90.08, 2.28e-21),
    "ResNet34": ((34090, 3246, 2940, 9724), 15.04, 1.05e-4),
    "ResNet50": ((35472, 3203, 2603, 8722), 61.80, 3.80e-15),
    "ResNet101": ((36553, 2609, 2272, 8566), 23.13, 1.51e-6),
    "ResNet152": ((37247, 2373, 1908, 8472), 50.29, 1.32e-12),
    "DenseNet121": ((34097, 3836, 2253, 9814), 411.02, 2.19e-91),
    "DenseNet161": ((35160, 4237, 3631, 6972), 46.52, 9.06e-12),
    "DenseNet169": ((35074, 3407, 2988, 8531), 27.32, 1.72e-7),
    "ResNeXt50 32x4d": ((36628, 2618, 2153, 8601), 45.13, 1.85e-11),
    "ResNeXt101 32x8d": ((38633, 2587, 1005, 7775), 695.87, 2.36e-53),
    "wide-ResNet50": ((36638, 3113, 2636, 7613), 39.41, 3.43e-10),
    "InceptionV1": ((31826, 3897, 3037, 11240), 106.41, 5.98e-25),
    "InceptionV3": ((36341, 3029, 2370, 8260), 80.19, 3.39e-19),
}


@pytest.mark.parametrize("network", PAPER)
def test_gives_table_4_from_the_counts_of_table_s2(network):
    counts, statistic, p_value = PAPER[network]
    test = McNemar(*counts)
    assert sum(counts) == 50_000
    assert test.test().statistic == pytest.approx(statistic, abs=0.005)
    if network == "ResNeXt101 32x8d":
        # The table's exponent does not follow from its own counts and chi-square: it lacks a digit.
        p_value = 2.36e-153
    # The table cuts p off where it should round.
    assert test.test().pvalue == pytest.approx(p_value, rel=0.006)


def test_accuracies_of_table_s2():
    # The margins that Table S2 prints for wide-ResNet50 (38781 right and 10726 wrong originally)
    # and InceptionV3 (14874 right with SoftPool) are not the sums of its own counts:
    wide, inception = (McNemar(*PAPER[n][0]) for n in ("wide-ResNet50", "InceptionV3"))
    assert (wide.both + wide.only_a, wide.only_b + wide.neither) == (39274, 10726)
    assert inception.both + inception.only_b == 39370


def test_closed_forms():
    even = McNemar(5, 3, 3, 1).test()
    assert even.statistic == 0 and even.pvalue == 1
    assert McNemar(0, 10, 0, 0).test().statistic == pytest.approx(8.1)  # (10 - 1)² / 10
    assert McNemar(0, 10, 0, 0).test(exact=True).pvalue == pytest.approx(2 / 2**10)


def test_classifiers_that_never_disagree_have_no_p_value():
    report = McNemar(5, 0, 0, 1).report()
    assert "no sample that only one of them classifies correctly" in report and "nan" not in report


def test_reads_predictions_in_any_order(tmp_path):
    a = [("x", 1, 1), ("y", 0, 2), ("z", 3, 3), ("w", 5, 4)]
    b = [("w", 4, 4), ("x", 1, 1), ("y", 7, 2), ("z", 0, 3)]
    for name, rows in (("a", a), ("b", b)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sample", "prediction", "label"), *rows])
    expected = McNemar(both=1, only_b=1, only_a=1, neither=1)
    assert compare_predictions(tmp_path / "a.csv", tmp_path / "b.csv") == expected
    dump = [
        dict(img_path=s, pred_label=torch.tensor([p]), gt_label=torch.tensor([label]))
        for s, p, label in b
    ]
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(dump))
    assert compare_predictions(tmp_path / "a.csv", tmp_path / "b.pkl") == expected


def test_wrong_input_is_named(tmp_path):
    good, other = tmp_path / "good.csv", tmp_path / "other.csv"
    good.write_text("sample,prediction,label\nx,1,1\n")
    for content, message in (
        (
            "sample,prediction,label\ny,1,1\n",
            "must have the same samples; 2 are only in one",
        ),
        ("sample,prediction,label\nx,1,2\n", "give different labels to 1 samples, for example 'x'"),
        ("sample,prediction,label\nx,1,1\nx,1,1\n", "every sample once"),
        ("name,label\nx,1\n", "must be a CSV file with the columns sample, prediction, label"),
    ):
        other.write_text(content)
        with pytest.raises(ValueError, match=message):
            compare_predictions(good, other)
    with pytest.raises(ValueError, match="only_a must be at least 0, got -1"):
        McNemar(1, 1, -1, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        McNemar(0, 0, 0, 0)


def test_the_script_takes_the_four_counts(run_tool):
    counts = ("--counts", 31838, 3795, 3011, 11356)
    status, out, _ = run_tool("mcnemar", *counts, "--names", "max", "SoftPool")
    assert status == 0 and "chi-square 90.08, p = 2.29e-21" in out
    assert "max 69.70%, SoftPool 71.27%, difference +1.57 points" in out
    status, _, error = run_tool("mcnemar", "a.csv")
    assert status == 2 and error == "error: give either two prediction files or the four counts\n"
