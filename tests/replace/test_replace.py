import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmsoftpool import SoftPool1d, SoftPool2d, SoftPool3d, replace_pooling, soft_pool2d


class Net(nn.Sequential):
    """A stem with a max pool, and stages with average pools, a global pool and a subsampling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1))
        self.stage1 = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(8, 8, 1))
        self.stage2 = nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(1, 2))
        self.head = nn.AdaptiveAvgPool2d(1)


WINDOWED = ["stem.2", "stage1.0", "stage2.0"]


class Branches(nn.Module):
    """Functional pools, as in an Inception block, around a module that pools too."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, 1)

    def pooled(self, x):
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)

    def forward(self, x):
        return torch.cat([self.pool(x), self.pooled(x), F.max_pool2d(x, 1)], 1)


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
        x = torch.randn(2, 3, *size)
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
        x = torch.randn(2, 3, 35, 36)
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

    @pytest.mark.parametrize("padding", [{}, dict(padding=((1, 0), (1, 0)))])
    def test_a_geometry_of_its_own_is_taken_as_a_whole(self, padding):
        net = Net()
        replace_pooling(net, dict(type="SoftPool2d", kernel_size=2, **padding), include="stem")
        assert (net.stem[2].kernel_size, net.stem[2].stride) == (2, 2)
        assert net.stem[2].padding == padding.get("padding", 0)

    @pytest.mark.parametrize(
        "pool", [dict(type="MaxPool2d"), dict(type="torch.nn.MaxPool2d"), nn.MaxPool3d]
    )
    def test_torchs_pools_and_their_kin(self, pool):
        net = nn.Sequential(nn.AvgPool1d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AvgPool3d(3, 2, 1))
        replace_pooling(net, pool)
        assert [type(module) for module in net] == [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d]

    def test_average_pools_know_no_dilation(self):
        net = nn.Sequential(nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, dilation=2))
        with pytest.raises(
            ValueError, match="1 cannot be replaced: AvgPool2d has no argument dilation"
        ):
            replace_pooling(net, nn.AvgPool2d)
        assert type(net[0]) is nn.MaxPool2d  # nothing is half done
        assert list(replace_pooling(net, nn.AvgPool2d, exclude="1")) == ["0"]

    def test_a_name_without_kin_for_other_axes(self):
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
        ("old", "x", "kernel_size"),
        [
            (nn.AdaptiveAvgPool2d(1), torch.randn(2, 3, 5, 7), (5, 7)),
            (nn.AdaptiveMaxPool2d((2, None)), torch.randn(2, 3, 6, 7), (3, 1)),
            (nn.AdaptiveAvgPool2d(3), torch.randn(3, 6, 9), (2, 3)),
        ],
    )
    def test_a_named_one_has_windows_of_input_over_output_size(self, old, x, kernel_size):
        net = nn.Sequential(old)
        replace_pooling(net, include="0")
        assert net(x).shape == old(x).shape
        torch.testing.assert_close(net(x), soft_pool2d(x, kernel_size))
        assert copy.deepcopy(net)(x).equal(net(x))

    def test_a_size_that_does_not_divide(self):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(2))
        replace_pooling(net, include="0")
        with pytest.raises(ValueError, match=r"\(5, 4\) does not divide into \(2, 2\)"):
            net(torch.randn(1, 1, 5, 4))

    def test_1d_and_3d(self):
        net = nn.Sequential(nn.AdaptiveAvgPool3d((1, 2, 2)), nn.Flatten(2), nn.AdaptiveMaxPool1d(1))
        assert list(replace_pooling(net, include=["0", "2"])) == ["0", "2"]
        assert net(torch.randn(2, 3, 4, 4, 4)).shape == (2, 3, 1)


