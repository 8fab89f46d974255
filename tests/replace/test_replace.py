import copy

import pytest
import torch
from torch import nn

import mmsoftpool
from mmsoftpool import SoftPool1d, SoftPool2d, SoftPool3d, replace_pooling, soft_pool2d

from ..common import randn


class Net(nn.Sequential):
    """A stem with a max pool, and stages with average pools, a global pool and a subsampling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1))
        self.stage1 = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(8, 8, 1))
        self.stage2 = nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(1, 2))
        self.head = nn.AdaptiveAvgPool2d(1)


WINDOWED = ["stem.2", "stage1.0", "stage2.0"]


class TestGeometry:
    @pytest.mark.parametrize(
        ("old", "size"),
        [
            (nn.MaxPool1d(3, 2, 1), (11,)),
            (nn.MaxPool1d(2, 3, dilation=2, ceil_mode=True), (11,)),
            (nn.MaxPool2d(3, 2, 1), (11, 14)),
            (nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True), (11, 14)),
            (nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), (5, 11, 14)),
            (nn.AvgPool1d(3, 2, 1), (11,)),
            (nn.AvgPool2d(2), (11, 14)),
            (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (11, 14)),
            (nn.AvgPool3d(2, 2, ceil_mode=True), (5, 11, 14)),
        ],
    )
    def test_every_setting_is_kept(self, old, size):
        net = nn.Sequential(old)
        replace_pooling(net)
        axes = len(size)
        assert type(net[0]) is {1: SoftPool1d, 2: SoftPool2d, 3: SoftPool3d}[axes]
        for setting in ("kernel_size", "stride", "padding", "ceil_mode"):
            assert getattr(net[0], setting) == getattr(old, setting)
        assert net[0].dilation == getattr(old, "dilation", 1)
        x = randn(2, 3, *size)
        assert net(x).shape == old(x).shape

    def test_padding_carries_no_weight_where_an_average_counted_it(self):
        net = nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=True))
        replace_pooling(net)
        assert net(torch.full((1, 1, 4, 4), 5.0)).equal(torch.full((1, 1, 2, 2), 5.0))


class TestSelection:
    @pytest.mark.parametrize(
        ("selection", "expected"),
        [
            ({}, WINDOWED),
            (dict(include=nn.MaxPool2d), ["stem.2", "stage2.1"]),
            (dict(include="torch.nn.AvgPool2d"), ["stage1.0", "stage2.0"]),
            (dict(include=[nn.MaxPool2d, "stage1"]), ["stem.2", "stage1.0", "stage2.1"]),
            (dict(include="stage*"), ["stage1.0", "stage2.0"]),
            (dict(include="stage?.0"), ["stage1.0", "stage2.0"]),
            (dict(include="*"), WINDOWED),
            (dict(exclude="stem"), ["stage1.0", "stage2.0"]),
            (dict(exclude=[nn.AvgPool2d]), ["stem.2"]),
            (dict(include="stage*", exclude="stage2"), ["stage1.0"]),
            (dict(include=["stage2.1"]), ["stage2.1"]),  # kernel 1, by its full name
            (dict(include=["head"]), ["head"]),
            (dict(include=nn.AdaptiveAvgPool2d), ["head"]),
        ],
    )
    def test_by_class_and_by_name(self, selection, expected):
        net = Net()
        before = dict(net.named_modules())
        new = replace_pooling(net, **selection)
        assert list(new) == expected
        for name, module in net.named_modules():
            assert module is new[name] if name in new else module is before[name]

    @pytest.mark.parametrize(
        ("selection", "message"),
        [
            (dict(include="stage3"), "include has 'stage3', which matches no pool; Net has the"),
            (dict(include=["stem", "s*3"]), r"include has 's\*3'"),
            (dict(exclude="stage3"), "exclude has 'stage3'"),
            (dict(include=nn.MaxPool3d), r"no pool to replace with .*stem\.2 \(MaxPool2d\)"),
            (dict(include="stem", exclude=nn.MaxPool2d), "no pool to replace"),
            (dict(include="torch.nn.MaxPool9d"), "torch.nn has no class 'MaxPool9d'"),
        ],
    )
    def test_what_matches_nothing_is_an_error(self, selection, message):
        net = Net()
        with pytest.raises(ValueError, match=message):
            replace_pooling(net, **selection)
        assert type(net.stem[2]) is nn.MaxPool2d

    def test_a_network_without_pools_is_an_error(self):
        with pytest.raises(ValueError, match="Sequential has no pools"):
            replace_pooling(nn.Sequential(nn.Conv2d(3, 8, 3)))

    def test_a_pool_itself_is_an_error(self):
        with pytest.raises(ValueError, match="module is itself a pool"):
            replace_pooling(nn.MaxPool2d(2))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("net",), "module must be an nn.Module, got str"),
            ((Net(), "SoftPool2d"), "pool must be a class or a dict with 'type'"),
            ((Net(), dict(kernel_size=2)), "pool must be a class or a dict with 'type'"),
        ],
    )
    def test_wrong_types(self, arguments, message):
        with pytest.raises(TypeError, match=message):
            replace_pooling(*arguments)
        with pytest.raises(TypeError, match="include must be classes and names"):
            replace_pooling(Net(), include=[3])


class TestNetwork:
    def test_a_checkpoint_loads_before_and_after(self):
        net = Net()
        before = net.state_dict()
        replace_pooling(net)
        assert list(net.state_dict()) == list(before)
        assert all(
            value is before[key] or value.equal(before[key])
            for key, value in net.state_dict().items()
        )
        net.load_state_dict(before, strict=True)

    def test_the_forward_is_that_with_soft_pools(self):
        net = Net()
        x = randn(2, 3, 35, 36)
        y = net.stage1[1](
            soft_pool2d(soft_pool2d(net.stem[1](net.stem[0](x)), 3, 2, 1), 2, ceil_mode=True)
        )
        y = soft_pool2d(y, 2)[:, :, ::2, ::2].mean((2, 3), keepdim=True)
        net.stem[1].reset_running_stats()
        replace_pooling(net)
        torch.testing.assert_close(net(x), y)

    def test_a_second_time_there_is_nothing_to_replace(self):
        net = Net()
        replace_pooling(net)
        with pytest.raises(ValueError, match="no pool to replace"):
            replace_pooling(net)

    def test_and_back(self):
        net = Net()
        replace_pooling(net)
        assert list(replace_pooling(net, nn.MaxPool2d, include=SoftPool2d)) == WINDOWED
        assert type(net.stage1[0]) is nn.MaxPool2d and net.stage1[0].ceil_mode

    def test_a_pool_with_two_names_stays_one(self):
        net = nn.Module()
        net.a = net.b = nn.MaxPool2d(2)
        assert list(replace_pooling(net)) == ["a", "b"]
        assert net.a is net.b and type(net.a) is SoftPool2d

    def test_parameters_of_a_pool_are_on_the_networks_device(self):
        class GatePool2d(SoftPool2d):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.gate = nn.Parameter(torch.ones(1))

        net = Net().to("meta")
        replace_pooling(net, GatePool2d)
        assert net.stem[2].gate.is_meta

    def test_training_mode_is_kept(self):
        net = Net()
        net.eval()
        replace_pooling(net)
        assert not any(module.training for module in net.modules())


class TestPool:
    def test_more_arguments(self):
        net = Net()
        replace_pooling(net, dict(type=SoftPool2d, gradient="paper"))
        assert net.stem[2].gradient == "paper"

    def test_alpha(self):
        net = nn.Sequential(nn.MaxPool2d(3, 2, 1))
        replace_pooling(net, dict(type="SoftPool2d", alpha=4.0))
        x = randn(1, 3, 9, 9)
        torch.testing.assert_close(net(x), soft_pool2d(4 * x, 3, 2, 1) / 4)

    @pytest.mark.parametrize("padding", [{}, dict(padding=((1, 0), (1, 0)))])
    def test_a_geometry_of_its_own_is_taken_as_a_whole(self, padding):
        net = Net()
        replace_pooling(net, dict(type="SoftPool2d", kernel_size=2, **padding), include="stem")
        assert (net.stem[2].kernel_size, net.stem[2].stride) == (2, 2)
        assert net.stem[2].padding == padding.get("padding", 0)

    @pytest.mark.parametrize(
        "pool", [dict(type="MaxPool2d"), dict(type="torch.nn.MaxPool2d"), nn.MaxPool3d]
    )
    def test_torchs_pools_in_1d_2d_and_3d(self, pool):
        net = nn.Sequential(nn.AvgPool1d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AvgPool3d(3, 2, 1))
        replace_pooling(net, pool)
        assert [type(module) for module in net] == [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d]

    def test_average_pools_have_no_dilation(self):
        net = nn.Sequential(nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, dilation=2))
        with pytest.raises(
            ValueError, match="1 cannot be replaced: AvgPool2d has no argument dilation"
        ):
            replace_pooling(net, nn.AvgPool2d)
        assert type(net[0]) is nn.MaxPool2d  # nothing is half done
        assert list(replace_pooling(net, nn.AvgPool2d, exclude="1")) == ["0"]

    def test_a_name_without_a_variant_for_other_axes(self):
        class OnlyPool2d(SoftPool2d):
            pass

        replace_pooling(nn.Sequential(nn.MaxPool2d(2)), OnlyPool2d)
        with pytest.raises(ValueError, match="there is no OnlyPool3d to replace a 3d pool with"):
            replace_pooling(nn.Sequential(nn.MaxPool3d(2)), OnlyPool2d)

    def test_registered_types(self):
        registry = pytest.importorskip("mmengine.registry").MODELS

        @registry.register_module(force=True)
        class DoublingPool(nn.MaxPool2d):
            def forward(self, x):
                return 2 * super().forward(x)

        net = nn.Sequential(nn.AvgPool2d(3, 2, 1))
        replace_pooling(net, dict(type="DoublingPool"))
        assert type(net[0]) is DoublingPool and net[0].padding == 1

    def test_unknown_types(self):
        with pytest.raises(ValueError, match="there is no HardPool2d to replace a 2d pool with"):
            replace_pooling(Net(), dict(type="HardPool2d"))

    @pytest.mark.parametrize(
        ("old", "message"),
        [
            (nn.MaxPool2d(2, return_indices=True), "0 cannot be replaced: it has return_indices"),
            (nn.AvgPool2d(2, divisor_override=1), "0 cannot be replaced: it has divisor_override"),
        ],
    )
    def test_settings_that_soft_pool_cannot_have(self, old, message):
        net = nn.Sequential(old, nn.MaxPool2d(2))
        with pytest.raises(ValueError, match=message):
            replace_pooling(net)
        assert net[0] is old and type(net[1]) is nn.MaxPool2d


class TestAdaptive:
    @pytest.mark.parametrize(
        ("old", "size"),
        [
            (nn.AdaptiveAvgPool1d(3), (2, 3, 7)),
            (nn.AdaptiveAvgPool2d(1), (2, 3, 5, 7)),
            (nn.AdaptiveMaxPool2d((2, None)), (2, 3, 6, 7)),
            (nn.AdaptiveAvgPool2d((3, 4)), (3, 7, 9)),
            (nn.AdaptiveMaxPool3d((1, 2, 3)), (2, 3, 4, 5, 6)),
        ],
    )
    def test_it_becomes_the_adaptive_soft_pool(self, old, size):
        net = nn.Sequential(old)
        new = replace_pooling(net, include="0")
        expected = type(old).__name__.replace("Avg", "Soft").replace("Max", "Soft")
        assert type(new["0"]) is getattr(mmsoftpool.ops, expected)
        assert net[0].output_size == old.output_size
        x = randn(*size)
        assert net(x).shape == old(x).shape

    def test_it_averages_its_windows_for_alpha_zero(self):
        old = nn.AdaptiveAvgPool2d((3, 2))
        net = nn.Sequential(old)
        replace_pooling(net, dict(type="SoftPool2d", alpha=0.0), include="0")
        x = randn(2, 3, 7, 9)
        torch.testing.assert_close(net(x), old(x))

    def test_an_adaptive_soft_pool_is_a_pool_too(self):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(3))
        replace_pooling(net, include="0")
        replace_pooling(net, nn.MaxPool2d, include=mmsoftpool.ops.AdaptiveSoftPool2d)
        assert type(net[0]) is nn.AdaptiveMaxPool2d and net[0].output_size == 3

    def test_arguments_that_only_windowed_pools_have(self):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1))
        with pytest.raises(ValueError, match="AdaptiveSoftPool2d has no argument padding"):
            replace_pooling(net, dict(type="SoftPool2d", padding=1), include="0")

    def test_a_geometry_of_its_own_is_taken_as_a_whole(self):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1))
        replace_pooling(net, dict(type="SoftPool2d", kernel_size=7), include="0")
        assert type(net[0]) is SoftPool2d and net[0].kernel_size == 7


class TestAdaptiveWithoutVariant:
    """A pool class beside which there is no adaptive one."""

    class Pool2d(SoftPool2d):
        pass

    @pytest.mark.parametrize(
        ("old", "size", "kernel_size"),
        [
            (nn.AdaptiveAvgPool2d(1), (2, 3, 5, 7), (5, 7)),
            (nn.AdaptiveMaxPool2d((2, None)), (2, 3, 6, 7), (3, 1)),
            (nn.AdaptiveAvgPool2d(3), (3, 6, 9), (2, 3)),
        ],
    )
    def test_windows_of_input_over_output_size(self, old, size, kernel_size):
        net = nn.Sequential(old)
        replace_pooling(net, self.Pool2d, include="0")
        x = randn(*size)
        assert net(x).shape == old(x).shape
        torch.testing.assert_close(net(x), soft_pool2d(x, kernel_size))
        assert copy.deepcopy(net)(x).equal(net(x))

    def test_a_size_that_does_not_divide(self):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(2))
        replace_pooling(net, self.Pool2d, include="0")
        with pytest.raises(ValueError, match=r"\(5, 4\) does not divide into \(2, 2\)"):
            net(randn(1, 1, 5, 4))

    def test_fx_traces_it_as_a_leaf(self):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(2))
        replace_pooling(net, self.Pool2d, include="0")
        graph = torch.fx.symbolic_trace(net)
        for size in (4, 6):
            x = randn(1, 3, size, size)
            assert graph(x).equal(net(x))


def test_torch_alone_is_enough(run_script):
    code = """
