"""mmsoftpool swap: a network trained with max pooling, evaluated with SoftPool over alpha."""

from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from make_shapes import make_shapes
from mmsoftpool.config import load_config
from mmsoftpool.evaluation.swap import evaluate_swap
from mmsoftpool.runner import build_model

from ..common import config_path, randn

SMALL = {
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": [8, 16, 32, 64],
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=6, val=2)
    return root


@pytest.fixture
def load(shapes, tmp_path):
    """Reads the demo's config with max pooling, small, and other settings of it."""

    def load(name="demo_retinanet_maxpool", **settings):
        options = {**SMALL, "data_root": str(shapes), **settings}
        return load_config(config_path(name), options, work_dir=str(tmp_path / "swap"))

    return load


@pytest.fixture
def checkpoint(load, tmp_path):
    """Weights of a network whose batch norm has statistics of its own."""
    torch.manual_seed(0)
    model = build_model(load())
    model.backbone.train()
    model.backbone(randn(2, 3, 64, 64))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


@pytest.fixture
def evaluations(monkeypatch):
    """Takes the place of the evaluation: the score is one of the backbone alone."""
    scores = []

    def val(runner):
        runner.model.eval()
        with torch.no_grad():
            features = runner.model.backbone(randn(1, 3, 64, 64, seed=1))
        scores.append(float(features[0].double().mean()))
        return {"score": scores[-1]}

    monkeypatch.setattr(Runner, "val", val)
    return scores


def _score(cfg, checkpoint, **pool):
    cfg.model.backbone.stem_pool = pool
    model = build_model(cfg)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    model.eval()
    with torch.no_grad():
        return float(model.backbone(randn(1, 3, 64, 64, seed=1))[0].double().mean())


def test_the_scores_are_those_of_the_network_with_each_pool(load, checkpoint, evaluations):
    swap = evaluate_swap(load(), [checkpoint], [0.0, 1.0, 1e30])
    assert swap.metric == "score" and swap.renewed is None
    average = dict(type="torch.nn.AvgPool2d", count_include_pad=False)
    assert swap.swapped[0, 0] == pytest.approx(_score(load(), checkpoint, **average), rel=1e-6)
    assert swap.swapped[0, 1] == pytest.approx(_score(load(), checkpoint, type="SoftPool2d"))
    assert swap.swapped[0, 2] == swap.trained[0]
    assert swap.trained[0] == _score(load(), checkpoint, type="torch.nn.MaxPool2d")
    assert len(set(evaluations)) == 3


@pytest.mark.parametrize("frozen", [dict(frozen_stages=1, norm_eval=True), {}])
def test_new_statistics_are_those_of_the_training_images(
    load, checkpoint, evaluations, frozen, monkeypatch
):
    cfg = load(**{f"model.backbone.{key}": value for key, value in frozen.items()})
    cfg.train_dataloader.dataset.pipeline[2].prob = 0.0
    swap = evaluate_swap(cfg, [checkpoint], [1e30], batch_norm=3)

    # The same in float64, with max pooling: mean and variance of what all six images bring.
    model = build_model(cfg)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    seen = []
    model.backbone.bn1.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    model.eval()
    with torch.no_grad():
        for data in loader:
            model.backbone(model.data_preprocessor(data, False)["inputs"])
    assert len(seen) == 3
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)

    found = {}

    def val(runner):
        found.update({k: v.clone() for k, v in runner.model.backbone.bn1.named_buffers()})
        assert not any(module.training for module in runner.model.modules())
        return {"score": 0.0}

    monkeypatch.setattr(Runner, "val", val)
    evaluate_swap(cfg, [checkpoint], [2.0], batch_norm=3)
    torch.testing.assert_close(found["running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["running_var"].double(), variance, rtol=1e-4, atol=0)
    assert swap.renewed.shape == (1, 2) and swap.renewed[0, 0] == swap.renewed[0, 1]
    assert swap.renewed[0, 0] != swap.trained[0]


def test_a_later_call_evaluates_only_what_is_new(load, checkpoint, evaluations):
    first = evaluate_swap(load(), [checkpoint], [1.0, 2.0])
    again = evaluate_swap(load(), [checkpoint], [2.0, 4.0, 1.0])
    assert len(evaluations) == 4  # the training's pool, 1, 2 and then 4
    assert again.swapped[0, [2, 0]].tolist() == first.swapped[0].tolist()
    evaluate_swap(load(**{"val_dataloader.batch_size": 1}), [checkpoint], [1.0])
    assert len(evaluations) == 6  # another config
    evaluate_swap(load(), [checkpoint], [1.0], include=["torch.nn.MaxPool2d"])
    assert len(evaluations) == 6  # the default, as a list
    evaluate_swap(load(), [checkpoint], [1.0], include="maxpool")
    assert len(evaluations) == 8  # another one


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {"score": "1"}}', "{"])
def test_damaged_results_are_refused(load, checkpoint, evaluations, content):
    cfg = load()
    path = Path(cfg.work_dir, "swap.json")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} is (damaged|not JSON)"):
        evaluate_swap(cfg, [checkpoint])
    assert not evaluations


