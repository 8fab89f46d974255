"""The tools, run as a user runs them."""

import argparse
import json
import pickle
import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from make_shapes import make_shapes
from mmsoftpool import cli
from mmsoftpool.config import load_config

from .common import ROOT, SCRIPTS, SMALL, config_path, load_tool

DEMO = "configs/demo/demo_retinanet_softpool.py"

SMALL_OPTIONS = [f"{key}={value}" for key, value in SMALL.items()]


@pytest.mark.slow
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
    options = ("--work-dir", tmp_path, "--cfg-options", f"data_root={coco_root}")
    options += (*SMALL_OPTIONS, score_thr)
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
    outputs = ("--out", predictions, "--show-dir", pictures)
    test = run_script("tools/test.py", config, tmp_path / "epoch_2.pth", *outputs, *options).stdout
    for metric in metrics:
        assert re.search(rf"Epoch\(test\).*coco/{metric}_mAP: [\d.]+", test)
    found = pickle.loads(predictions.read_bytes())
    assert len(found) == len(list(pictures.iterdir())) == 4
    assert all(torch.isfinite(p["pred_instances"]["bboxes"]).all() for p in found)
    assert all(("masks" in p["pred_instances"]) == ("segm" in metrics) for p in found)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder with a small synthetic data set in shapes/."""
    path = tmp_path_factory.mktemp("demo")
    make_shapes(path / "shapes", train=16, val=4)
    return path


class TestDemo:
    def test_runs_as_make_demo_does(self, run_script, run_tool, run_dir):
        options = ("--work-dir", run_dir / "run", "--cfg-options", f"data_root={run_dir}/shapes")
        small = (
            "train_cfg.max_epochs=2",
            "default_hooks.logger.interval=1",
            "model.test_cfg.score_thr=0",
        )
        run_script("tools/train.py", DEMO, "--resume", *options, *small)
        status, done, _ = run_tool("train", ROOT / DEMO, "--resume", *options, *small)
        assert status == 0 and "Epoch(train)" not in done  # the training is complete
        tested = (DEMO, run_dir / "run" / "epoch_2.pth", "--out", run_dir / "predictions.pkl")
        out = run_script("tools/test.py", *tested, *options, *small).stdout
        assert "Average Precision" in out
        drawn = run_tool("draw_run", ROOT / DEMO, run_dir / "predictions.pkl", *options[2:])
        assert drawn[0] == 0
        assert (run_dir / "detections.png").stat().st_size > 10_000

    def test_a_max_pool_detectors_checkpoint_evaluates_with_soft_pool(self, run_tool, run_dir):
        max_pool = load_config(str(ROOT / "configs/demo/demo_retinanet_maxpool.py"))
        init_default_scope("mmdet")
        model = MODELS.build(max_pool.model)
        assert type(model.backbone.maxpool) is torch.nn.MaxPool2d
        torch.save(dict(state_dict=model.state_dict()), run_dir / "max_pool.pth")
        options = (f"data_root={run_dir}/shapes", "model.test_cfg.score_thr=0")
        arguments = ("--work-dir", run_dir / "swap", "--cfg-options", *options)
        status, out, _ = run_tool("test", ROOT / DEMO, run_dir / "max_pool.pth", *arguments)
        assert status == 0 and re.search(r"Epoch\(test\).*coco/bbox_mAP: [\d.]+", out)

    def test_a_foreign_or_damaged_checkpoint_is_refused(self, run_tool, run_dir):
        torch.save(dict(state_dict={"x": torch.zeros(1)}), run_dir / "other.pth")
        (run_dir / "broken.pth").write_bytes(b"PK\3\4")
        arguments = ("--work-dir", run_dir / "no", "--cfg-options", f"data_root={run_dir}/shapes")
        for name in ("other", "broken"):
            path = run_dir / f"{name}.pth"
            status, _, err = run_tool("test", ROOT / DEMO, path, *arguments)
            assert status == 2
            message = "does not fit the model of" if name == "other" else "is damaged or not a"
            assert f"error: {path} {message}" in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train missing.py", "no config file at /"),
        (f"train {ROOT / DEMO} --cfg-options data_root=/missing", "missing file: /missing/annotat"),
        ("test missing.py x.pth", "no config file at /"),
        ("make_shapes /tmp/x --train 0", "train must be at least 1"),
        (f"draw_run {ROOT / DEMO} /missing", "no prediction file at /missing"),
        ("compare /missing --a a.json --b b.json", "no annotation file at /missing"),
        ("mcnemar a.csv b.csv", "no prediction file at /"),
        ("test-dev --check x.zip --ann-file /x", "no image list of"),
    ],
)
def test_a_mistake_is_one_line(run_tool, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run_tool(*command.split())
    assert status == 2 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith(f"error: {message}")


def test_a_mistyped_config_is_told_before_mmdet_is_imported(run_script):
    code = (
        "import sys; from mmsoftpool.cli import main\n"
        "for command in ('train', 'test', 'test-dev', 'swap', 'robustness', 'export'):\n"
        "    try: main([command, 'missing.py', *['x.pth'][: command != 'train']])\n"
        "    except SystemExit as end: print(end.code, 'mmdet.models' in sys.modules)\n"
    )
    result = run_script("-c", code)
    assert result.stdout == "2 False\n" * 6
    assert result.stderr.count("error: no config file at /") == 6


def with_commands(parser):
    """The parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