class TestFunctional:
    def test_they_stay_with_a_warning_unless_a_name_selects_them(self):
        net = nn.Sequential(Branches())
        x = torch.randn(1, 2, 6, 6)
        expected = torch.cat([soft_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1), x], 1)
        with pytest.warns(UserWarning, match=r"stay as they are: 0\.avg_pool2d\(\), 0\.max_pool2d"):
            assert list(replace_pooling(net)) == ["0.pool"]
        torch.testing.assert_close(net(x), expected)

    def test_a_name_selects_them(self):
        net = nn.Sequential(Branches())
        x = torch.randn(1, 2, 6, 6)
        new = replace_pooling(net, include="0")
        assert list(new) == ["0.avg_pool2d()", "0.max_pool2d()", "0.pool"]
        pooled = soft_pool2d(x, 3, 1, 1)
        # The call with kernel 1 stays.
        torch.testing.assert_close(net(x), torch.cat([pooled, pooled, x], 1))
        assert net.state_dict().keys() == nn.Sequential(Branches()).state_dict().keys()

    def test_one_kind_and_exclude(self):
        net = nn.Sequential(Branches())
        x = torch.randn(1, 2, 6, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(replace_pooling(net, include="*.avg_pool2d()")) == ["0.avg_pool2d()"]
        expected = torch.cat([F.max_pool2d(x, 3, 1, 1), soft_pool2d(x, 3, 1, 1), x], 1)
        torch.testing.assert_close(net(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replace_pooling(nn.Sequential(Branches()), exclude="*()")

    def test_one_after_another(self):
        net = nn.Sequential(Branches())
        replace_pooling(net, include="0.avg_pool2d()")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replace_pooling(
                net,
                dict(type="SoftPool2d", gradient="paper"),
                include=nn.MaxPool2d,
                exclude="0.max*",
            )
            replace_pooling(net, include="0.max_pool2d()", exclude="0.avg*")
        x = torch.randn(1, 2, 6, 6)
        pooled = soft_pool2d(x, 3, 1, 1)
        torch.testing.assert_close(net(x), torch.cat([pooled, pooled, x], 1))

    def test_outside_of_the_module_functions_are_torchs(self):
        net = nn.Sequential(Branches(), nn.AvgPool2d(3, 1, 1))
        x = torch.randn(1, 2, 6, 6)
        replace_pooling(net, include="0")
        torch.testing.assert_close(net(x), F.avg_pool2d(net[0](x), 3, 1, 1))

    def test_an_inner_pool_of_the_same_kind_cannot_stay(self):
        with pytest.raises(ValueError, match=r"0\.max_pool2d\(\) cannot be replaced while 0\.pool"):
            replace_pooling(nn.Sequential(Branches()), include="*", exclude="0.pool")

    def test_return_indices(self):
        class Unpooled(nn.Module):
            def forward(self, x):
                return F.max_pool2d(x, 2, return_indices=True)

        net = nn.Sequential(Unpooled())
        replace_pooling(net, include="0")
        with pytest.raises(ValueError, match="return_indices cannot be replaced"):
            net(torch.randn(1, 1, 4, 4))

    def test_a_subclass_keeps_what_it_does_around_the_pool(self):
        class SamePool(nn.MaxPool2d):
            def forward(self, x):
                return super().forward(F.pad(x, (0, 1, 0, 1), value=float("-inf")))

        net = nn.Sequential(SamePool(2))
        assert list(replace_pooling(net, include="0")) == ["0.max_pool2d()"]
        x = torch.randn(1, 1, 5, 5)
        torch.testing.assert_close(net(x), soft_pool2d(x, 2, ceil_mode=True))

    def test_copies_are_independent_and_pickles_work(self):
        net = Branches()
        replace_pooling(net, include="*")
        x = torch.randn(1, 2, 6, 6)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert other.forward.args[0] is other
            assert other(x).equal(net(x))

    def test_compiles_and_exports(self):
        net = Branches().eval()
        replace_pooling(net, include="*")
        x = torch.randn(1, 2, 6, 6)
        exported = torch.export.export(net, (x,))
        assert "mmsoftpool.soft_pool" in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), net(x))
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x))

    def test_they_train_and_evaluate_with_the_module(self):
        class NoisyPool2d(SoftPool2d):
            def forward(self, x):
                return super().forward(x) + (1 if self.training else 0)

        net = nn.Sequential(Branches(), nn.AdaptiveAvgPool2d(1))
        replace_pooling(net, NoisyPool2d, include=["0", "1"])
        x = torch.zeros(1, 2, 6, 6)
        assert net(x).flatten().tolist() == [2, 2, 2, 2, 1, 1]
        assert net.eval()(x).flatten().tolist() == [0] * 6

    def test_a_pool_with_parameters_is_refused(self):
        class GatePool2d(SoftPool2d):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.gate = nn.Parameter(torch.ones(1))

        with pytest.raises(ValueError, match="GatePool2d has parameters"):
            replace_pooling(Branches(), GatePool2d, include="*")


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
