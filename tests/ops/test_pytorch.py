"""opcheck, compile, export, fx, FLOP counters: the rest of PyTorch."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends import registry

from mmsoftpool import AdaptiveSoftPool2d, SoftPool2d, adaptive_soft_pool2d, soft_pool2d
from mmsoftpool.ops import autograd, backends
from mmsoftpool.ops.flops import FVCORE, PTFLOPS, THOP
from mmsoftpool.ops.pooling import Pooling

from ..common import ROOT, blocks, randn, since
from . import definition

# torch warns that the reference takes the compiled kernel's place; see the fixture `backend`.
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

X = torch.zeros(1, 1, 8, 8)


class TestPyTorch:
    @since(2, 5)
    @pytest.mark.parametrize(
        ("dtype", "format", "alpha", "gradient"),
        [
            *((torch.float32, torch.contiguous_format, a, "exact") for a in definition.ALPHAS),
            (torch.float32, torch.contiguous_format, 1.0, "paper"),
            (torch.float32, torch.channels_last, 4.0, "exact"),
            (torch.float64, torch.contiguous_format, 4.0, "exact"),
            (torch.bfloat16, torch.channels_last, 4.0, "paper"),
        ],
    )
    def test_opcheck(self, dtype, format, alpha, gradient):
        arguments = Pooling.check(2, 3, 2, 1, alpha=alpha, gradient=gradient)
        x = torch.randn(2, 3, 7, 9, dtype=dtype).to(memory_format=format).requires_grad_()
        g = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=format).requires_grad_()
        torch.library.opcheck(torch.ops.mmsoftpool.soft_pool.default, (x, *arguments))
        torch.library.opcheck(torch.ops.mmsoftpool.soft_pool_backward.default, (g, x, *arguments))

    def test_small_calls_go_through_the_dispatcher_once(self):
        if autograd.MISSING is not None or not hasattr(torch.compiler, "is_compiling"):
            pytest.skip("a torch without the names that this takes")
        x = torch.randn(1, 1, 4, 4, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            soft_pool2d(x, 2).sum().backward()
            with torch.no_grad():
                soft_pool2d(x, 2)
        events = [event.name for event in profile.events()]
        assert events.count("mmsoftpool::soft_pool") == 2
        assert events.count("mmsoftpool::soft_pool_backward") == 1

    def test_compiles_once_for_all_sizes_without_graph_breaks(self):
        torch._dynamo.reset()
        pool = SoftPool2d(3, 2, 1)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return registry.lookup_backend("aot_eager")(graph, inputs)

        compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend=backend)
        first = 0
        for size in ((8, 9), (15, 12), (33, 21)):
            first = first or len(graphs)
            x = torch.randn(2, 3, *size, requires_grad=True)
            y = compiled(x)
            assert y.equal(pool(x))
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert grad.equal(torch.autograd.grad(pool(x).sum(), x)[0])
        # No recompilation for another size. (With dynamic=True torch takes the float alpha for a
        # variable at first and traces once more when it turns out to be a constant.)
        assert len(graphs) == first or backends.TORCH_VERSION < (2, 5)

    def test_autocast_keeps_the_inputs_type(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert soft_pool2d(X.bfloat16(), 2).dtype == torch.bfloat16
            assert soft_pool2d(X, 2).dtype == torch.float32

    @since(2, 5)
    def test_export_with_dynamic_shapes(self):
        program = torch.export.export(
            Net(), (torch.randn(2, 3, 16, 20),), dynamic_shapes=dynamic_shapes()
        )
        assert torch.ops.mmsoftpool.soft_pool.default in [n.target for n in program.graph.nodes]
        x = torch.randn(3, 3, 33, 27)
        assert program.module()(x).equal(Net()(x))

    def test_compiles_with_another_alpha(self):
        torch._dynamo.reset()
        compiled = torch.compile(soft_pool2d, fullgraph=True, backend="aot_eager")
        x = randn(1, 2, 8, 8)
        for alpha in (0.5, 2.0, 7.0):
            assert compiled(x, 2, alpha=alpha).equal(soft_pool2d(x, 2, alpha=alpha))

    def test_fx_traces_the_functions_and_the_modules(self):
        net = torch.nn.Sequential(SoftPool2d(3, 2, 1, alpha=2.0), AdaptiveSoftPool2d((2, 3)))
        graph = torch.fx.symbolic_trace(net)
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert called == [soft_pool2d, adaptive_soft_pool2d]
        x = randn(2, 3, 16, 20)
        assert graph(x).equal(net(x))

    @pytest.mark.parametrize("pool", [SoftPool2d(3, 2, 1, alpha=2.0), AdaptiveSoftPool2d((2, 3))])
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_jit_trace(self, pool):
        x = randn(1, 2, 8, 8)
        traced = torch.jit.trace(pool, x)
        assert traced(x + 1).equal(pool(x + 1))

    @since(2, 6)
    def test_compiled_autograd(self):
        x = randn(2, 3, 8, 9).requires_grad_()
        with torch._dynamo.config.patch(compiled_autograd=True):
            for pool in (
                lambda x: soft_pool2d(x, 3, 2, 1),
                lambda x: soft_pool2d(x, 2, alpha=2.0, gradient="paper"),
                lambda x: adaptive_soft_pool2d(x, (3, 2)),
            ):
                (expected,) = torch.autograd.grad(pool(x).square().sum(), x)
                torch._dynamo.reset()

                def train(x, pool=pool):
                    pool(x).square().sum().backward()

                torch.compile(train, backend="aot_eager")(x)
                assert x.grad.equal(expected)
                x.grad = None

    @since(2, 5)
    def test_dtensor_keeps_shards_of_the_batch_and_of_the_channels(self, run_script, tmp_path):
        # In a process of its own, since it needs a process group.
        script = tmp_path / "shards.py"
        script.write_text(SHARDS)
        run_script(script, MASTER_ADDR="127.0.0.1", MASTER_PORT="0", PYTHONPATH=str(ROOT))

    def test_subclasses_and_modes_see_the_functions(self):
        called = []

        class Logging(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                called.append(function)
                return super().__torch_function__(function, types, args, kwargs or {})

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                called.append(function)
                return function(*args, **(kwargs or {}))

        for function, size in ((soft_pool2d, 3), (adaptive_soft_pool2d, (2, 3))):
            x = randn(1, 2, 8, 9)
            y = function(x.as_subclass(Logging), size)
            assert function in called and type(y) is Logging
            called.clear()
            with Mode():
                assert function(x, size).equal(y)
            assert function in called

    def test_flop_counters(self):
        flops = 6 * 9 * 3 * 4 * 5  # 6 a tap, 9 taps, 3 x 4 x 5 outputs
        x = torch.randn(1, 3, 8, 10, requires_grad=True)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            soft_pool2d(x, 3, 2, 1)
        assert counter.get_total_flops() == flops
        analysis = pytest.importorskip("mmengine.analysis")
        conv = torch.nn.Conv2d(3, 3, 1)  # mmengine wants a model with parameters
        alone, pooled = (
            analysis.get_model_complexity_info(model, (3, 8, 10))["flops"]
            for model in (conv, torch.nn.Sequential(conv, SoftPool2d(3, 2, 1)))
        )
        assert pooled - alone == flops


SHARDS = """
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from mmsoftpool import adaptive_soft_pool2d, soft_pool2d

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
full = torch.randn(4, 6, 8, 8)
for pool in (lambda x: soft_pool2d(x, 3, 2, 1), lambda x: adaptive_soft_pool2d(x, (3, 1))):
    for placement, kept in ((Shard(0), 1), (Shard(1), 1), (Replicate(), 1), (Shard(2), 0)):
        x = distribute_tensor(full, mesh, [placement]).requires_grad_()
        y = pool(x)
        expected = placement if kept else Replicate()
        assert y.placements == (expected,), (placement, y.placements)
        y.sum().backward()
        assert x.grad.to_local().shape == full.shape
        assert y.full_tensor().equal(pool(full))
        with torch.inference_mode():
            assert pool(x).placements == (expected,)
