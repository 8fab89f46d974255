"""The benchmark: its rows, its order of calls, its pictures."""

import gc
import json

import pytest
import torch

import benchmark
from mmsoftpool.errors import UserError
from pooling_methods import METHODS

from ..common import in_openvino_thread

POOLING = ((3, 2, 1), (1, 4, 16, 16), 1)


@pytest.fixture
def small_heap():
    """Excludes living objects from the garbage collection before every measurement."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_papers_methods_beside_its_times(run_tool, tmp_path, small_heap):
    status, out, _ = run_tool(
        *("benchmark", "pooling", "--device", "cpu", "--shape", 1, 4, 16, 16, "--rounds", 1),
        *("--kernel", "3,2,1", "--json", tmp_path / "x.json", "--plot", tmp_path / "x.png"),
    )
    assert status == 0 and "paper fwd" in out
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert "error" not in row
        assert min(row[key] for key in ("forward", "backward", "both", "both_memory")) > 0
    assert rows[0]["paper_forward"] == 0.009 and rows[-1]["paper_backward"] == 0.156
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_method_that_fails_has_its_error_in_its_row(monkeypatch, small_heap):
    def fail(x):
        raise RuntimeError("no kernel\nfor this input")

    functions = {"fails": fail, "works": torch.nn.functional.relu}
    monkeypatch.setattr(benchmark, "operators", lambda pooling: functions)
    copy, fails, works = benchmark.benchmark_pooling("cpu", "float32", "contiguous", *POOLING)
    assert fails["error"] == "RuntimeError: no kernel" and "forward" not in fails
    assert copy["method"] == "copy" and works["backward"] > 0


def test_every_function_runs_twice_in_every_round_on_fresh_arguments():
    calls = {"a": [], "b": []}
    numbers = iter(range(100))
    functions = {name: seen.append for name, seen in calls.items()}
    times = benchmark.medians(functions, "cpu", 3, prepare=lambda name: (next(numbers),))
    assert times.keys() == calls.keys() and min(times.values()) > 0
    pairs = [sorted((calls[name][i], calls[name][i + 1]) for name in calls) for i in range(0, 6, 2)]
    assert pairs == [[(n, n + 1), (n + 2, n + 3)] for n in (0, 4, 8)]


def test_what_is_compared_must_be_known():
    with pytest.raises(ValueError, match="compare must be one of operators, methods, got 'models'"):
        benchmark.benchmark_pooling("cpu", "float32", "contiguous", *POOLING, "models")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rounds=0), "rounds must be at least 1, got 0"),
        (dict(shape=(1, 1, 0, 8)), "shape must be at least 1"),
        (dict(pooling=(0, 1, 0)), "kernel_size must be"),
        (dict(dtype="int8"), "dtype must be one of float32"),
        (dict(layout="x"), "layout must be one of contiguous"),
    ],
)
def test_an_argument_out_of_its_range_is_named(arguments, message):
    defaults = dict(device="cpu", dtype="float32", layout="contiguous", pooling=(2, 2, 0))
    arguments = {**defaults, "shape": (1, 1, 8, 8), **arguments}
    with pytest.raises(UserError, match=message):
        benchmark.benchmark_pooling(**arguments)


class TestCommands:
    def test_op_times_every_method(self, run_script, tmp_path):
        case = ("--shape", 1, 4, 16, 16, "--kernel", "3,2,1", "--layout", "channels_last")
        outputs = ("--json", tmp_path / "op.json", "--plot", tmp_path / "op.png")
        options = ("--device", "cpu", "--rounds", 2)
        out = run_script("benchmarks/benchmark.py", "op", *case, *outputs, *options).stdout
        assert "soft_pool2d" in out and "torch.compile(reference)" in out
        result = json.loads((tmp_path / "op.json").read_text())
        assert result["environment"]["compiled"] is True
        rows = {row["method"]: row for row in result["rows"]}
        assert len(rows) >= 7 and not [row for row in rows.values() if "error" in row]
        for name, row in rows.items():
            assert row["forward"] > 0 and (name == "copy" or row["backward"] > 0)
        nbytes = 4 * 8 * 8 * 4  # the output is the only tensor that forward allocates
        assert nbytes <= rows["soft_pool2d"]["forward_memory"] <= nbytes + 1024
        assert (tmp_path / "op.png").stat().st_size > 10_000

    def test_op_measures_the_instruction_set_that_is_named(self, run_script, tmp_path):
        case = ("--shape", 1, 4, 8, 8, "--kernel", "2,2,0", "--layout", "contiguous")
        options = ("--rounds", 1, "--device", "cpu", "--methods", "soft_pool2d")
        output = ("--json", tmp_path / "op.json")
        run_script(
            "benchmarks/benchmark.py", "op", *case, *options, *output, "--capability", "default"
        )
        result = json.loads((tmp_path / "op.json").read_text())["environment"]
        assert result["cpu_capability"] == "default"

    def test_op_compares_the_methods_that_are_named(self, run_tool, tmp_path):
        case = ("--shape", 1, 4, 16, 16, "--kernel", "3,2,1", "--layout", "contiguous")
        options = ("--device", "cpu", "--rounds", 1, "--json", tmp_path / "op.json")
        methods = ("--methods", "soft_pool2d", "F.max_pool2d")
        assert run_tool("benchmark", "op", *case, *options, *methods)[0] == 0
        rows = json.loads((tmp_path / "op.json").read_text())["rows"]
        assert [row["method"] for row in rows] == ["copy", "soft_pool2d", "F.max_pool2d"]
        status, _, error = run_tool("benchmark", "op", *case, *options, "--methods", "max")
        assert status == 2 and "names must be among soft_pool2d, F.avg_pool2d" in error

    def test_model_times_detectors(self, run_script, tmp_path):
        options = ("--device", "cpu", "--size", 64, 64, "--rounds", 1)
        output = ("--json", tmp_path / "model.json")
        configs = ("configs/demo/demo_retinanet_softpool.py", "configs/yolox_s_softpool.py")
        run_script("benchmarks/benchmark.py", "model", *configs, *options, *output)
        rows = json.loads((tmp_path / "model.json").read_text())["rows"]
        assert len(rows) == 2
        for row in rows:
            assert min(row["train"], row["inference"], row["train_memory"]) > 0

    @pytest.mark.filterwarnings("ignore")
    def test_deploy_runs_exported_files_in_every_engine(self, tmp_path, monkeypatch):
        for package in benchmark.ENGINES:
            pytest.importorskip(package)
        monkeypatch.setattr(benchmark, "DEPLOYED_POOLS", [((1, 2, 8, 8), (2, 2, 0))])
        monkeypatch.setattr(benchmark, "DEPLOYED_NETWORKS", {})
        output = tmp_path / "deploy.json"
        arguments = ["deploy", "--threads", "1", "--rounds", "1", "--json", str(output)]
        in_openvino_thread(benchmark.main, benchmark.make_parser().parse_args(arguments))
        result = json.loads(output.read_text())
        assert {"onnx", "onnxruntime", "openvino"} <= result["environment"].keys()
        assert [(row["input"], row["engine"]) for row in result["rows"]] == [
            (form, engine) for form in ("fast", "exact") for engine in benchmark.ENGINES
        ]
        for row in result["rows"]:
            assert row["ratio"] == row["soft"] / row["max"] > 0
            assert row["difference"] < 1e-6

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_deploy_exports_detectors(self, tmp_path, monkeypatch):
        demo = ("demo_retinanet", False, (96, 128))
        monkeypatch.setattr(benchmark, "DEPLOYED_POOLS", [])
        monkeypatch.setattr(benchmark, "DEPLOYED_NETWORKS", {"demo": demo})
        output = tmp_path / "deploy.json"
        arguments = ["deploy", "--threads", "1", "--rounds", "1", "--json", str(output)]
        in_openvino_thread(benchmark.main, benchmark.make_parser().parse_args(arguments))
        for row in json.loads(output.read_text())["rows"]:
            assert row["ratio"] > 0 and row["difference"] < 1e-4
