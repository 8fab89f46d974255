"""paper/measure_stem.py: energy, reach of the gradient and change under a shift, of a stem."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import Runner

from make_shapes import make_shapes
from measure_stem import measure_stem
from mmsoftpool.config import load_config
from mmsoftpool.runner import build_model

from ..common import config_path

ALPHAS = (0.0, 1.0, 4.0, 1e30, math.inf)
GRID = dict(kernel_size=3, stride=2, padding=1)


@pytest.fixture(scope="module")
def stem(tmp_path_factory):
    """The demo's config with max pooling, small, and a checkpoint of random weights."""
    root = tmp_path_factory.mktemp("stem")
    make_shapes(root / "shapes", train=1, val=5)
    options = {
        "data_root": str(root / "shapes"),
        "val_dataloader.num_workers": 0,
        "val_dataloader.persistent_workers": False,
        "val_dataloader.batch_size": 2,
        "model.backbone.base_channels": 8,
        "model.neck.in_channels": [8, 16, 32, 64],
    }
    cfg = load_config(config_path("demo_retinanet_maxpool"), options, str(root))
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.save(dict(state_dict=model.state_dict()), root / "weights.pth")
    return cfg, str(root / "weights.pth"), model.eval()


@pytest.fixture(scope="module")
def activations(stem):
    """The stem's activations of the first three images, without their last or first column."""
    cfg, _, model = stem
    backbone = model.backbone
    inputs = [
        model.data_preprocessor(data, False)["inputs"]
        for data in Runner.build_dataloader(cfg.val_dataloader)
    ]
    images = torch.cat(inputs)[:3]
    with torch.no_grad():
        return tuple(
            backbone.relu(backbone.bn1(backbone.conv1(part))).double()
            for part in (images[..., :-1], images[..., 1:])
        )


def _average(x):
    return F.avg_pool2d(x, **GRID, count_include_pad=False)


def _maximum(x):
    return F.max_pool2d(x, **GRID)


def test_measurements_of_average_and_max_pooling_follow_their_definitions(stem, activations):
    cfg, checkpoint, _ = stem
    measured = measure_stem(cfg, checkpoint, ALPHAS, images=3)
    assert measured.trained == math.inf
    x, other = activations
    for pool, i in ((_average, 0), (_maximum, 4), (_maximum, 3)):
        y = pool(x)
        energy = y.square().mean() / x.square().mean()
        assert measured.energy[i] == pytest.approx(float(energy), rel=1e-4)
        inside = y[..., 2:-2, 2:-2]
        change = pool(other)[..., 2:-2, 2:-2] - inside
        # The variances of each of the two batches, of two images and of one.
        sums = [
            (part.var((0, 2, 3), correction=0).sum() * part[:, 0].numel())
            for part in inside.split(2)
        ]
        shift = (change.square().sum() / sum(sums)).sqrt()
        assert measured.shift[i] == pytest.approx(float(shift), rel=1e-4)
    for pool, i in ((_average, 0), (_maximum, 4)):  # a tie is shared by SoftPool, and not by max
        leaf = x.clone().requires_grad_()
        (d,) = torch.autograd.grad(pool(leaf).sum(), leaf)
        share = d.abs().sum() ** 2 / (d.numel() * d.square().sum())
        assert measured.gradient[i] == pytest.approx(float(share), rel=1e-4)


def test_sharper_pools_keep_more_energy_and_their_gradient_reaches_fewer_inputs(stem):
    cfg, checkpoint, _ = stem
    measured = measure_stem(cfg, checkpoint, (0.0, 1.0, 4.0, math.inf), images=2)
    assert (np.diff(measured.energy) > 0).all() and (np.diff(measured.gradient) < 0).all()


def test_the_padding_may_be_pairs(stem):
    cfg, checkpoint, _ = stem
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.stem_pool = dict(
        type="SoftPool2d", kernel_size=3, stride=2, padding=((1, 0), (1, 0))
    )
    measured = measure_stem(cfg, checkpoint, [1e30, math.inf], images=1)
    assert measured.energy[0] == measured.energy[1] > 0


def test_histograms_count_every_activation(stem, activations):
    cfg, checkpoint, _ = stem
    measured = measure_stem(cfg, checkpoint, (0.0, math.inf), images=2, bins=7)
    x = activations[0][:2]
    assert measured.before.sum() == pytest.approx(1)
    assert measured.after.sum(1) == pytest.approx([1, 1])
    expected = np.histogram(_maximum(x).numpy(), np.linspace(0, float(x.max()), 8))[0]
    assert measured.after[1] == pytest.approx(expected / expected.sum(), abs=1e-3)


def test_the_tool_prints_tables_and_draws_all_stems(run_tool, stem, tmp_path):
    cfg, checkpoint, _ = stem
    configs = []
    for name in ("one", "two"):
        configs += [tmp_path / f"{name}.py", checkpoint]
        cfg.dump(configs[-2])
    out = tmp_path / "stems.png"
    command = ("measure_stem", *configs, "--alphas", 0, 1, "inf", "--images", 2, "--out", out)
    status, text, _ = run_tool(*command)
    assert status == 0 and out.stat().st_size > 1000
    table = measure_stem(cfg, checkpoint, (0.0, 1.0, math.inf), images=2).markdown()
    assert f"\none\n\n{table}" in text and f"\ntwo\n\n{table}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(alphas=[-1.0]), "alphas must be numbers of at least 0"),
        (dict(alphas=[]), "alphas must be numbers of at least 0"),
        (dict(alphas=[math.nan]), "alphas must be numbers of at least 0"),
        (dict(images=0), "images must be at least 1, got 0"),
        (dict(bins=0), "bins must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_named(stem, arguments, message):
    cfg, checkpoint, _ = stem
    with pytest.raises(ValueError, match=message):
        measure_stem(cfg, checkpoint, **arguments)


def test_a_config_without_its_checkpoint_is_an_error(run_tool):
    status, _, err = run_tool("measure_stem", "config.py")
    assert status == 2 and "error: stems must be pairs of a config and a checkpoint" in err
