"""Several processes, here two on CPUs with gloo, give the results of one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from make_shapes import make_shapes
from mmsoftpool.config import load_config

from ..common import ROOT, config_path

DEMO = config_path("demo_retinanet_softpool")


@pytest.fixture
def launch():
    """Runs one of the launch scripts with two processes."""

    def run(script, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        result = subprocess.run(
            [ROOT / "tools" / script, *map(str, args)],
            env={**os.environ, "PYTHON": sys.executable, "PORT": str(port), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """One step of plain gradient descent, with nothing random and no batch statistics."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=2, val=5)
    return {
        "data_root": str(root),
        "train_cfg.max_epochs": 1,
        "train_cfg.val_interval": 2,
        "train_dataloader.batch_size": 1,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "train_dataloader.sampler.shuffle": False,
        "train_dataloader.dataset.pipeline.2.prob": 0.0,
        "train_dataloader.dataset.pipeline.2.direction": "horizontal",
        "model.backbone.base_channels": 8,
        "model.backbone.norm_eval": True,
        "model.neck.in_channels": [8, 16, 32, 64],
        "model.test_cfg.score_thr": 0.0,
        "optim_wrapper.optimizer": dict(_delete_=True, type="SGD", lr=0.1),
        "optim_wrapper.clip_grad": None,
        "param_scheduler": [],
        "auto_scale_lr.base_batch_size": 8,
    }


def write_config(path, settings):
    """The settings as a config file, for the scripts."""
    cfg = load_config(DEMO, settings)
    cfg.pop("work_dir")
    cfg.dump(path)
    return path


def test_two_processes_train_and_evaluate_as_one(launch, run_tool, tmp_path, settings):
    config = write_config(tmp_path / "demo.py", settings)
    launch("dist_train.sh", config, 2, "--work-dir", tmp_path / "run", "--auto-scale-lr")

    # DistributedDataParallel averages the gradients of the processes: here, of the two images.
    cfg = load_config(str(config), work_dir=str(tmp_path / "one"))
    init_default_scope("mmdet")
    runner = Runner.from_cfg(cfg)
    model = runner.model
    model.init_weights()
    model.train()
    for batch in runner.build_dataloader(cfg.train_dataloader):
        losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
        loss, _ = model.parse_losses(losses)
        (loss / 2).backward()
    lr = 0.1 * 2 / 8  # scaled to the batch of both processes
    trained = torch.load(tmp_path / "run" / "epoch_1.pth", weights_only=False)["state_dict"]
    moved = 0
    for name, weight in model.named_parameters():
        step = 0 if weight.grad is None else lr * weight.grad
        torch.testing.assert_close(
            trained[name], (weight - step).detach(), rtol=1e-5, atol=1e-6, msg=name
        )
        moved += weight.grad is not None and bool((step.abs() > 1e-4).any())
    assert moved > 20  # the step is much larger than the tolerance

    # Two does not divide five images: one of them is evaluated twice and counted once.
    checkpoint = tmp_path / "run" / "epoch_1.pth"
    found = []
    for name in ("two", "one"):
        outfile = f"test_evaluator.outfile_prefix={tmp_path / name}"
        arguments = ("--work-dir", tmp_path / "test", "--cfg-options", outfile)
        if name == "two":
            out = launch("dist_test.sh", config, checkpoint, 2, *arguments)
        else:
            status, out, _ = run_tool("test", config, checkpoint, *arguments)
            assert status == 0
        results = json.loads((tmp_path / f"{name}.bbox.json").read_text())
        table = [line for line in out.splitlines() if "Average" in line]
        found.append((table, sorted(map(json.dumps, results))))
    assert len(found[0][0]) == 12 and len(found[0][1]) > 5
    assert found[0] == found[1]


def test_a_call_without_arguments_prints_the_usage():
    for script in ("dist_train.sh", "dist_test.sh"):
        result = subprocess.run([ROOT / "tools" / script], capture_output=True, text=True)
        assert result.returncode == 2 and f"tools/{script} CONFIG" in result.stderr
