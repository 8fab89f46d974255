"""Hooks that change alpha during the training."""

import math
from pathlib import Path

import pytest
from mmengine.registry import HOOKS

from make_shapes import make_shapes
from mmsoftpool import SoftPool2d
from mmsoftpool.config import load_config
from mmsoftpool.runner import train

from ..common import config_path


@pytest.fixture
def run(tmp_path):
    """Trains the demo's detector, small, for two epochs; returns the alphas of all forwards."""
    make_shapes(tmp_path / "shapes", train=4, val=1)

    def run(config, *options, resume=None):
        cfg = load_config(
            str(config) if isinstance(config, Path) else config_path(config),
            [
                f"data_root={tmp_path / 'shapes'}",
                "train_cfg.max_epochs=2",
                "train_dataloader.batch_size=2",
                "train_dataloader.num_workers=0",
                "val_dataloader.num_workers=0",
                "val_dataloader.persistent_workers=False",
                "model.backbone.base_channels=8",
                "model.neck.in_channels=[8,16,32,64]",
                *options,
            ],
            work_dir=str(tmp_path / "run"),
        )
        seen = {True: [], False: []}

        class Watched(SoftPool2d):
            def forward(self, x):
                seen[self.training].append(self.alpha)
                return super().forward(x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(
                __import__("mmsoftpool.registry").registry.MODELS.module_dict, "SoftPool2d", Watched
            )
            patch.setitem(__import__("mmengine").registry.MODELS.module_dict, "SoftPool2d", Watched)
            train(cfg, resume=resume)
        return seen

    return run


def test_random_alphas_are_in_their_range_and_those_of_the_seed(run, tmp_path):
    seen = run("demo_retinanet_softpool_random_alpha")
    first = seen[True]
    assert len({*first}) == 4 and all(0.5 <= alpha <= 8 for alpha in first)
    assert {*seen[False]} == {1.0}  # validation has the config's
    (tmp_path / "run" / "epoch_2.pth").unlink()
    assert run("demo_retinanet_softpool_random_alpha", resume=True)[True] == first[2:]
    other = run("demo_retinanet_softpool_random_alpha", "randomness.seed=1")
    assert not {*other[True]} & {*first}


def test_alpha_is_annealed_to_that_of_the_config(run):
    seen = run("demo_retinanet_softpool_annealed")
    assert seen[True] == pytest.approx([32 ** (i / 3) for i in range(4)])
    assert {*seen[False]} == {32.0}


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (dict(type="RandomAlphaHook", low=0), "low and high must be 0 < low <= high, got 0 and"),
        (dict(type="RandomAlphaHook", low=9.0), "got 9.0 and 8.0"),
        (dict(type="AlphaAnnealingHook", start=math.inf), "start must be above 0, got inf"),
    ],
)
def test_wrong_arguments_are_named(hook, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build(hook)


def test_a_model_without_soft_pool_is_refused(run, tmp_path):
    config = tmp_path / "config.py"
    base = config_path("demo_retinanet_maxpool")
    config.write_text(f"_base_ = {base!r}\ncustom_hooks = [dict(type='RandomAlphaHook')]")
    with pytest.raises(ValueError, match="RandomAlphaHook needs a model with a SoftPool2d"):
        run(config)
