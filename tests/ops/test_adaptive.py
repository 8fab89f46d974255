"""Adaptive pools against their definition, torch's own and under torch's transforms."""

import functools
import time

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import mmsoftpool
from mmsoftpool import (
    AdaptiveSoftPool2d,
    adaptive_soft_pool1d,
    adaptive_soft_pool2d,
    adaptive_soft_pool3d,
    soft_pool2d,
)
from mmsoftpool.ops import reference

from ..common import rand, randn, since
from . import definition

# torch warns that the reference takes the compiled kernel's place; see the fixture `backend`.
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

X = torch.zeros(1, 1, 8, 8)

# Output sizes for 7 x 10, some of which divide it.
OUTPUT_SIZES = [1, 3, 7, (2, None), (None, 5), (5, 13)]


@pytest.mark.parametrize("output_size", OUTPUT_SIZES)
def test_the_windows_are_those_of_adaptive_pools(backend, output_size):
    x = randn(2, 3, 7, 10).double()
    average = F.adaptive_avg_pool2d(x, output_size)
    maximum = F.adaptive_max_pool2d(x, output_size)
    close = functools.partial(torch.testing.assert_close, rtol=1e-14, atol=1e-15)
    close(adaptive_soft_pool2d(x, output_size, alpha=0), average)
    close(adaptive_soft_pool2d(x, output_size, alpha=1e9), maximum)


@pytest.mark.parametrize("output_size", OUTPUT_SIZES)
def test_gradient_is_the_derivative(backend, output_size):
    x = randn(1, 2, 7, 10).double().requires_grad_()
    assert gradcheck(lambda x: adaptive_soft_pool2d(x, output_size, alpha=2.0), x)


def test_an_output_size_of_1_is_one_window_over_the_map(backend):
    x = randn(2, 3, 7, 10)
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0)
    close(adaptive_soft_pool2d(x, 1, alpha=2.0), soft_pool2d(x, (7, 10), alpha=2.0))


def test_every_dimension_and_unbatched_input(backend):
    functions = (adaptive_soft_pool1d, adaptive_soft_pool2d, adaptive_soft_pool3d)
    for axes, function in enumerate(functions, 1):
        x = randn(2, 3, *(7, 8, 9)[:axes]).double()
        truth = getattr(F, f"adaptive_avg_pool{axes}d")(x, 3)
        torch.testing.assert_close(function(x, 3, alpha=0), truth)
        torch.testing.assert_close(function(x[0], 3, alpha=0), truth[0])


@pytest.mark.parametrize("output_size", [1, 3, 5])
def test_channels_last_stays(output_size):
    x = randn(2, 4, 10, 10).contiguous(memory_format=torch.channels_last)
    y = adaptive_soft_pool2d(x, output_size)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, adaptive_soft_pool2d(x.contiguous(), output_size))


@pytest.mark.parametrize(
    ("error", "message", "output_size"),
    [
        (ValueError, "output_size must be an int >= 1 and .* or None.*got 0", 0),
        (ValueError, r"output_size must be .*2 of them, got \(1, 2, 3\)", (1, 2, 3)),
        (TypeError, "output_size must be .*got 1.5", 1.5),
        (ValueError, r"output_size must be .* < 2\*\*48 .*got 281474976710656", 2**48),
    ],
)
def test_a_bad_output_size_is_named(error, message, output_size):
    with pytest.raises(error, match=message):
        adaptive_soft_pool2d(X, output_size)
    with pytest.raises(error, match=message):
        AdaptiveSoftPool2d(output_size)


def test_an_empty_map_is_named():
    with pytest.raises(ValueError, match=r"\(H, W\) = \(0, 8\) is empty"):
        adaptive_soft_pool2d(X[..., :0, :], 1)


def test_the_module_is_the_function():
    x = randn(1, 2, 9, 7)
    module = AdaptiveSoftPool2d((3, None), alpha=2.0)
    assert module(x).equal(adaptive_soft_pool2d(x, (3, None), alpha=2.0))
    assert repr(module) == (
        "AdaptiveSoftPool2d(output_size=(3, None), alpha=2.0, gradient='exact')"
    )


# Input and output sizes: smaller and larger ones, few and many windows in a row, some that divide.
SIZES = [
    ((7,), (3,)),
    ((40,), (33,)),
    ((9,), (9,)),
    ((8, 9), (3, 5)),
    ((7, 5), (1, 2)),
    ((6, 8), (4, 6)),
    ((3, 4), (5, 7)),
    ((20, 21), (2, 6)),
    ((33, 40), (1, 3)),
    ((12, 35), (5, 34)),
    ((5, 6, 7), (2, 4, 3)),
]
EPSILON = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


