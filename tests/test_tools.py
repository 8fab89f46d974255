"""The command lines, run as a user runs them."""

import json
import pickle
import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from mmsoftpool import engine
from mmsoftpool.datasets.shapes import make_shapes

from .common import ROOT
from .engine.test_runner import SMALL

DEMO = "configs/demo_retinanet_softpool.py"

SMALL = [f"{key}={value}" for key, value in SMALL.items()]


@pytest.mark.parametrize(
    ("config", "score_thr", "metrics"),
    [
        ("configs/retinanet_r50_softpool.py", "model.test_cfg.score_thr=0", ["bbox"]),
        ("configs/mask_rcnn_r50_softpool.py", "model.test_cfg.rcnn.score_thr=0", ["bbox", "segm"]),
    ],
)
def test_r50_trains_saves_resumes_and_evaluates_on_coco(
    run_script, coco_root, tmp_path, config, score_thr, metrics
):
    options = ("--work-dir", tmp_path, "--cfg-options", f"data_root={coco_root}", *SMALL, score_thr)
    first = run_script("tools/train.py", config, *options).stdout
    losses = [float(x) for x in re.findall(r"Epoch\(train\) .* loss: ([\d.]+)", first)]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    for metric in metrics:
        assert re.search(rf"Epoch\(val\) \[1\].*coco/{metric}_mAP: [\d.]+", first)
    assert (tmp_path / "epoch_1.pth").exists()

    second = run_script(
        "tools/train.py", config, "--resume", *options, "train_cfg.max_epochs=2"
    ).stdout
    assert f"resuming from {tmp_path}/epoch_1.pth" in second
    assert re.findall(r"Epoch\(train\) +\[(\d)\]\[(\d)/2\]", second) == [("2", "1"), ("2", "2")]

    predictions = tmp_path / "predictions.pkl"
    pictures = tmp_path / "pictures"
    test = run_script(
        "tools/test.py", config, tmp_path / "epoch_2.pth", "--out", predictions,
        "--show-dir", pictures, *options,
    ).stdout  # fmt: skip
    for metric in metrics:
        assert re.search(rf"Epoch\(test\).*coco/{metric}_mAP: [\d.]+", test)
    found = pickle.loads(predictions.read_bytes())
    assert len(found) == len(list(pictures.iterdir())) == 4
    assert all(torch.isfinite(p["pred_instances"]["bboxes"]).all() for p in found)
    assert all(("masks" in p["pred_instances"]) == ("segm" in metrics) for p in found)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder with a small data set in shapes/."""
    path = tmp_path_factory.mktemp("demo")
    make_shapes(path / "shapes", train=16, val=4)
    return path


class TestDemo:
    def test_runs_as_make_demo_does(self, run_script, run_dir):
        options = ("--work-dir", run_dir / "run", "--cfg-options", f"data_root={run_dir}/shapes")
        small = (
            "train_cfg.max_epochs=2",
            "default_hooks.logger.interval=1",
            "model.test_cfg.score_thr=0",
        )
        run_script("tools/train.py", DEMO, "--resume", *options, *small)
        done = run_script("tools/train.py", DEMO, "--resume", *options, *small).stdout
        assert "Epoch(train)" not in done  # nothing is left to train
        out = run_script(
            "tools/test.py", DEMO, run_dir / "run" / "epoch_2.pth",
            "--out", run_dir / "predictions.pkl", *options, *small,
        ).stdout  # fmt: skip
        assert "Average Precision" in out
        run_script(
            "tools/draw_run.py", DEMO, "--predictions", run_dir / "predictions.pkl", *options
        )
        for name in ("curves.png", "detections.png"):
            assert (run_dir / "run" / name).stat().st_size > 10_000

    def test_a_max_pool_detectors_checkpoint_evaluates_with_soft_pool(self, run_script, run_dir):
        max_pool = engine.load_config(str(ROOT / "configs/demo_retinanet_maxpool.py"))
        init_default_scope("mmdet")
        model = MODELS.build(max_pool.model)
        assert type(model.backbone.maxpool) is torch.nn.MaxPool2d
        torch.save(dict(state_dict=model.state_dict()), run_dir / "max_pool.pth")
        out = run_script(
            "tools/test.py", DEMO, run_dir / "max_pool.pth", "--work-dir", run_dir / "swap",
            "--cfg-options", f"data_root={run_dir}/shapes", "model.test_cfg.score_thr=0",
        ).stdout  # fmt: skip
        assert re.search(r"Epoch\(test\).*coco/bbox_mAP: [\d.]+", out)

    def test_a_checkpoint_of_another_model_is_refused(self, run_script, run_dir):
        for name, content in (("other", {"x": torch.zeros(1)}), ("broken", None)):
            path = run_dir / f"{name}.pth"
            torch.save(dict(state_dict=content), path) if content else path.write_bytes(b"PK\3\4")
            result = run_script(
                "tools/test.py", DEMO, path, "--work-dir", run_dir / "refused",
                "--cfg-options", f"data_root={run_dir}/shapes", check=False,
            )  # fmt: skip
            assert result.returncode == 2
            assert f"error: {path} does not fit the model or is damaged" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tools/train.py", "configs/missing.py"], "error: no config file at /"),
        (
            ["tools/train.py", DEMO, "--cfg-options", "data_root=/missing"],
            "error: no train annotations at /missing/annotations/instances_train.json; draw",
        ),
        (["tools/test.py", "configs/missing.py", "x.pth"], "error: no config file at /"),
        (["tools/make_shapes.py", "/tmp/x", "--train", "0"], "error: train must be at least 1"),
        (["tools/draw_run.py", DEMO, "--work-dir", "/missing"], "error: no training log"),
        (
            ["tools/compare.py", "detectors", "/missing", "--a", "a.json", "--b", "b.json"],
            "error: no annotation file at /missing",
        ),
        (["tools/compare.py", "classifiers", "a.csv", "b.csv"], "error: no prediction file at /"),
        (["tools/test_dev.py", "--check", "x.zip", "--ann-file", "/x"], "error: no image list of"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(run_script, arguments, message):
    result = run_script(*arguments, check=False)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(message), result.stderr
    assert "Traceback" not in result.stderr


TOOLS = [path.stem for path in sorted((ROOT / "tools").glob("*.py"))]
TOOLS.remove("torchvision_without_cuda")


@pytest.mark.parametrize("tool", TOOLS)
def test_help(run_script, tool):
    text = run_script(f"tools/{tool}.py", "--help").stdout
    assert re.search(r"Examples?:\s+python tools/", text)


class TestCompare:
    def test_classifiers_by_counts(self, run_script, tmp_path):
        out = run_script(
            "tools/compare.py", "classifiers", "--counts", 31838, 3795, 3011, 11356,
            "--names", "max", "SoftPool", "--markdown", tmp_path / "table.md",
        ).stdout  # fmt: skip
        assert "chi-square 90.08, p = 2.29e-21" in out
        assert "max 69.70%, SoftPool 71.27%, difference +1.57 points" in out
        assert (tmp_path / "table.md").read_text() == out

    def test_detectors(self, run_script, tmp_path):
        make_shapes(tmp_path, train=1, val=3)
        ann_file = tmp_path / "annotations" / "instances_val.json"
        boxes = json.loads(ann_file.read_text())["annotations"]
        for name, objects in (("a", boxes[::2]), ("b", boxes)):
            found = [
                dict(image_id=o["image_id"], category_id=o["category_id"], bbox=o["bbox"], score=1)
                for o in objects
            ]
            (tmp_path / f"{name}.json").write_text(json.dumps(found))
        out = run_script(
            "tools/compare.py", "detectors", ann_file, "--a", tmp_path / "a.json",
            "--b", tmp_path / "b.json", "--resamples", 10, "--plot", tmp_path / "plot.png",
        ).stdout  # fmt: skip
        assert re.search(r"\| B +\| +100.0 \|", out) and "3 images; 1 and 1 runs" in out
        assert (tmp_path / "plot.png").stat().st_size > 10_000


class TestBenchmark:
    def test_op_times_every_method(self, run_script, tmp_path):
        out = run_script(
            "tools/benchmark.py", "op", "--device", "cpu", "--shape", 1, 4, 16, 16, "--rounds", 2,
            "--kernel", "3,2,1", "--layout", "channels_last",
            "--json", tmp_path / "op.json", "--plot", tmp_path / "op.png",
        ).stdout  # fmt: skip
        assert "soft_pool2d" in out and "torch.compile(reference)" in out
        result = json.loads((tmp_path / "op.json").read_text())
        assert result["environment"]["compiled"] is True
        rows = {row["method"]: row for row in result["rows"]}
        assert len(rows) >= 7 and not [row for row in rows.values() if "error" in row]
        for name, row in rows.items():
            assert row["forward"] > 0 and (name == "copy" or row["backward"] > 0)
        nbytes = 4 * 8 * 8 * 4  # of the output, the one tensor that the forward makes
        assert nbytes <= rows["soft_pool2d"]["forward_memory"] <= nbytes + 1024
        assert (tmp_path / "op.png").stat().st_size > 10_000

    def test_model_times_detectors(self, run_script, tmp_path):
        run_script(
            "tools/benchmark.py", "model", DEMO, "--device", "cpu", "--size", 64, 64, "--rounds", 1,
            "--json", tmp_path / "model.json",
        )  # fmt: skip
        (row,) = json.loads((tmp_path / "model.json").read_text())["rows"]
        assert min(row["train"], row["inference"], row["train_memory"]) > 0
