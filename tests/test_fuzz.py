"""Damaged files: every tool ends with the right result, or with one line and exit status 2.

The runs of the usual tests take half a minute. MMSOFTPOOL_FUZZ=50 makes them fifty times as long,
and random instead of the same ones each time; `make fuzz` does that.
"""

import contextlib
import functools
import io
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.runner import Runner
from pycocotools import mask as mask_utils
from torchvision.models import resnet18

import benchmark
from make_shapes import make_shapes
from mmsoftpool import cli, export
from mmsoftpool.config import load_config
from mmsoftpool.evaluation import ab
from mmsoftpool.runner import build_model

from .common import LONGER, SCRIPTS, config_path, load_tool, rand

SUBMISSION = "detections_test-dev2017_x_results"
#: What a value of a JSON file is replaced with; a text between two @ becomes JSON itself.
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    "",
    "1",
    "\ud800",
    [],
    [1, 2],
    ["x"],
    {},
    {"id": 1},
    "@NaN@",
    "@-Infinity@",
    "@1e400@",
    "@" + "9" * 400 + "@",
    "@" + "9" * 5000 + "@",
    "@" + "[" * 100_000 + "]" * 100_000 + "@",
]
TENSORS = {
    "a number": torch.tensor(1.0),
    "sparse": torch.ones(64, 3).to_sparse(),
    "CSR": torch.ones(64, 3).to_sparse_csr(),
    "meta": torch.ones(64, device="meta"),
    "complex": torch.ones(64, dtype=torch.complex64),
    "expanded": torch.ones(1).expand(64),
    "hugely expanded": torch.ones(1, 1).expand(10**9, 512),
    "float8": torch.ones(64).to(torch.float8_e4m3fn),
    "quantized": torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8),
    "bool": torch.ones(64, dtype=torch.bool),
    "NaN": torch.full((64,), float("nan")),
    "empty": torch.ones(0),
    "a text": "x",
    "none": None,
    "a list": [1.0],
}


def damaged_bytes(data, content: bytes) -> bytes:
    """Cuts, inserts, or flips bits of some bytes."""
    place = data.draw(st.integers(0, len(content)))
    kind = data.draw(st.sampled_from(["cut", "insert", "flip"]))
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + data.draw(st.binary(min_size=1, max_size=9)) + content[place:]
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    return bytes(content)


def damaged_json(data, content: bytes) -> bytes:
    """Replaces a value by one of another type, or removes it."""
    tree = json.loads(content)
    parents = [node for node in containers([tree]) if node]  # the list around it: the root too
    parent = data.draw(st.sampled_from(parents))
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    key = data.draw(st.sampled_from(keys))
    if parent is parents[0] or data.draw(st.integers(0, 4)):
        parent[key] = data.draw(st.sampled_from(VALUES))
    else:
        del parent[key]
    text = json.dumps(parents[0][0])
    return re.sub('"@(.+?)@"', r"\1", text).encode()


def containers(node):
    """All dicts and lists in a tree of them."""
    if isinstance(node, (dict, list)):
        yield node
        for value in node.values() if isinstance(node, dict) else node:
            yield from containers(value)


def damaged(data, path: Path) -> None:
    """Damages a file in place."""
    content = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_bytes(damaged_json(data, content))
    elif path.suffix == ".zip" and data.draw(st.booleans()):
        with zipfile.ZipFile(path) as archive:
            (name,) = archive.namelist()
            content = damaged_json(data, archive.read(name))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
    elif path.suffix == ".pth" and data.draw(st.booleans()):
        checkpoint = torch.load(path, weights_only=False)
        weights = checkpoint["state_dict"]
        kind = data.draw(st.sampled_from(["state_dict", "a weight", "a name", "meta"]))
        value = TENSORS[data.draw(st.sampled_from(list(TENSORS)))]
        if kind == "a weight":
            weights[data.draw(st.sampled_from(list(weights)))] = value
        elif kind == "a name":
            weights[data.draw(st.sampled_from(["x", 5, ("x",)]))] = value
        else:
            key = (
                "state_dict"
                if kind == "state_dict"
                else data.draw(st.sampled_from(["best_acc1", "epoch", "arch"]))
            )
            checkpoint[key] = value
        torch.save(checkpoint, path)
    else:
        path.write_bytes(damaged_bytes(data, content))