def test_the_tool_prints_means_and_scores_of_several_checkpoints(
    run_tool, shapes, tmp_path, checkpoint, monkeypatch
):
    other = tmp_path / "other.pth"
    weights = torch.load(checkpoint, weights_only=True)
    torch.save(weights | dict(meta={}), other)
    values = iter([0.5, 0.3, 0.49, 0.7, 0.6, 0.71])
    monkeypatch.setattr(Runner, "val", lambda runner: {"coco/bbox_mAP": next(values)})
    options = [
        f"{key}={str(value).replace(' ', '')}"
        for key, value in {**SMALL, "data_root": shapes}.items()
    ]
    status, out, _ = run_tool(
        *("swap", config_path("demo_retinanet_maxpool"), checkpoint, other),
        *("--alphas", 1, 4, "--work-dir", tmp_path / "out", "--cfg-options", *options),
    )
    assert status == 0
    table = (tmp_path / "out" / "swap.md").read_text()
    assert table in out
    assert "| pool of the training | 60.0 |  |" in table
    assert "| alpha 1 | 45.0 | -15.0 |" in table and "| alpha 4 | 60.0 | +0.0 |" in table
    assert "- alpha 4: 49.0, 71.0" in table
    assert (tmp_path / "out" / "swap.png").stat().st_size > 1000


def test_a_real_evaluation_with_a_huge_alpha_is_that_of_max_pooling(load, checkpoint):
    swap = evaluate_swap(load(**{"model.test_cfg.score_thr": 0.0}), [checkpoint], [1e30])
    assert swap.metric == "coco/bbox_mAP" and swap.swapped[0, 0] == swap.trained[0]


def test_a_detector_that_finds_nothing_has_an_ap_of_0(load, checkpoint):
    cfg = load(**{"model.test_cfg.score_thr": 1.0})
    swap = evaluate_swap(cfg, [checkpoint], [1.0])
    assert swap.metric == "coco/bbox_mAP" and swap.trained == swap.swapped == 0
    assert evaluate_swap(cfg, [checkpoint], [1.0]).swapped == 0  # from swap.json


def test_the_table_is_of_all_classes(load, checkpoint, monkeypatch):
    monkeypatch.setattr(
        Runner, "val", lambda runner: {"coco/disc_precision": 0.9, "coco/bbox_mAP": 0.5}
    )
    swap = evaluate_swap(load(**{"val_evaluator.classwise": True}), [checkpoint], [1.0])
    assert swap.metric == "coco/bbox_mAP" and swap.trained == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(alphas=[]), "alphas must be at least one number"),
        (dict(alphas=[1.0, 1.0]), "alphas must be different numbers"),
        (dict(alphas=[-1.0]), "alpha must be"),
        (dict(batch_norm=-1), "batch_norm must be at least 0, got -1"),
        (dict(batch_norm=4), "batch_norm must be at most the 3 batches of the train split, got 4"),
        (dict(checkpoints=[]), "checkpoints must be at least one"),
        (dict(include="nowhere"), "nowhere"),
    ],
)
def test_a_wrong_argument_is_named(load, checkpoint, evaluations, arguments, message):
    arguments = dict(checkpoints=[checkpoint], alphas=[1.0]) | arguments
    with pytest.raises(ValueError, match=message):
        evaluate_swap(load(), **arguments)
    assert not evaluations


def test_a_network_without_max_pools_is_refused_before_the_evaluation(
    load, checkpoint, evaluations
):
    with pytest.raises(ValueError, match=r"has the pools maxpool \(SoftPool2d\)"):
        evaluate_swap(load("demo_retinanet_softpool"), [checkpoint])
    assert not evaluations


def test_a_config_without_a_val_split_is_named(load, checkpoint):
    cfg = load()
    cfg.val_dataloader = None
    with pytest.raises(ValueError, match=r"val_dataloader\.dataset, a dict, got None"):
        evaluate_swap(cfg, [checkpoint])