@pytest.mark.parametrize("alpha", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize(("size", "out"), SIZES)
def test_value_and_gradient_are_the_definition(size, out, gradient, alpha):
    pool = getattr(mmsoftpool, f"adaptive_soft_pool{len(size)}d")
    formats = [
        torch.contiguous_format,
        *([torch.channels_last] if len(size) == 2 else []),
        *([torch.channels_last_3d] if len(size) == 3 else []),
    ]
    # Fewer planes than are pooled side by side, and more.
    for channels, truth_channels in ((3, 3), (21, 1)):
        source = rand(1, channels, *size) * 4
        g = randn(1, channels, *out, seed=1)
        first = slice(channels - truth_channels, None)
        for dtype, epsilon in EPSILON.items():
            x, g = source.to(dtype), g.to(dtype)
            y, grad = definition.adaptive_soft_pool(x[:, first], out, g[:, first], gradient, alpha)
            for format in formats:
                x = x.contiguous(memory_format=format).detach().requires_grad_()
                value = pool(x, out, alpha=alpha, gradient=gradient)
                torch.testing.assert_close(
                    value[:, first].double(), y, rtol=epsilon, atol=4 * epsilon
                )
                (slope,) = torch.autograd.grad(value, x, g)
                torch.testing.assert_close(
                    slope[:, first].double(), grad, rtol=epsilon, atol=8 * max(1, alpha) * epsilon
                )


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize(("size", "out"), [((70, 90), (9, 4)), ((20, 15, 17), (6, 2, 3))])
def test_maps_that_are_held_a_part_at_a_time(size, out, gradient):
    pool = getattr(mmsoftpool, f"adaptive_soft_pool{len(size)}d")
    source, g = rand(2, 45, *size) * 4, randn(2, 45, *out, seed=1)
    for dtype, epsilon in EPSILON.items():
        x = source.to(dtype).requires_grad_()
        results = []
        last = torch.channels_last if len(size) == 2 else torch.channels_last_3d
        for format in (torch.contiguous_format, last):
            value = pool(x.contiguous(memory_format=format), out, gradient=gradient)
            (slope,) = torch.autograd.grad(value, x, g.to(dtype))
            results.append((value.double(), slope.double()))
        y = reference.adaptive_soft_pool(x.detach().double(), out, 1.0, gradient)
        grad = reference.adaptive_soft_pool_backward(
            g.to(dtype).double(), x.detach().double(), out, 1.0, gradient
        )
        for value, slope in results:
            torch.testing.assert_close(value, y, rtol=epsilon, atol=4 * epsilon)
            torch.testing.assert_close(slope, grad, rtol=epsilon, atol=8 * epsilon)


@pytest.mark.parametrize(("size", "out"), [((7,), (3,)), ((5, 4), (2, 3)), ((3, 2, 3), (2, 2, 2))])
def test_every_derivative(backend, size, out):
    pool = getattr(mmsoftpool, f"adaptive_soft_pool{len(size)}d")
    x = randn(1, 2, *size).double().requires_grad_()
    assert gradcheck(lambda x: pool(x, out), x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: pool(x, out), x, check_fwd_over_rev=True)


def test_vmap_and_jacobians():
    x = randn(4, 2, 3, 7, 8).double()
    pool = functools.partial(adaptive_soft_pool2d, output_size=(3, 5))
    assert torch.func.vmap(pool)(x).equal(torch.stack([pool(image) for image in x]))
    truth = torch.autograd.functional.jacobian(pool, x[0])
    torch.testing.assert_close(torch.func.jacrev(pool)(x[0]), truth)
    torch.testing.assert_close(torch.func.jacfwd(pool)(x[0]), truth)


def test_not_finite_values_stay_in_their_windows(backend):
    x = randn(1, 20, 7, 10)
    x[0, 3, 0, 0], x[0, 4] = float("nan"), -float("inf")
    x.requires_grad_()
    y = adaptive_soft_pool2d(x, (3, 4))
    assert y.isnan().nonzero().tolist() == [[0, 3, 0, 0]] and (y[0, 4] == -float("inf")).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isnan().nonzero()[:, 2:].tolist() == [[h, w] for h in range(3) for w in range(3)]


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "out"), [((19, 23), (7, 9)), ((70, 130), (3, 7))])
def test_does_not_depend_on_the_number_of_threads(format, size, out):
    x = randn(2, 40, *size).contiguous(memory_format=format).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = adaptive_soft_pool2d(x, out)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
    finally:
        torch.set_num_threads(threads)
    for y, grad in results[1:]:
        assert y.equal(results[0][0]) and grad.equal(results[0][1])


def test_an_output_larger_than_memory_is_refused_at_once():
    with pytest.raises(RuntimeError, match=r"memory|allocate"):
        adaptive_soft_pool1d(torch.randn(2, 2, 2), 2**40)