def start(runner, splits) -> None:
    """Instead of a run: its data sets are built and checked."""
    for split in splits:
        getattr(runner, f"{split}_loop")
    runner.call_hook("before_run")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with valid inputs of all tools."""
    root = tmp_path_factory.mktemp("inputs")
    make_shapes(root, train=2, val=2, size=64)
    val = json.loads((root / "annotations" / "instances_val.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in val["images"]}
    found = []
    for a in val["annotations"]:
        mask = mask_utils.frPyObjects(a["segmentation"], *sizes[a["image_id"]])[0]
        mask["counts"] = mask["counts"].decode()
        found.append(
            dict(
                image_id=a["image_id"],
                category_id=a["category_id"],
                score=0.5,
                bbox=a["bbox"],
                segmentation=mask,
            )
        )
    (root / "a.json").write_text(json.dumps(found))
    shutil.copy(root / "a.json", root / f"{SUBMISSION}.json")
    with zipfile.ZipFile(root / f"{SUBMISSION}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(root / "a.json", f"{SUBMISSION}.json")
    (root / "info.json").write_text(json.dumps({**val, "annotations": []}))
    (root / "a.csv").write_text("sample,prediction,label\nx,1,1\ny,0,1\nz,2,2\n")
    shutil.copy(root / "a.csv", root / "b.csv")
    samples = [
        dict(img_path=name, pred_label=torch.tensor([p]), gt_label=torch.tensor([label]))
        for name, p, label in (("x", 1, 1), ("y", 1, 1), ("z", 0, 2))
    ]
    (root / "b.pkl").write_bytes(pickle.dumps(samples))

    options = {
        "data_root": str(root),
        "model.backbone.base_channels": 8,
        "model.neck.in_channels": [8, 16, 32, 64],
    }
    cfg = load_config(config_path("demo_retinanet_softpool"), options)
    cfg.dump(root / "config.py")
    (root / "config.json").write_text(json.dumps(cfg.to_dict()))
    shutil.copy(root / "config.json", root / "other.json")
    for name in ("config", "other"):
        (root / "ab" / name / "seed_0").mkdir(parents=True)
        shutil.copy(root / "a.json", root / "ab" / name / "seed_0" / "results.bbox.json")
        # As tools/ab.py notes it: the path is that in the copies, which run() works in.
        noted = load_config(str(root / f"{name}.json"), work_dir=f"ab/{name}")
        (root / "ab" / name / "config.py").write_text(noted.pretty_text)
    model = build_model(cfg)
    torch.save(dict(state_dict=model.state_dict(), meta={}), root / "model.pth")
    weights = dict(arch="resnet18", epoch=1, best_acc1=torch.tensor(70.0))
    torch.save(dict(weights, state_dict=resnet18().half().state_dict()), root / "theirs.pth")
    instances = dict(bboxes=rand(3, 4) * 64, scores=rand(3), labels=torch.tensor([0, 1, 2]))
    predictions = [
        dict(img_id=i, img_path=str(root / "val" / f"{i:06d}.jpg"), pred_instances=instances)
        for i in range(2)
    ]
    (root / "predictions.pkl").write_bytes(pickle.dumps(predictions))
    columns = "image,kernel,method,ssim,psnr,match,scale,expectation,seed"
    rows = [f"{i:06d}.jpg,2,average,0.9,30.0,original,1.0,False,0" for i in range(2)]
    (root / "similarity.csv").write_text("".join(f"{line}\r\n" for line in [columns, *rows]))
    return root


VAL = "annotations/instances_val.json"
RESULTS = "ab/other/seed_0/results.bbox.json"
#: For each tool, its arguments, of which those with a suffix are files, and the files to damage.
CASES = {
    "compare boxes": (
        f"compare {VAL} --a a.json --b a.json --resamples 2",
        (VAL, "a.json"),
        60,
    ),
    "compare masks": (
        f"compare {VAL} --a a.json --b a.json --resamples 2 --iou-type segm",
        (VAL, "a.json"),
        60,
    ),
    "mcnemar CSV": ("mcnemar a.csv b.csv", ("a.csv", "b.csv"), 60),
    "mcnemar pickles": ("mcnemar a.csv b.pkl", ("b.pkl",), 60),
    "check JSON": (
        f"test-dev --check {SUBMISSION}.json --ann-file info.json",
        (f"{SUBMISSION}.json", "info.json"),
        60,
    ),
    "check zip": (
        f"test-dev --check {SUBMISSION}.zip --ann-file info.json",
        (f"{SUBMISSION}.zip",),
        60,
    ),
    "shapes": ("make_shapes . --train 2 --val 2 --size 64", (VAL,), 10),
    "similarity": (
        "image_similarity val/ --kernel 2 --methods average --csv similarity.csv --resume",
        ("similarity.csv", "val/000000.jpg"),
        20,
    ),
    "draw run": ("draw_run config.py predictions.pkl", ("predictions.pkl",), 8),
    "draw pooling": (
        "draw_pooling val/000000.jpg --out out.png --kernel 2 --methods average",
        ("val/000000.jpg",),
        4,
    ),
    "train": ("train config.json", ("annotations/instances_train.json", VAL), 15),
    "test": ("test config.json model.pth", ("model.pth", VAL), 15),
    "ab": (
        "ab config.json other.json --seeds 0 --work-dir ab/ --resamples 2",
        (VAL, RESULTS, "ab/config/config.py"),
        10,
    ),
    "export": ("export config.json model.pth --format pt2", ("model.pth",), 10),
    "convert": ("convert theirs.pth out.pth", ("theirs.pth",), 6),
}


def run(line: str | list[str], folder: Path) -> tuple[int, str, str]:
    """Runs a tool in this process; returns its exit status, stdout and stderr."""
    name, *arguments = line.split() if isinstance(line, str) else line
    out, err, status = io.StringIO(), io.StringIO(), 0
    here = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if name in cli.COMMANDS:
                cli.main([name, *arguments])
            else:
                (path,) = (path for path in SCRIPTS if path.stem == name)
                # `stub` changes that module.
                tool = benchmark if name == "benchmark" else load_tool(path)
                cli.run(tool.main, tool.make_parser().parse_args(arguments))
    except SystemExit as error:
        status = error.code
    finally:
        os.chdir(here)
    return status, out.getvalue(), err.getvalue()


def copy(inputs: Path, work: Path, line: str) -> None:
    """Copies the inputs, without the large one where the line does not name it."""
    shutil.rmtree(work, ignore_errors=True)
    ignored = ["theirs.pth"] if "theirs.pth" not in line else []
    shutil.copytree(inputs, work, ignore=shutil.ignore_patterns(*ignored))


def no_run(command, run, title, lock):
    """Instead of a training or an evaluation, which the other cases damage."""
    raise ChildProcessError(f"{run.name} failed")


@pytest.fixture
def stub(monkeypatch):
    # A logger of an earlier test in this process would report that its stream is closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    for name, splits in (("train", ("train", "val")), ("test", ("test",))):
        monkeypatch.setattr(Runner, name, functools.partialmethod(start, splits))
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)  # starts the compilers
    monkeypatch.setattr(ab, "_execute", no_run)
    # What takes seconds once a detector is built, or a picture pooled.
    monkeypatch.setattr(export, "export", lambda network, format, out: Path(out).touch() or 0.0)
    monkeypatch.setattr(
        benchmark, "medians", lambda functions, *_, **__: dict.fromkeys(functions, 1.0)
    )
    monkeypatch.setattr(benchmark, "peak_memory", lambda function, device: 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
class TestDamage:
    def test_the_undamaged_files_are_right(self, case, inputs, tmp_path, stub):
        copy(inputs, tmp_path / "work", CASES[case][0])
        status, _, err = run(CASES[case][0], tmp_path / "work")
        assert status == 0, err

    def test_damage_is_one_line(self, case, inputs, tmp_path, stub):
        line, files, examples = CASES[case]

        @settings(
            max_examples=examples * LONGER,
            derandomize=LONGER == 1,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to make a failing example smaller would take minutes
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def damage(data):
            work = tmp_path / "work"
            copy(inputs, work, line)
            damaged(data, work / data.draw(st.sampled_from(files)))
            status, out, err = run(line, work)
            if status == 0:
                assert not re.search(r"\bnan\b|\binf\b", out), out
            else:
                assert (status, err.count("\n")) == (2, 1) and err.startswith("error: "), err

        damage()


#: Values for any argument of a tool.
WORDS = ["", "0", "-1", "1", "1.5", "nan", "1e400", "9" * 30, "x", "a,b", "x=", "=", "\u00e9", "/"]
#: For each of some tools, a command line, and the places of the arguments to replace.
LINES = {
    "ab": "ab config.json other.json --seeds 0 --work-dir ab/ --resamples 2 --gpus 1",
    "export": "export config.json model.pth --format pt2 --out out.pt2",
    "benchmark": "benchmark op --kernel 2,2,0 --shape 1 2 4 4 --rounds 1 --threads 1 --device cpu "
    "--dtype float32 --layout contiguous --json out.json",
    "benchmark sass": "benchmark sass --arch 9.0 --library x.so --sms 1 --clock 1 --json out.json",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LINES)
def test_a_wrong_argument_is_one_line(case, inputs, tmp_path, stub):
    words = LINES[case].split()
    places = [i for i in range(1, len(words)) if not words[i].startswith("--")]
    copy(inputs, tmp_path / "work", LINES[case])

    @settings(
        max_examples=10 * LONGER,
        derandomize=LONGER == 1,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(places), st.sampled_from(WORDS))
    def replace(place, word):
        line = [*words[:place], word, *words[place + 1 :]]
        status, _, err = run(line, tmp_path / "work")
        last = err.rstrip("\n").split("\n")[-1]  # argparse prints the usage before it
        assert status == 0 or (status == 2 and "error: " in last and "Traceback" not in err), err

    replace()
