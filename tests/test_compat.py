"""The authors' operators, written here from their formulas with their errors, and ours under their
names."""

import inspect
import itertools
import math
import pickle
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import mmsoftpool
from mmsoftpool import compat, replace_pooling

from .common import randn, since

NAMES = ("SoftPool", "SoftPool.idea", "softpool_cuda")
FUNCTIONS = {1: compat.soft_pool1d, 2: compat.soft_pool2d, 3: compat.soft_pool3d}
SIZES = {1: (9,), 2: (7, 8), 3: (5, 5, 6)}
# kernel_size, stride; "each" stands for one per axis, all different.
GEOMETRIES = [(2, None), (3, 2), (3, 1), (4, 2), (2, 3), (5, 5), ("each", "each")]
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def per_axis(axes, kernel_size, stride):
    stride = kernel_size if stride is None else stride
    each = {"kernel": (3, 2, 2)[:axes], "stride": (2, 1, 3)[:axes]}
    return (
        each["kernel"] if kernel_size == "each" else (kernel_size,) * axes,
        each["stride"] if stride == "each" else (stride,) * axes,
    )


def windows(sizes, kernel_size, stride, outs, shifts):
    """The output's indices, each with the indices of its taps; those outside are dropped."""
    for out in itertools.product(*map(range, outs)):
        starts = [o * s - shift for o, s, shift in zip(out, stride, shifts, strict=True)]
        taps = itertools.product(
            *(range(start, start + k) for start, k in zip(starts, kernel_size, strict=True))
        )
        yield out, [t for t in taps if all(0 <= i < n for i, n in zip(t, sizes, strict=True))]


