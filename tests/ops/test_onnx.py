"""SoftPool in exported ONNX files: standard operators, the operator's values, in every engine."""

import math

import pytest
import torch
from torch import nn

from mmsoftpool import (
    AdaptiveSoftPool2d,
    SoftPool1d,
    SoftPool2d,
    SoftPool3d,
    soft_pool2d,
)
from mmsoftpool.ops.onnx import MAX_POOLING

from ..common import in_openvino_thread, randn, since

pytestmark = [
    since(2, 8),
    # Of torch and onnxscript, about their own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
onnx = pytest.importorskip("onnx")
DYNAMIC = torch.export.Dim.DYNAMIC
SIZE = (24, 30)

# In the fast form and in the exact one: with taps added at once and one axis after the other.
POOLS = [
    SoftPool2d(3, 2, 1),
    SoftPool2d(2, alpha=0.5),
    SoftPool2d(3, 1, 1, alpha=64.0),
    SoftPool2d((13, 5), 1, (6, 2)),
    SoftPool2d(4, 3, ((1, 2), (0, 1)), alpha=8.0),
    SoftPool2d(3, 2, 0, ceil_mode=True, alpha=0.0),
    SoftPool2d(3, 2, 1, alpha=9 * MAX_POOLING),
]


class Side(nn.Module):
    """Pools beside each other: one export takes less time than several."""

    def __init__(self, pools):
        super().__init__()
        self.pools = nn.ModuleList(pools)

    def forward(self, x):
        return tuple(pool(x) for pool in self.pools)


class Kinds(nn.Module):
    """Other dtypes and other numbers of axes than float32 and two; dilation; adaptive pools."""

    def forward(self, x):
        half, double = SoftPool2d(3, 2, 1)(x.half()), SoftPool2d(2)(x.double())
        line, volume = SoftPool1d(3, 2, 1)(x.flatten(2)), SoftPool3d(2)(x.unflatten(2, (4, -1)))
        dilated, adaptive = SoftPool2d(3, 2, 1, dilation=2)(x), AdaptiveSoftPool2d((4, 3))(x)
        return half, line, volume, adaptive, double, dilated


def export(net, path, example, axes=None):
    torch.onnx.export(net.eval(), (example,), path, dynamo=True, dynamic_shapes=axes, verbose=False)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return export(Side(POOLS), tmp_path_factory.mktemp("onnx") / "net.onnx", randn(2, 3, *SIZE))


def session(engine, path):
    """An engine's function from a tensor to a list of tensors."""
    module = pytest.importorskip(engine)
    if engine == "onnxruntime":
        options = module.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        run = module.InferenceSession(path, options)
        name = run.get_inputs()[0].name
        return lambda x: [torch.from_numpy(y) for y in run.run(None, {name: x.numpy()})]
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = in_openvino_thread(module.Core().compile_model, path, "CPU", config)
    return lambda x: [torch.tensor(y) for y in compiled({0: x.numpy()}).values()]


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(request, file):
    return session(request.param, file)


def with_values(x, values):
    x[:, :, 5, 7], x[:, :, 12:, 15:] = values
    return x


def largest(pool, x):
    """The largest magnitude of every window, of finite taps."""
    grid = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return soft_pool2d(torch.where(x.isfinite(), x.abs(), 0), *grid, alpha=1e15)


INPUTS = {
    **{f"{scale:g}": randn(2, 3, *SIZE) * scale for scale in (1e-3, 1, 30, 1e2, 1e4)},
    **{f"around {mean}": randn(2, 3, *SIZE) + mean for mean in (-85, -72, 60, 75, 85)},
    "relu": randn(2, 3, *SIZE).relu() * 5,
    "constant": torch.full((2, 3, *SIZE), 0.7),
    "1e30": torch.full((2, 3, *SIZE), -1e30),
    "beside 1e4": with_values(randn(2, 3, *SIZE), (1e4, 1e-3)),
    "beside 75": with_values(randn(2, 3, *SIZE) * 1e-3, (75.0, -72.0)),
    "beside -inf": with_values(randn(2, 3, *SIZE), (-math.inf, -math.inf)),
    "beside inf": with_values(randn(2, 3, *SIZE), (math.inf, 0.0)),
    "NaN alone": with_values(randn(2, 3, *SIZE), (math.nan, 0.0)),
    "beside NaN": with_values(randn(2, 3, *SIZE), (math.nan, -math.inf)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_value_is_accurate_at_the_scale_of_its_own_window(engine, name):
    x = INPUTS[name]
    for pool, y in zip(POOLS, engine(x), strict=True):
        expected = pool(x.double())
        special = ~expected.isfinite()
        torch.testing.assert_close(y.double()[special], expected[special], equal_nan=True)
        error = (y - expected).abs()[~special]
        assert (error <= 1e-6 * largest(pool, x.double())[~special]).all(), pool


def test_other_dtypes_axes_and_dilation(tmp_path):
    example = randn(2, 3, 16, 12)
    path = export(Kinds(), tmp_path / "kinds.onnx", example)
    assert len(graphs(path)) == 1 + 2 * 4  # no fast form for float64 and dilation
    run = session("onnxruntime", path)
    for x in (example, example * 1000, torch.where(example < 1, example, -math.inf)):
        for y, expected in zip(run(x), Kinds()(x), strict=True):
            rtol = {torch.half: 1e-3, torch.float: 1e-6, torch.double: 1e-14}[y.dtype]
            torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol)


def graphs(path):
    """Node types of the graph, and of the branches of its ``If`` nodes."""
    graph = onnx.load(path).graph
    branches = [a.g for node in graph.node for a in node.attribute if a.g.node]
    return [[(node.domain, node.op_type) for node in g.node] for g in (graph, *branches)]


def test_the_file_has_standard_operators_that_tensorrt_has(file):
    assert not onnx.load(file).functions
    types = {node for graph in graphs(file) for node in graph}
    # From the support matrix of onnx-tensorrt.
    supported = "Abs Add And AveragePool Div Exp Greater GreaterOrEqual Identity If Less "
    supported += "LessOrEqual MaxPool Mul Pad ReduceMin ReduceSum Slice Sub Where"
    assert types <= {("", name) for name in supported.split()}


def test_the_input_is_sliced_only_where_the_fast_form_does_not_hold(file):
    graph, *branches = graphs(file)
    assert len(branches) == 2 * len(POOLS)
    assert not {"Slice", "Concat", "Gather"} & {name for _, name in graph}
    # Two average pools of 13 x 5 are four, over one axis each.
    names = [name for _, name in graph]
    assert names.count("AveragePool") == 4 * 2 + 4 + 1 and names.count("MaxPool") == 1
    # k + k slices of each of three tensors at most.
    assert max(len(branch) for branch in branches) < 15 * (13 + 5)


@pytest.mark.parametrize("example", [(2, 2, 14, 20), (2, 2, 15, 21)])
def test_the_right_shape_at_every_size(example, tmp_path):
    pools = [
        SoftPool2d(3, 3, 1, ceil_mode=True),
        SoftPool2d((5, 2), 2, 1),  # torch cannot prove that its output is not empty
        AdaptiveSoftPool2d((3, 5)),
        AdaptiveSoftPool2d((1, None)),
    ]
    axes = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    run = session(
        "onnxruntime", export(Side(pools), tmp_path / "pools.onnx", randn(*example), axes)
    )
    for size in (example[2:], (15, 20), (16, 21), (9, 30), (31, 7), (8, 8)):
        for scale in (1.0, 1000.0):
            x = randn(3, 2, *size) * scale
            for y, pool in zip(run(x), pools, strict=True):
                torch.testing.assert_close(y, pool(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "pool"),
    [(8, SoftPool2d(2, 3, 0, 3, ceil_mode=True)), (3, SoftPool2d(3, 1, 1, dilation=2))],
    ids=["padding as large as the kernel", "windows larger than the map"],
)
def test_dilation_at_the_borders_of_the_map(tmp_path, size, pool):
    x = randn(1, 2, size, size)
    x[0, 0, 0, 0] = -math.inf
    (y,) = session("onnxruntime", export(pool, tmp_path / "x.onnx", x))(x)
    torch.testing.assert_close(y, pool(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_large_kernel_on_a_map_of_dynamic_size(tmp_path):
    pool = SoftPool2d(64, ceil_mode=True)
    axes = ({2: DYNAMIC, 3: DYNAMIC},)
    run = session("onnxruntime", export(pool, tmp_path / "x.onnx", randn(1, 2, 80, 90), axes))
    for x in (randn(1, 2, 130, 70), randn(1, 2, 65, 66) * 1000):
        torch.testing.assert_close(run(x)[0], pool(x), rtol=1e-5, atol=1e-5)


def test_the_old_exporter_and_torchscript_are_refused_with_the_way_that_works(tmp_path):
    net = nn.Sequential(nn.ReLU(), SoftPool2d(2))
    with pytest.raises(RuntimeError, match=r"cannot convert SoftPool.*: call it with dynamo=True"):
        torch.onnx.export(net, (randn(1, 2, 8, 8),), str(tmp_path / "x.onnx"), dynamo=False)
    for pool in (net, AdaptiveSoftPool2d(1)):
        with pytest.raises(RuntimeError, match=r"SoftPool2d.*: use torch\.jit\.trace"):
            torch.jit.script(pool)