import sys
for name in ("mmengine", "mmcv", "mmdet", "mmpretrain"):
    sys.modules[name] = None  # as if it were not installed
import timm
from mmsoftpool import replace_pooling
net = timm.create_model("resnet18")
print(list(replace_pooling(net)), type(net.maxpool).__name__)
"""
    assert run_script("-c", code).stdout.strip() == "['maxpool'] SoftPool2d"


class GatePool2d(SoftPool2d):
    """A pool with a parameter and a submodule."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm2d(3)


class TestWhatOthersPutOnThePool:
    def test_attributes_hooks_and_state_stay(self):
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2))
        old = net[1]
        old.f, old.i, old.type = -1, 1, "nn.MaxPool2d"  # as Ultralytics' parse_model does
        old.register_buffer("seen", torch.zeros(1))
        old.register_buffer("scratch", torch.zeros(1), persistent=False)
        old.observer = nn.BatchNorm2d(3).eval()
        called = []
        old.register_forward_pre_hook(lambda module, args: called.append("before"))
        handle = old.register_forward_hook(lambda *args, **kwargs: called.append("after"))
        old.register_forward_hook(
            lambda *args, **kwargs: called.append("with kwargs"), with_kwargs=True
        )
        old.register_full_backward_hook(lambda *args: called.append("backward"))
        keys = list(net.state_dict())
        pool = replace_pooling(net)["1"]
        assert (pool.f, pool.i, pool.type) == (-1, 1, "nn.MaxPool2d")
        assert list(net.state_dict()) == keys and "1.seen" in keys
        assert pool.training and not pool.observer.training
        assert pool.kernel_size == 2 and not hasattr(pool, "return_indices")
        net(randn(1, 3, 4, 4)).sum().backward()
        assert called == ["before", "after", "with kwargs", "backward"]
        handle.remove()
        net(randn(1, 3, 4, 4))
        assert called[4:] == ["before", "with kwargs"]

    def test_frozen_parts_stay_frozen(self):
        net = nn.Sequential(GatePool2d(2))
        net[0].gate.requires_grad_(False)
        net[0].norm.eval()
        pool = replace_pooling(net, GatePool2d, include=SoftPool2d)["0"]
        assert not pool.gate.requires_grad and pool.norm.weight.requires_grad
        assert pool.training and not pool.norm.training

    def test_a_forward_of_its_own_is_refused(self):
        net = nn.Sequential(nn.MaxPool2d(2))
        net[0].forward = lambda x: x  # as accelerate's hooks do
        with pytest.raises(ValueError, match="0 cannot be replaced: its forward was set on the"):
            replace_pooling(net)