"""


@pytest.mark.parametrize("counter", ["thop", "ptflops", "fvcore"])
def test_other_packages_flop_counters(counter):
    pytest.importorskip(counter)
    pools = [SoftPool2d(3, 2, 1), AdaptiveSoftPool2d((3, 2))]
    # 9 taps for each of 4 x 5 outputs; windows of 2, 2 and 2 rows, of 3 and 3 columns.
    flops = 6 * 3 * (9 * 4 * 5 + 6 * 6)
    conv = torch.nn.Conv2d(3, 3, 1)

    def count(net):
        if counter == "thop":
            import thop

            custom_ops = {**THOP, torch.nn.Conv2d: lambda *args: None}
            return thop.profile(net, (torch.zeros(1, 3, 8, 10),), custom_ops, verbose=False)[0]
        if counter == "ptflops":
            import ptflops

            return ptflops.get_model_complexity_info(
                *(net, (3, 8, 10), False, False),
                backend="pytorch",
                custom_modules_hooks=PTFLOPS,
            )[0]
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(net, torch.zeros(1, 3, 8, 10))
        return analysis.set_op_handle(**FVCORE).total()

    assert count(torch.nn.Sequential(conv, *pools)) - count(torch.nn.Sequential(conv)) == flops


class Net(torch.nn.Module):
    """A stem without its convolution."""

    def forward(self, x):
        return soft_pool2d(x * 2, 3, 2, 1, alpha=1.5)


def dynamic_shapes():
    height, width = (torch.export.Dim(name, min=4, max=4096) for name in ("height", "width"))
    return {"x": {0: torch.export.Dim("batch"), 2: height, 3: width}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_package_of_aotinductor_runs_without_python(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), SoftPool2d(3, 2, 1)).eval()
    image = torch.arange(3 * 16 * 20).reshape(1, 3, 16, 20) / 100
    package = str(tmp_path / "net.pt2")
    torch._inductor.aoti_compile_and_package(
        torch.export.export(net, (image,)), package_path=package
    )
    (tmp_path / "run.cpp").write_text(blocks(ROOT / "docs" / "export.md", "cpp")[0])
    folder = Path(torch.__file__).parent
    command = blocks(ROOT / "docs" / "export.md", "text")[-1].replace("\\\n", " ")
    command = command.replace("$TORCH", str(folder))
    subprocess.run(command.split(), cwd=tmp_path, check=True)
    out = subprocess.run(
        [tmp_path / "run", package, backends.find_library("cpu").path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert float(out) == pytest.approx(net(image).double().sum().item(), rel=1e-5)