def outs_aligned(sizes, kernel_size, stride):
    return [(n - k) // s + 1 for n, k, s in zip(sizes, kernel_size, stride, strict=True)]


def their_kernel(x, kernel_size, stride, grad, shifted):
    """Their CUDA kernel in float64 with float32's limits: the output and the gradient.

    The sum of the exponentials is at most the largest finite number; before 2022-04-07 each of them
    was, too. The gradient is the weight. In 3d the windows are shifted at all dates, and frame d
    begins at the address d * H; unshifted ones are what is meant. (Their 3d backward had another
    grid where H and W differ, and other windows since that date. That was no gradient, and is not
    written here.)
    """
    sizes = x.shape[2:]
    outs = outs_aligned(sizes, kernel_size, stride)
    if shifted:
        outs = [n // s for n, s in zip(sizes, stride, strict=True)]
    shifts = [k // 2 if shifted else 0 for k in kernel_size]
    y, grad_x = x.new_zeros(*x.shape[:2], *outs), torch.zeros_like(x)

    def address(tap):
        if len(tap) < 3:
            return sum(i * math.prod(sizes[a + 1 :]) for a, i in enumerate(tap))
        d, h, w = tap
        return d * sizes[1] + h * sizes[2] + w if shifted else (d * sizes[1] + h) * sizes[2] + w

    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        plane, plane_grad = x[n, c].flatten(), grad_x[n, c].view(-1)
        for out, taps in windows(sizes, kernel_size, stride, outs, shifts):
            exps = {tap: plane[address(tap)].exp().item() for tap in taps}
            bound = LARGEST if shifted else math.inf
            exps = {tap: e if e <= LARGEST else bound for tap, e in exps.items()}
            total = max(min(sum(exps.values()), LARGEST), SMALLEST)
            for tap, e in exps.items():
                y[(n, c, *out)] += e / total * plane[address(tap)]
                plane_grad[address(tap)] += e / total * grad[(n, c, *out)]
    return y, grad_x


def their_fallback(x, kernel_size, stride, grad, over_channels, clamped=False):
    """What they ran without the CUDA kernel: the output, and the gradient that autograd gives."""
    x = x.clone().requires_grad_()
    weights = x.exp().sum(1, keepdim=True).expand_as(x) if over_channels else x.exp()
    outs = outs_aligned(x.shape[2:], kernel_size, stride)
    values = []
    for _, taps in windows(x.shape[2:], kernel_size, stride, outs, [0] * len(outs)):
        where = (slice(None), slice(None), *torch.tensor(taps).T)
        values.append((weights[where] * x[where]).sum(-1) / weights[where].sum(-1))
    y = torch.stack(values, -1).unflatten(-1, outs)
    y = y.clamp(0, math.inf) if clamped else y
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


THEIRS = {
    "aligned": lambda *args: their_kernel(*args, shifted=False),
    "shifted": lambda *args: their_kernel(*args, shifted=True),
    "per_channel": lambda *args: their_fallback(*args, over_channels=False),
    "channel_sum": lambda *args: their_fallback(*args, over_channels=True),
    "channel_sum_clamped": lambda *args: their_fallback(*args, over_channels=True, clamped=True),
}
per_variant = pytest.mark.parametrize("variant", compat.VARIANTS)
per_axes = pytest.mark.parametrize("axes", (1, 2, 3))


@pytest.fixture
def uninstalled():
    """No module of the authors' names before and after the test."""

    def remove():
        for name in NAMES:
            sys.modules.pop(name, None)

    remove()
    yield remove
    remove()


@per_axes
@per_variant
@pytest.mark.parametrize("kernel_size, stride", GEOMETRIES)
def test_values_and_gradient_are_theirs(axes, variant, kernel_size, stride):
    kernel_size, stride = per_axis(axes, kernel_size, stride)
    x = 2 * randn(1, 2, *SIZES[axes]).double()
    x.requires_grad_()
    y = FUNCTIONS[axes](x, kernel_size, stride, variant=variant)
    grad = randn(*y.shape, seed=1).double()
    y.backward(grad)
    theirs, their_grad = THEIRS[variant](x.detach(), kernel_size, stride, grad)
    torch.testing.assert_close(y.detach(), theirs)
    torch.testing.assert_close(x.grad, their_grad)


def test_values_are_those_that_were_published():
    # https://github.com/alexandrosstergiou/SoftPool/issues/35, of 2021-04-19
    x = torch.arange(1.0, 10).view(1, 1, 3, 3)
    cpu = [[4.5888, 5.5888], [7.5888, 8.5888]]
    gpu = [[1.0000, 1.7311, 2.7311], [3.8577, 4.5888, 5.5888], [6.8577, 7.5888, 8.5888]]
    for variant, values in [("channel_sum", cpu), ("channel_sum_clamped", cpu), ("shifted", gpu)]:
        y = compat.soft_pool2d(x, kernel_size=2, stride=1, variant=variant)
        torch.testing.assert_close(y, torch.tensor([[values]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", [f"soft_pool{axes}d" for axes in (1, 2, 3)])
def test_signature_is_theirs_and_a_keyword(name):
    arguments = inspect.signature(getattr(compat, name)).parameters.values()
    assert [(a.name, a.default) for a in arguments][1:] == [
        ("kernel_size", 2),
        ("stride", None),
        ("force_inplace", False),
        ("variant", "aligned"),
    ]
    module = getattr(compat, name.replace("soft_pool", "SoftPool"))
    assert list(arguments)[1:] == list(inspect.signature(module).parameters.values())


@per_axes
@per_variant
def test_module_computes_what_the_function_does(axes, variant):
    x = randn(1, 2, *SIZES[axes])
    module = getattr(compat, f"SoftPool{axes}d")(3, 1, variant=variant)
    assert module(x).equal(FUNCTIONS[axes](x, 3, 1, variant=variant))
    assert not module.state_dict()


@per_axes
@per_variant
def test_unbatched_input_stays_as_it_is(axes, variant):
    x = randn(3, *SIZES[axes])
    before = x.clone()
    y = FUNCTIONS[axes](x, variant=variant)
    assert x.shape == before.shape and x.equal(before)
    assert y.equal(FUNCTIONS[axes](x[None], variant=variant)[0])


@per_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [2000.0, -2000.0])
def test_large_inputs_stay_finite(variant, dtype, value):
    expected = 0.0 if variant == "channel_sum_clamped" and value < 0 else value
    x = torch.full((1, 2, 4, 4), value, dtype=dtype, requires_grad=True)
    y = compat.soft_pool2d(x, variant=variant)
    y.sum().backward()
    assert y.dtype == dtype and (y == expected).all()
    assert x.grad.isfinite().all()
    theirs, _ = THEIRS[variant](x.detach().double(), (2, 2), (2, 2), torch.ones(1, 2, 2, 2))
    assert not (theirs == expected).all()  # NaN, infinite, 0, or 2 or 4 * 2000


def test_weights_of_large_inputs_add_up_to_one():
    x = torch.full((1, 1, 4, 4), 100.0)
    theirs, _ = their_kernel(x.double(), (2, 2), (2, 2), torch.ones(1, 1, 2, 2), shifted=True)
    # Every exponential and their sum are clamped to the same number: each tap weighs 1.
    assert theirs.tolist() == [[[[100, 200], [200, 400]]]]
    assert (compat.soft_pool2d(x, variant="shifted") == 100).all()


@per_variant
def test_nan_stays_visible(variant):
    x = randn(1, 2, 4, 4)
    x[0, 0, 1, 1] = math.nan
    assert compat.soft_pool2d(x, variant=variant).isnan().any()  # theirs on a GPU gave 0


@pytest.mark.parametrize("variant", compat.VARIANTS)
def test_force_inplace_is_what_they_ran_without_the_kernel(variant):
    x = randn(1, 3, 6, 6)
    expected = "channel_sum_clamped" if variant in ("aligned", "shifted") else variant
    y = compat.soft_pool2d(x, force_inplace=True, variant=variant)
    assert y.equal(compat.soft_pool2d(x, variant=expected))
    assert compat.SoftPool2d(2, None, True, variant=variant)(x).equal(y)


def test_shifted_windows_are_those_of_a_converted_checkpoint():
    convert = pytest.importorskip("mmsoftpool.convert")
    assert set(convert.WINDOWS) == set(compat.VARIANTS[:2])
    x = randn(2, 3, 8, 12)
    for variant, pool in convert.WINDOWS.items():
        kind, arguments = pool["type"], {k: v for k, v in pool.items() if k != "type"}
        ours = getattr(mmsoftpool, kind)(**arguments)(x)
        assert compat.soft_pool2d(x, variant=variant).equal(ours)


@since(2, 5)  # older ones do not trace zip(strict=True)
@per_variant
def test_compiles_without_a_graph_break(variant):
    x = randn(1, 2, 7, 8)
    pool = compat.SoftPool2d(3, 2, variant=variant)
    compiled = torch.compile(pool, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), pool(x))


@per_variant
@pytest.mark.parametrize(
    "error, arguments",
    [
        (TypeError, dict(kernel_size="2")),
        (ValueError, dict(kernel_size=0)),
        (ValueError, dict(kernel_size=(2, 2, 2))),
        (TypeError, dict(stride=1.5)),
        (ValueError, dict(stride=0)),
    ],
)
def test_bad_geometry_is_named(variant, error, arguments):
    (name,) = arguments
    with pytest.raises(error, match=f"{name} must be"):
        compat.soft_pool2d(randn(1, 2, 6, 6), variant=variant, **arguments)
    with pytest.raises(error, match=f"{name} must be"):
        compat.SoftPool2d(variant=variant, **arguments)


@per_variant
@pytest.mark.parametrize(
    "error, x, message",
    [
        (TypeError, [[1.0]], "Tensor, got list"),
        (TypeError, torch.ones(1, 2, 4, 4, dtype=torch.int64), "dtypes .* got torch.int64"),
        (ValueError, torch.ones(4, 4), "shape .* got"),
        (ValueError, torch.ones(1, 2, 1, 1), "too small"),
    ],
)
def test_bad_input_is_named(variant, error, x, message):
    with pytest.raises(error, match=message):
        compat.soft_pool2d(x, variant=variant)


def test_unknown_variant_is_named_with_those_there_are(uninstalled):
    for call in (compat.SoftPool2d, compat.install, lambda **kw: compat.soft_pool2d(None, **kw)):
        with pytest.raises(ValueError, match=r"one of aligned, shifted, .* got 'new'"):
            call(variant="new")
    assert "SoftPool" not in sys.modules


def test_repr_shows_the_variant():
    assert repr(compat.SoftPool2d((2, 2), (2, 2), variant="shifted")) == (
        "SoftPool2d(kernel_size=(2, 2), stride=(2, 2), force_inplace=False, variant='shifted')"
    )


def test_replace_pooling_takes_and_leaves_them():
    net = nn.Sequential(nn.MaxPool2d(2), nn.AvgPool1d(3, 2))
    replace_pooling(net, dict(type=compat.SoftPool2d, variant="shifted"))
    assert repr(net[0]) == repr(compat.SoftPool2d(2, 2, variant="shifted"))
    assert repr(net[1]) == repr(compat.SoftPool1d((3,), (2,), variant="shifted"))
    with pytest.raises(ValueError, match="has no pools"):  # no geometry has the same windows
        replace_pooling(net)
    with pytest.raises(ValueError, match="no argument padding"):
        replace_pooling(nn.Sequential(nn.MaxPool2d(3, 2, 1)), compat.SoftPool2d)


def test_their_imports_work_with_torch_alone(run_script):
    script = """
import sys; sys.modules["mmengine"] = None
import mmsoftpool.compat as c; c.install()
import softpool_cuda; from SoftPool import soft_pool2d, SoftPool2d
import importlib.util, SoftPool.idea, torch
assert importlib.util.find_spec("softpool_cuda") and importlib.util.find_spec("SoftPool")
x = torch.rand(1, 2, 4, 4)
assert soft_pool2d(x).equal(SoftPool2d()(x)) and SoftPool.idea.soft_pool2d is soft_pool2d
"""
    run_script("-c", script)


def test_install_sets_the_default_variant(uninstalled):
    compat.install("shifted")
    import SoftPool

    x = randn(1, 2, 6, 6)
    expected = compat.soft_pool2d(x, variant="shifted")
    assert SoftPool.soft_pool2d(x).equal(expected)
    assert SoftPool.SoftPool2d()(x).equal(expected)
    assert SoftPool.SoftPool2d(variant="aligned")(x).equal(compat.soft_pool2d(x))
    assert compat.SoftPool2d().variant == "aligned"


def test_install_again_changes_nothing(uninstalled):
    compat.install()
    modules = [sys.modules[name] for name in NAMES]
    pool = modules[0].SoftPool2d
    compat.install()
    assert [sys.modules[name] for name in NAMES] == modules and modules[0].SoftPool2d is pool


def test_install_refuses_another_variant(uninstalled):
    compat.install()
    with pytest.raises(RuntimeError, match="already installed with variant='aligned'"):
        compat.install("shifted")


@pytest.mark.parametrize("name", NAMES)
def test_install_refuses_where_another_package_is_imported(uninstalled, name):
    sys.modules[name] = ModuleType(name)
    with pytest.raises(RuntimeError, match=f"{name} is already imported from"):
        compat.install()
    assert [n for n in NAMES if n in sys.modules] == [name]


def test_model_saved_whole_with_their_classes_loads(uninstalled, tmp_path):
    class SoftPool2d(nn.Module):  # their attributes, as pickle stores them
        __module__, __qualname__ = "SoftPool.idea", "SoftPool2d"

        def __init__(self):
            super().__init__()
            self.kernel_size, self.stride, self.force_inplace = (3, 3), None, False

    sys.modules["SoftPool"] = ModuleType("SoftPool")
    sys.modules["SoftPool.idea"] = ModuleType("SoftPool.idea")
    sys.modules["SoftPool.idea"].SoftPool2d = SoftPool2d
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), SoftPool2d()), tmp_path / "whole.pth")
    uninstalled()

    compat.install("shifted")
    net = torch.load(tmp_path / "whole.pth", weights_only=False)
    assert isinstance(net[1], compat.SoftPool2d)
    assert (net[1].kernel_size, net[1].variant) == ((3, 3), "shifted")
    assert net(randn(1, 3, 9, 9)).shape == (1, 4, 3, 3)


def test_model_saved_whole_with_ours_loads_after_install(uninstalled):
    compat.install("channel_sum")
    saved = pickle.dumps(sys.modules["SoftPool"].SoftPool2d(3))
    uninstalled()
    compat.install()
    assert pickle.loads(saved).variant == "channel_sum"  # what it has had


def test_state_dict_has_no_key_of_a_pool():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), compat.SoftPool2d())
    net.load_state_dict(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)).state_dict())


@per_axes
@pytest.mark.parametrize("variant", ["aligned", "shifted"])
def test_extension_computes_into_tensors_that_are_given(uninstalled, axes, variant):
    compat.install(variant)
    import softpool_cuda

    x = randn(1, 2, *SIZES[axes]).requires_grad_()
    y = FUNCTIONS[axes](x, 3, 2, variant=variant)
    y.sum().backward()
    kernel, stride = (3,) * axes, (2,) * axes

    output, grad = torch.zeros_like(y), torch.ones_like(x)
    getattr(softpool_cuda, f"forward_{axes}d")(x, kernel, stride, output)
    with torch.no_grad():  # as inside of an autograd.Function
        getattr(softpool_cuda, f"backward_{axes}d")(torch.ones_like(y), x, kernel, stride, grad)
    assert output.equal(y)
    torch.testing.assert_close(grad, 1 + x.grad)


def test_extension_names_the_variant_that_a_shape_is_from(uninstalled):
    compat.install()
    import softpool_cuda

    with pytest.raises(ValueError, match=r"output must have the shape \(1, 2, 3, 3\) .*'shifted'"):
        softpool_cuda.forward_2d(randn(1, 2, 8, 8), (3, 3), (2, 2), torch.zeros(1, 2, 4, 4))