PARSERS = {
    **{
        str(path.relative_to(ROOT)): lambda path=path: load_tool(path).make_parser()
        for path in SCRIPTS
    },
    "mmsoftpool": cli.make_command_parser,
}


@pytest.mark.parametrize("name", PARSERS)
class TestParsers:
    def test_the_help_has_an_example(self, name):
        parser = PARSERS[name]()
        command = "mmsoftpool" if name == "mmsoftpool" else f"python {name}"
        parsers = list(with_commands(parser))[1:] if name == "mmsoftpool" else [parser]
        for parser in parsers:
            assert re.search(rf"Examples?:\s+{command}", parser.format_help())

    def test_every_option_has_a_help_text(self, name):
        for parser in with_commands(PARSERS[name]()):
            assert parser.format_help()  # the texts' % are right
            assert not [
                action.dest
                for action in parser._actions
                if not action.help and not isinstance(action, argparse._SubParsersAction)
            ]


def test_the_work_dir_of_an_experiment_names_its_configs(monkeypatch):
    used = []

    def compare_configs(configs, seeds, work_dir, *args, **kwargs):
        used.append(str(work_dir))
        return {}

    monkeypatch.setattr("mmsoftpool.evaluation.ab.compare_configs", compare_configs)
    for configs in (["a.py", "x/b.py"], ["a.py", "b.py", "c.py"]):
        with pytest.raises(SystemExit):
            cli.main(["ab", *configs])
    assert used == ["work_dirs/a_vs_b", "work_dirs/a_vs_2_others"]


class TestCompare:
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
        files = ("--a", tmp_path / "a.json", "--b", tmp_path / "b.json")
        options = ("--resamples", 10, "--plot", tmp_path / "plot.png")
        out = run_script("-m", "mmsoftpool", "compare", ann_file, *files, *options).stdout
        assert re.search(r"\| B +\| +100.0 \|", out) and "3 images; 1 run of each" in out
        assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("tool", "arguments", "lacking"),
    [
        ("train", "CONFIG", ["train_dataloader", "train_cfg", "optim_wrapper"]),
        ("test", "CONFIG x.pth", ["test_dataloader", "test_evaluator", "test_cfg"]),
        ("test-dev", "CONFIG x.pth", ["test_dataloader", "test_evaluator", "test_cfg"]),
        ("test-dev", "CONFIG x.pth", ["test_dataloader.dataset"]),
        ("ab", "CONFIG OTHER", ["test_evaluator", "test_evaluator.ann_file"]),
    ],
)
def test_a_config_without_a_part_is_one_line(run_tool, tmp_path, tool, arguments, lacking):
    make_shapes(tmp_path / "shapes", train=1, val=1)
    info = json.loads((tmp_path / "shapes/annotations/instances_val.json").read_text())
    (tmp_path / "info.json").write_text(json.dumps({**info, "annotations": []}))
    torch.save(dict(state_dict={}), tmp_path / "x.pth")
    options = ["--work-dir", tmp_path / "work", "--cfg-options", f"data_root={tmp_path}/shapes"]
    if tool == "test-dev":
        options[:0] = ["--ann-file", tmp_path / "info.json", "--image-dir", tmp_path / "shapes/val"]
    for part in lacking:
        name, _, key = part.partition(".")
        content = {} if key == "dataset" else dict(type="CocoMetric")
        for config in ("CONFIG", "OTHER"):
            (tmp_path / f"{config}.py").write_text(
                f"_base_ = {config_path('demo_retinanet_softpool')!r}\n"
                + (f"{name} = dict(_delete_=True, **{content})\n" if key else f"{name} = None\n")
            )
        names = {"CONFIG": "CONFIG.py", "OTHER": "OTHER.py", "x.pth": "x.pth"}
        paths = [tmp_path / names[word] for word in arguments.split()]
        status, _, err = run_tool(tool, *paths, *options)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert part in err
