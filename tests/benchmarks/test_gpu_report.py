"""The GPU report, rehearsed: what it keeps, what it skips, what it prints."""

import json
import os
import sys
import time

import pytest

import gpu_report

SHAPES = ((1, 4, 16, 16), (64, 64))


@pytest.fixture
def report(tmp_path):
    return gpu_report.Report("cpu", tmp_path, 5, *SHAPES, rounds=1)


def half(number):
    """A case for another process: it fails, or ends the process."""
    if number in (13, 17):
        os._exit({13: 3, 17: 0}[number])
    if number == 15:
        raise RuntimeError("CUDA error: an illegal memory access")
    if number % 2:
        raise ValueError(f"{number} is odd\nand more")
    return [number // 2]


def test_a_process_that_ends_costs_one_case():
    cases = [(4,), (13,), (7,), (15,), (17,), (6,)]
    results = dict(gpu_report.in_processes(half, cases, time.monotonic() + 60))
    assert list(results) == cases
    assert results[4,] == [2] and results[6,] == [3]
    assert results[13,] == "the process ended with status 3"
    assert results[17,] == "the process ended with status 0"
    assert results[7,] == "ValueError: 7 is odd"
    assert results[15,] == "RuntimeError: CUDA error: an illegal memory access"


def test_cases_after_the_deadline_are_named():
    assert dict(gpu_report.in_processes(half, [(2,)], 0)) == {(2,): "no time left"}


def test_a_program_that_takes_too_long_is_stopped():
    # A grandchild that keeps the output open, as the tests under the sanitizer are.
    row = gpu_report.run_program([sys.executable, "-c", "import os; os.system('sleep 60')"], 0.5)
    assert row["status"] is None and row["summary"] == "stopped after 0 s" and row["seconds"] < 30


def test_a_program_that_fails_keeps_its_output():
    code = "print('x'); print('== 1 failed =='); 1 / 0"
    row = gpu_report.run_program([sys.executable, "-c", code], 60)
    assert row["status"] == 1 and row["output"].startswith("x\n== 1 failed ==")


def test_a_missing_program_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    row = gpu_report.run_program(["no-such-sanitizer"], 60)
    assert row["skipped"].startswith("no no-such-sanitizer on PATH")


def test_every_step_is_in_the_files(monkeypatch, report):
    def steps(self):
        yield [dict(command="a", status=0, seconds=1.0, summary="5 passed")]
        assert json.loads(self.path.read_text())["parts"]["tests"][0]["summary"] == "5 passed"
        assert "passed in 1 s: 5 passed (`a`)" in self.path.with_suffix(".md").read_text()
        yield [dict(command="b", status=1, seconds=2.0, summary="1 failed", output="...")]
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report.Report, "tests", steps)
    with pytest.raises(KeyboardInterrupt):
        report.run(["tests"])
    assert len(json.loads(report.path.read_text())["parts"]["tests"]) == 2
    text = report.path.with_suffix(".md").read_text()
    assert "FAILED in 2 s: 1 failed (`b`)" in text and "nothing here ran on a GPU" in text


def test_the_prediction_stands_beside_the_measured_share():
    case = dict(dtype="float32", layout="contiguous", pooling=[3, 2, 1])
    times = dict(forward=2e-3, backward=4e-3)
    shares = dict(forward_bandwidth_of_copy=0.5, backward_bandwidth_of_copy=0.25)
    rows = [
        dict(case, method="copy", forward=1e-3),
        dict(case, method="soft_pool2d", **times, **shares),
        dict(case, method="F.max_pool2d", forward=3e-3, backward=2e-3),
        dict(case, method="torch.compile(reference)", error="no compiler"),
    ]
    prediction = dict(case, direction="forward", kernel="k3 s2 p1")
    prediction.update(issue=0.6, exponential=2.0, memory=1.0)
    header, _, forward, backward, *_ = gpu_report.operator_table(rows, [prediction])
    assert header == (
        "| case | part | of copy | predicted | ms | F.max_pool2d | torch.compile(reference) |"
    )
    assert forward == (
        "| float32 contiguous k3 s2 p1 | forward | 50% | 60% | 2.000 | 1.50 | fails |"
    )
    assert backward == "| float32 contiguous k3 s2 p1 | backward | 25% |  | 4.000 | 0.50 | fails |"


def test_the_operator_is_measured_on_the_cpu(monkeypatch, report):
    def rows(device, dtype, layout, pooling, shape, rounds):
        return [dict(dtype=dtype, layout=layout, pooling=pooling, method="copy", forward=1.0)]

    monkeypatch.setattr(gpu_report.benchmark, "benchmark_pooling", rows)
    (row,) = gpu_report.measure_operator("cpu", (1, 4, 8, 8), 1, "float32", "contiguous", (2, 2, 0))
    assert row["pooling"] == (2, 2, 0)


def test_the_dry_run_names_everything_and_runs_nothing(run_tool, tmp_path):
    status, out, _ = run_tool("gpu_report", "--dry-run", "--out", tmp_path)
    assert status == 0 and not list(tmp_path.iterdir())
    for part in gpu_report.PARTS:
        assert f"== {part}" in out
    assert "compute-sanitizer --tool racecheck" in out
    assert "bfloat16 channels_last (3, 2, 1)" in out and "configs/mask_rcnn_r50_maxpool.py" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", 0), "rounds must be greater than 0, got 0"),
        (("--device", "cpu", "--out", "/missing"), "no folder /missing to write the report into"),
    ],
)
def test_a_mistake_is_one_line(run_tool, arguments, message):
    status, _, err = run_tool("gpu_report", *arguments)
    assert status == 2 and err.strip().splitlines()[-1] == f"error: {message}"