def test_the_raw_operator_refuses_what_it_cannot_do():
    pool = torch.ops.mmsoftpool.adaptive_soft_pool
    for output_size in ([0, 1], [-1, 1], [1], [2**62, 1], [1, 1, 1]):
        with pytest.raises(RuntimeError, match="soft_pool"):
            pool(X, output_size, 1.0, "exact")
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.mmsoftpool.adaptive_soft_pool_backward(X, X, [3, 3], 1.0, "exact")


@since(2, 5)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(format):
    x = randn(2, 3, 7, 9).to(memory_format=format).requires_grad_()
    g = randn(2, 3, 3, 5).to(memory_format=format).requires_grad_()
    arguments = ([3, 5], 2.0, "exact")
    torch.library.opcheck(torch.ops.mmsoftpool.adaptive_soft_pool.default, (x, *arguments))
    torch.library.opcheck(
        torch.ops.mmsoftpool.adaptive_soft_pool_backward.default, (g, x, *arguments)
    )


@since(2, 6)
@pytest.mark.parametrize("output_size", [1, 2, (3, 5), (None, 2)])
def test_one_graph_for_all_sizes(output_size):
    pool = AdaptiveSoftPool2d(output_size)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        pool, (randn(2, 3, 14, 20),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    assert torch.ops.mmsoftpool.adaptive_soft_pool.default in [
        node.target for node in program.graph.nodes
    ]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool, backend=counter, fullgraph=True)
    for size in ((2, 3, 14, 20), (3, 3, 15, 21), (4, 3, 9, 30)):
        x = randn(*size).requires_grad_()
        assert program.module()(x).equal(pool(x))
        for axis in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, axis)
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        assert grad.equal(torch.autograd.grad(pool(x).sum(), x)[0])
    assert counter.frame_count == 1


def test_flops():
    with FlopCounterMode(display=False) as counter:
        adaptive_soft_pool2d(randn(2, 3, 7, 10), (3, 4))
    # Windows of 3, 3 and 3 rows; of 3, 3, 3 and 3 columns.
    assert counter.get_total_flops() == 6 * 2 * 3 * 9 * 12


# Where the sizes do not divide: large and small windows, that overlap little and much, outputs
# smaller and larger than the input; of enough planes that the call itself does not count.
SPEED = [
    ((4, 64, 1000), 300),
    ((8, 256, 65), 7),
    ((8, 512, 50), 3),
    ((4, 64, 40), 66),
    ((8, 256, 13, 13), 6),
    ((8, 256, 56, 56), 6),
    ((4, 64, 65, 65), 9),
    ((4, 64, 65, 65), (1, 4)),
    ((4, 64, 65, 65), (2, 2)),
    ((2, 16, 200, 200), (1, 7)),
    ((2, 16, 200, 200), (7, 1)),
    ((16, 512, 8, 8), 3),
    ((8, 512, 10, 10), 6),
    ((1, 16, 512, 512), 300),
    ((1, 16, 100, 100), 150),
    ((1, 32, 17, 19, 21), 5),
    ((2, 64, 9, 9, 9), 4),
    ((1, 32, 10, 33, 33), (3, 6, 6)),
    ((2, 32, 16, 30, 30), (1, 7, 7)),
    ((2, 64, 13, 28, 28), 5),
    ((1, 16, 5, 6, 7), (8, 9, 10)),
    ((1, 16, 40, 40, 40), (1, 1, 3)),
    ((1, 16, 20, 100, 100), (3, 7, 7)),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(("size", "out"), SPEED)
def test_takes_at_most_three_times_the_average_pool(size, out, layout, dtype):
    axes = len(size) - 2
    format = torch.contiguous_format
    if layout == "channels last":
        if axes == 1:
            pytest.skip("there is no channels last for 1d tensors")
        format = torch.channels_last if axes == 2 else torch.channels_last_3d
    x = randn(*size).to(dtype).contiguous(memory_format=format).requires_grad_()
    pools = [
        getattr(module, name.format(axes))
        for module, name in ((mmsoftpool, "adaptive_soft_pool{}d"), (F, "adaptive_avg_pool{}d"))
    ]
    outputs = [pool(x, out) for pool in pools]
    g = torch.randn_like(outputs[0])
    forwards = [functools.partial(pool, x.detach(), out) for pool in pools]
    backwards = [
        functools.partial(torch.autograd.grad, y, x, g, retain_graph=True) for y in outputs
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for calls in (forwards, backwards):
            times = [[], []]
            for _ in range(50):  # in turn, and the best of each: other processes run
                for call, seconds in zip(calls, times, strict=True):
                    start = time.process_time()
                    call()
                    seconds.append(time.process_time() - start)
            assert min(times[0]) <= 3 * min(times[1])
    finally:
        torch.set_num_threads(threads)
