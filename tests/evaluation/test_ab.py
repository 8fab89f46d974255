"""mmsoftpool ab: every config is trained once per seed, and an interrupted call resumes."""

import fcntl
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from make_shapes import make_shapes
from mmsoftpool.config import load_config
from mmsoftpool.errors import UserError
from mmsoftpool.evaluation import ab
from mmsoftpool.evaluation.ab import compare_configs
from mmsoftpool.evaluation.comparison import compare_detections
from mmsoftpool.files import write_text

from ..common import ROOT, config_path

NAMES = ("demo_retinanet_maxpool", "demo_retinanet_softpool")
CONFIGS = tuple(config_path(name) for name in NAMES)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=4, val=4)
    return (
        "--cfg-options",
        f"data_root={root}",
        "train_cfg.max_epochs=1",
        "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=0",
        "default_hooks.logger.interval=1",
        "model.backbone.base_channels=8",
        "model.neck.in_channels=[8,16,32,64]",
        "model.test_cfg.score_thr=0",
    )


def test_trains_the_pair_and_resumes_after_an_interruption(run_tool, tmp_path, options):
    command = ("ab", *CONFIGS, "--seeds", 3, "--work-dir", tmp_path, "--resamples", 10, *options)
    first, second = (tmp_path / name / "seed_3" for name in NAMES)
    # Another process holds the lock of the second run: the call ends after the first.
    second.mkdir(parents=True)
    with (second / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = run_tool(*command)
    assert status == 2 and f"error: another process is executing the run in {second}" in err
    assert "randomness.seed=3" in (first / "log").read_text()
    assert (first / "results.bbox.json").exists() and not (second / "results.bbox.json").exists()

    # As if the first run had been interrupted between training and test.
    (first / "results.bbox.json").unlink()
    status, out, _ = run_tool(*command)
    assert status == 0
    progress = re.findall(r"\[run (\d) of 2: (\w+), seed 3\] Epoch\((\w+)\)", out)
    assert list(dict.fromkeys(progress)) == [
        ("1", NAMES[0], "test"),  # it is not trained again
        ("2", NAMES[1], "train"),
        ("2", NAMES[1], "val"),
        ("2", NAMES[1], "test"),
    ]
    table = (tmp_path / "comparison_bbox.md").read_text()
    assert table in out and "4 images; 1 run of each model" in table
    assert (tmp_path / "comparison_bbox.png").exists()

    status, again, _ = run_tool(*command)
    assert status == 0
    assert again.count("seed 3: already finished") == 2 and "Epoch(" not in again and table in again
    status, _, err = run_tool(*command, "model.test_cfg.score_thr=0.5")
    assert status == 2 and "score_thr=0.5" in err
    assert f"has runs of {CONFIGS[0]} with other settings" in err


def test_every_config_is_compared_with_the_first(tmp_path):
    root = tmp_path / "shapes"
    make_shapes(root, train=1, val=4)
    boxes = json.loads((root / "annotations" / "instances_val.json").read_text())["annotations"]
    configs = []
    for number, name in enumerate(("one", "two", "three")):
        config = tmp_path / f"{name}.py"
        config.write_text(f"_base_ = {CONFIGS[0]!r}")
        configs.append(str(config))
        # The results of a finished run, from before this call: the first 1/3, 2/3 and all objects.
        found = [
            dict(image_id=o["image_id"], category_id=o["category_id"], bbox=o["bbox"], score=1)
            for o in boxes[: len(boxes) * (number + 1) // 3]
        ]
        run = tmp_path / "runs" / name / "seed_0"
        run.mkdir(parents=True)
        (run / "results.bbox.json").write_text(json.dumps(found))
    comparisons = compare_configs(
        configs,
        [0],
        tmp_path / "runs",
        cfg_options=[f"data_root={root}"],
        resamples=10,
        names=["one", "2", "three"],
    )
    comparison = comparisons["bbox"]
    assert comparison.names == ("one", "2", "three")
    assert 0 < comparison.differences[0, 0] < comparison.differences[1, 0]
    table = (tmp_path / "runs" / "comparison_bbox.md").read_text()
    assert table == comparison.markdown() and "| three: difference" in table
    assert (tmp_path / "runs" / "comparison_bbox.png").exists()


def test_the_classes_are_those_of_the_test_data_set(tmp_path):
    root = tmp_path / "shapes"
    make_shapes(root, train=1, val=4)
    ann_file = root / "annotations" / "instances_val.json"
    boxes = json.loads(ann_file.read_text())["annotations"]
    found = [{k: o[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1} for o in boxes]
    results = {}
    for name, count in (("one", 3), ("two", 2)):
        config = tmp_path / f"{name}.py"
        config.write_text(f"_base_ = {CONFIGS[0]!r}")
        run = tmp_path / "runs" / name / "seed_0"
        run.mkdir(parents=True)
        (run / "results.bbox.json").write_text(json.dumps(found[::count]))
        results[name] = [run / "results.bbox.json"]
    options = [f"data_root={root}", "test_dataloader.dataset.metainfo.classes=[square,disc]"]
    configs = [str(tmp_path / f"{name}.py") for name in results]
    made = compare_configs(configs, [0], tmp_path / "runs", cfg_options=options, resamples=2)
    scores = np.array(made["bbox"].scores)
    two = compare_detections(ann_file, results, classes=("disc", "square"), resamples=2)
    every = compare_detections(ann_file, results, resamples=2)
    np.testing.assert_array_equal(scores, two.scores)
    assert (scores[:, 0, 0] != np.array(every.scores)[:, 0, 0]).all()


@pytest.mark.parametrize(
    ("configs", "arguments", "error", "message"),
    [
        (
            CONFIGS,
            dict(seeds=[1, 1]),
            ValueError,
            r"seeds must be different numbers of at least 0, got \[1, 1\]",
        ),
        (CONFIGS, dict(seeds=[]), ValueError, r"seeds must be .*, got \[\]"),
        (CONFIGS, dict(gpus=0), ValueError, "gpus must be at least 1, got 0"),
        (
            CONFIGS,
            dict(names=["a", "a"]),
            ValueError,
            r"names must be 2 different ones, .*'a', 'a'",
        ),
        (CONFIGS, dict(resamples=0), ValueError, "resamples must be at least 1, got 0"),
        (CONFIGS, dict(cfg_options=["x"]), ValueError, "form key=value, got 'x'"),
        (CONFIGS[:1], {}, ValueError, "configs must be at least two with different names"),
        ([CONFIGS[0]] * 2, {}, ValueError, "configs must be at least two with different names"),
        (
            [CONFIGS[0], "configs/retinanet_r18_softpool.py"],
            {},
            ValueError,
            "must be evaluated on the same .*, got other annotations and classes",
        ),
        ([CONFIGS[0], "configs/missing.py"], {}, FileNotFoundError, "no config file at"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, monkeypatch, configs, arguments, error, message):
    monkeypatch.chdir(ROOT)
    arguments = {**dict(seeds=[0], work_dir=tmp_path), **arguments}
    with pytest.raises(error, match=message):
        compare_configs(list(configs), **arguments)


def test_a_refused_call_records_nothing_and_the_folder_may_move(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    make_shapes(root, train=1, val=1)
    options = [f"data_root={root}"]
    configs = [tmp_path / "one.py", tmp_path / "two.py"]
    for config, annotations in zip(configs, ("val", "other"), strict=True):
        ann_file = f"{root}/annotations/instances_{annotations}.json"
        settings = f"_base_ = {CONFIGS[0]!r}\ntest_evaluator = dict(ann_file={ann_file!r})"
        config.write_text(settings)
    configs = list(map(str, configs))
    with pytest.raises(UserError, match="got other annotations"):
        compare_configs(configs, [0], tmp_path / "runs", cfg_options=options)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "two.py").write_text(settings.replace("other", "val"))
    monkeypatch.setattr(ab, "_run_all", lambda *_: None)
    for folder in (tmp_path / "runs", tmp_path / "moved"):
        with pytest.raises(FileNotFoundError, match=r"results\.bbox\.json"):
            compare_configs(configs, [0], folder, cfg_options=options)
        if folder.name == "runs":
            folder.rename(tmp_path / "moved")


@pytest.mark.parametrize(("thresholds", "refused"), [((0, 0), 0), ((0, 0.5), 1)])
def test_of_two_calls_at_the_same_time_one_notes_its_settings(
    tmp_path, monkeypatch, thresholds, refused
):
    cfgs = [load_config(CONFIGS[0], {"model.test_cfg.score_thr": value}) for value in thresholds]
    both_write = threading.Barrier(2)

    def write(path, text):
        with suppress(threading.BrokenBarrierError):  # the other call waits for this one
            both_write.wait(timeout=0.5)
        write_text(path, text)

    monkeypatch.setattr(ab, "write_text", write)
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(ab._check_settings, "a.py", cfg, tmp_path / "run") for cfg in cfgs]
    errors = [call.exception() for call in calls if call.exception()]
    assert [type(error) for error in errors] == [UserError] * refused
    assert all("with other settings" in str(error) for error in errors)


def test_the_output_of_a_failing_run_is_shown(run_tool, tmp_path):
    options = ("--work-dir", tmp_path, "--cfg-options", "data_root=/missing")
    status, _, err = run_tool("ab", *CONFIGS, *options)
    assert status == 2
    assert "error: missing file: /missing/annotations/instances_train.json" in err
    assert "demo_retinanet_maxpool, seed 0 failed with exit status 2" in err
