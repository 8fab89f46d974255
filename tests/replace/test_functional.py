"""Functional pools: calls such as ``F.avg_pool2d`` in a ``forward``."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmsoftpool import SoftPool2d, replace_pooling, soft_pool1d, soft_pool2d
from mmsoftpool.replace import functional

from ..common import randn


class Branches(nn.Module):
    """Functional pools, as in an Inception block, around a module that pools too."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, 1)

    def pooled(self, x):
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)

    def forward(self, x):
        return torch.cat([self.pool(x), self.pooled(x), F.max_pool2d(x, 1)], 1)


class Scaled(nn.Module):
    """A parameter and a functional pool in one forward; a hook that refers to the module."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.hooked = 0
        self.register_forward_hook(self.count)

    def count(self, module, args, output):
        self.hooked += 1

    def forward(self, x, *, offset=0):
        return F.max_pool2d(self.scale * x, 2) + offset


class Head(nn.Module):
    """The global pool of torchvision's DenseNet."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, (2, 3))


class GatePool2d(SoftPool2d):
    """A pool with a parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(1))


class NoisyPool2d(SoftPool2d):
    """A pool that differs in training."""

    def forward(self, x):
        return super().forward(x) + (1 if self.training else 0)


def scaled():
    net = Scaled()
    replace_pooling(net, include="max_pool2d()")
    return net


class TestSelection:
    def test_they_stay_with_a_warning_unless_a_name_selects_them(self):
        net = nn.Sequential(Branches())
        x = randn(1, 2, 6, 6)
        expected = torch.cat([soft_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1), x], 1)
        with pytest.warns(UserWarning, match=r"stay as they are: 0\.avg_pool2d\(\), 0\.max_pool2d"):
            assert list(replace_pooling(net)) == ["0.pool"]
        torch.testing.assert_close(net(x), expected)

    def test_a_name_selects_them(self):
        net = nn.Sequential(Branches())
        x = randn(1, 2, 6, 6)
        new = replace_pooling(net, include="0")
        assert list(new) == ["0.avg_pool2d()", "0.max_pool2d()", "0.pool"]
        pooled = soft_pool2d(x, 3, 1, 1)
        # The call with kernel 1 stays.
        torch.testing.assert_close(net(x), torch.cat([pooled, pooled, x], 1))
        assert net.state_dict().keys() == nn.Sequential(Branches()).state_dict().keys()

    def test_one_of_two_functions(self):
        net = nn.Sequential(Branches())
        x = randn(1, 2, 6, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(replace_pooling(net, include="*.avg_pool2d()")) == ["0.avg_pool2d()"]
        expected = torch.cat([F.max_pool2d(x, 3, 1, 1), soft_pool2d(x, 3, 1, 1), x], 1)
        torch.testing.assert_close(net(x), expected)

    def test_exclude_silences_the_warning(self):
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
        x = randn(1, 2, 6, 6)
        pooled = soft_pool2d(x, 3, 1, 1)
        torch.testing.assert_close(net(x), torch.cat([pooled, pooled, x], 1))

    def test_an_inner_pool_of_the_same_kind_cannot_stay(self):
        with pytest.raises(ValueError, match=r"0\.max_pool2d\(\) cannot be replaced while 0\.pool"):
            replace_pooling(nn.Sequential(Branches()), include="*", exclude="0.pool")


class TestCalls:
    def test_outside_of_the_module_functions_are_torchs(self):
        net = nn.Sequential(Branches(), nn.AvgPool2d(3, 1, 1))
        x = randn(1, 2, 6, 6)
        replace_pooling(net, include="0")
        torch.testing.assert_close(net(x), F.avg_pool2d(net[0](x), 3, 1, 1))

    @pytest.mark.parametrize(
        ("call", "shape"),
        [
            (lambda x: F.max_pool2d(x, 2, return_indices=True), (1, 1, 4, 4)),
            (lambda x: F.max_pool2d_with_indices(x, 2), (1, 1, 4, 4)),
            (lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True), (1, 1, 4, 4)),
            (lambda x: torch.adaptive_max_pool1d(x, 2), (1, 1, 4)),
        ],
    )
    def test_indices_are_an_error(self, call, shape):
        with (
            functional._ReplacedCalls(dict.fromkeys(functional.NAMES), training=False),
            pytest.raises(ValueError, match="with return_indices cannot be replaced"),
        ):
            call(randn(*shape))

    def test_a_subclass_keeps_what_it_does_around_the_pool(self):
        class SamePool(nn.MaxPool2d):
            def forward(self, x):
                return super().forward(F.pad(x, (0, 1, 0, 1), value=float("-inf")))

        net = nn.Sequential(SamePool(2))
        assert list(replace_pooling(net, include="0")) == ["0.max_pool2d()"]
        x = randn(1, 1, 5, 5)
        torch.testing.assert_close(net(x), soft_pool2d(x, 2, ceil_mode=True))

    def test_new_pools_train_and_evaluate_with_the_module(self):
        net = nn.Sequential(Branches(), nn.AdaptiveAvgPool2d(1))
        replace_pooling(net, NoisyPool2d, include=["0", "1"])
        x = torch.zeros(1, 2, 6, 6)
        assert net(x).flatten().tolist() == [2, 2, 2, 2, 1, 1]
        assert net.eval()(x).flatten().tolist() == [0] * 6

    def test_a_pool_with_parameters_is_refused(self):
        with pytest.raises(ValueError, match="GatePool2d has parameters"):
            replace_pooling(Branches(), GatePool2d, include="*")

    def test_a_forward_that_is_not_of_the_class_is_refused(self):
        net = Branches()
        net.forward = net.pooled
        with pytest.raises(ValueError, match="its forward was set on the module itself"):
            replace_pooling(net, include="avg_pool2d()")

    def test_a_traced_graph_is_refused(self):
        with pytest.raises(ValueError, match="replace the pools before tracing"):
            replace_pooling(torch.fx.symbolic_trace(Branches()), include="avg_pool2d()")


class TestAdaptive:
    def test_it_stays_unless_named_in_full(self):
        net = nn.Sequential(Head(), nn.MaxPool2d(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(replace_pooling(net)) == ["1"]
            assert list(replace_pooling(net, include=[SoftPool2d, "*"])) == ["1"]
        with pytest.raises(ValueError, match=r"0\.adaptive_avg_pool2d\(\) \(functional\)"):
            replace_pooling(net, include="0.*")

    def test_it_becomes_the_adaptive_soft_pool(self):
        net = Head()
        assert list(replace_pooling(net, include="adaptive_avg_pool2d()")) == [
            "adaptive_avg_pool2d()"
        ]
        x = randn(2, 4, 6, 6)
        torch.testing.assert_close(net(x), soft_pool2d(x, (3, 2)))

    def test_sizes_that_do_not_divide(self):
        net = Head()
        replace_pooling(net, dict(type="SoftPool2d", alpha=0.0), include="adaptive_avg_pool2d()")
        x = randn(2, 4, 7, 8)
        torch.testing.assert_close(net(x), F.adaptive_avg_pool2d(x, (2, 3)))

    def test_equal_windows_for_a_pool_without_an_adaptive_variant(self):
        net = Head().eval()
        replace_pooling(net, NoisyPool2d, include="adaptive_avg_pool2d()")
        x = randn(2, 4, 6, 6)
        torch.testing.assert_close(net(x), soft_pool2d(x, (3, 2)))
        with pytest.raises(ValueError, match=r"\(7, 8\) does not divide into \(2, 3\)"):
            net(randn(2, 4, 7, 8))

    @pytest.mark.parametrize(
        "function", [F.adaptive_max_pool1d, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d]
    )
    def test_every_spelling_of_torch(self, function):
        name = function.__name__ if function is not F.adaptive_max_pool1d else "adaptive_max_pool1d"
        factory = functional.PoolFactory("SoftPool2d", {})
        x = randn(2, 3, 8)
        with functional._ReplacedCalls({name: factory}, training=False):
            y = function(x, 2)
        torch.testing.assert_close(y, soft_pool1d(x, 4))


class TestModule:
    """The module remains what it was for the rest of PyTorch."""

    def test_class_and_signature(self):
        net = scaled()
        assert isinstance(net, Scaled)
        assert type(net).__name__ == "Scaled" and repr(net) == repr(Scaled())
        assert inspect.signature(net.forward) == inspect.signature(Scaled().forward)

    def test_data_parallel_replicas_use_their_own_parameters(self):
        x = randn(1, 2, 4, 4)
        net = scaled()
        replica = net._replicate_for_data_parallel()
        replica.scale = torch.tensor(-2.0)  # replicate() sets the parameters on the other GPU
        torch.testing.assert_close(replica(x), soft_pool2d(-2 * x, 2))
        torch.testing.assert_close(net(x), soft_pool2d(3 * x, 2))

    def test_copies_are_independent(self):
        x = randn(1, 2, 4, 4)
        net = scaled()
        other = copy.deepcopy(net)
        nn.init.constant_(other.scale, -2)
        replace_pooling(net, NoisyPool2d, include="max_pool2d()")
        torch.testing.assert_close(other(x), soft_pool2d(-2 * x, 2))
        torch.testing.assert_close(net(x), soft_pool2d(3 * x, 2) + 1)
        assert (net.hooked, other.hooked) == (1, 1)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickles(self, protocol):
        x = randn(1, 2, 4, 4)
        net = scaled()
        other = pickle.loads(pickle.dumps(net, protocol))
        assert other(x, offset=1).equal(net(x, offset=1))
        assert (net.hooked, other.hooked) == (1, 1)
        assert type(other) is type(net)

    def test_a_saved_module(self):
        net, file = scaled(), io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        x = randn(1, 2, 4, 4)
        assert torch.load(file, weights_only=False)(x).equal(net(x))

    def test_compiles_and_exports(self):
        net = Branches().eval()
        replace_pooling(net, include="*")
        x = randn(1, 2, 6, 6)
        exported = torch.export.export(net, (x,))
        assert "mmsoftpool.soft_pool" in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), net(x))
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x))

    def test_compiles_with_a_pool_from_mmengines_registry(self):
        registry = pytest.importorskip("mmengine.registry").MODELS
        registry.register_module("RegisteredPool2d", force=True, module=NoisyPool2d)
        net = scaled()
        replace_pooling(net, dict(type="RegisteredPool2d"), include="max_pool2d()")
        x = randn(1, 2, 4, 4)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), soft_pool2d(3 * x, 2) + 1)

    @pytest.mark.parametrize("wrap", [lambda net: net, nn.Sequential], ids=["itself", "inside"])
    def test_fx_traces_it(self, wrap):
        net = Branches()
        replace_pooling(net, include="*")
        graph = torch.fx.symbolic_trace(wrap(net))
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count(soft_pool2d) == 2 and F.avg_pool2d not in targets
        x = randn(1, 2, 6, 6)
        assert graph(x).equal(net(x))


class TestCheckpoint:
    """Activation checkpoints: what is recomputed in the backward runs the same pools, or fails."""

    class Inside(nn.Module):
        def __init__(self, use_reentrant):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)
            self.use_reentrant = use_reentrant

        def forward(self, x):
            def inner(x):
                return F.avg_pool2d(self.conv(x), 2).square()

            return checkpoint(inner, x, use_reentrant=self.use_reentrant)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_call_inside_of_one_is_refused_in_the_forward(self, use_reentrant):
        net = nn.Sequential(self.Inside(use_reentrant))
        replace_pooling(net, include="*")
        with pytest.raises(RuntimeError, match="avg_pool2d is called inside of an activation"):
            net(randn(1, 2, 6, 6).requires_grad_())

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_module_that_is_checkpointed_has_the_same_gradients(self, use_reentrant):
        net = nn.Sequential(nn.Conv2d(2, 3, 1), Scaled())
        replace_pooling(net, include="*")
        gradients = []
        for call in (net, lambda x: checkpoint(net, x, use_reentrant=use_reentrant)):
            x = randn(1, 2, 6, 6).requires_grad_()
            call(x).square().sum().backward()
            gradients.append(x.grad)
        assert gradients[0].equal(gradients[1])
