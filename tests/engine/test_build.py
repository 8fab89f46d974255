"""A mistake in a config is one line, found before the run."""

import re

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmsoftpool import engine

from ..common import config_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model.backbone.stem_pool.type": "SoftPol2d"},
            "type 'SoftPol2d' is not registered; did you mean 'SoftPool2d'?",
        ),
        ({"model.backbone.stem_pool": dict(type="SoftPool2d", kernel_size=0)}, "kernel_size must"),
        ({"model.backbone.stempool": 3}, "argument 'stempool'; did you mean 'stem_pool'?"),
        ({"model.type": "RetinaNets"}, "'RetinaNets' is not registered; did you mean 'RetinaNet'?"),
    ],
)
def test_a_mistake_in_the_model_is_named(options, message):
    options = {**options, "model.backbone.init_cfg": None}
    cfg = engine.load_config(config_path("retinanet_r18_softpool"), options)
    with pytest.raises(ValueError) as error:
        engine.build_model(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_in_the_optimizer_is_named():
    options = {"optim_wrapper.optimizer.type": "AdamWW"}
    cfg = engine.load_config(config_path("demo_retinanet_softpool"), options)
    message = "the optim_wrapper of .* type 'AdamWW' is not registered; did you mean 'AdamW'"
    with pytest.raises(ValueError, match=message):
        engine.build_optimizer(cfg, nn.Linear(1, 1))


@MODELS.register_module()
class Users(nn.Module):
    """A module of the user's; each ``fault`` raises another kind of error."""

    def __init__(self, fault, size=0):
        super().__init__()
        if fault == "raise":
            raise RuntimeError("size must be even")
        if fault == "assert":
            raise AssertionError("size must be even")
        if fault == "torch":
            nn.Conv2d(3, size, 1)
        if fault == "expression":
            self.layers[0].weight  # noqa: B018
        if fault == "index":
            [][size]
        if fault == "import":
            import missing_package  # noqa: F401


class TestAModuleOfTheUsers:
    @staticmethod
    def build(**arguments):
        return engine.build_model(Config(dict(model=dict(type="Users", **arguments))))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(fault="raise"), "cannot be built: RuntimeError: size must be even"),
            (dict(fault="assert"), "cannot be built: AssertionError: size must be even"),
            (dict(falt="raise"), r"'falt'; did you mean 'fault'\?"),
            (dict(), "missing 1 required positional argument: 'fault'"),
            (dict(fault="torch", size=-1), rf"\(called from {re.escape(__file__)}, line \d+\)"),
        ],
    )
    def test_wrong_arguments_are_one_line(self, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            self.build(**arguments)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [("expression", AttributeError), ("index", IndexError), ("import", ModuleNotFoundError)],
    )
    def test_a_bug_keeps_its_type_and_traceback(self, fault, kind):
        with pytest.raises(kind) as error:
            self.build(fault=fault)
        assert "__init__" in [frame.name for frame in error.traceback]


class TestLoadModel:
    @pytest.fixture
    def demo(self):
        return engine.load_config(config_path("demo_retinanet_softpool"))

    def test_weights_that_do_not_fit_are_three_mismatches_and_their_number(self, demo, tmp_path):
        import torch

        weights = engine.build_model(demo).state_dict()
        weights["bbox_head.retina_cls.bias"] = torch.zeros(1)
        del weights["backbone.conv1.weight"]
        weights.update({f"x{i}": torch.zeros(1) for i in range(5)})
        torch.save(dict(state_dict=weights), tmp_path / "x.pth")
        with pytest.raises(ValueError) as error:
            engine.load_model(demo, str(tmp_path / "x.pth"))
        assert str(error.value).endswith(
            "7 mismatches, bbox_head.retina_cls.bias has the shape (1,), not (24,); "
            "backbone.conv1.weight is missing; x0 is unexpected; ..."
        )

    def test_a_text_file_is_no_checkpoint(self, demo, tmp_path):
        (tmp_path / "x.pth").write_text("weights")
        with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
            engine.load_model(demo, str(tmp_path / "x.pth"))
