"""Gradients of every order and mode, and torch.func."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from mmsoftpool import soft_pool2d
from mmsoftpool.ops.pooling import Pooling

from ..common import ROOT, randn, since
from . import definition

# torch warns that the reference takes the compiled kernel's place; see the fixture `backend`.
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

X = torch.zeros(1, 1, 8, 8)


class TestGradient:
    @pytest.mark.parametrize("gradient", ["exact", "paper"])
    @pytest.mark.parametrize("pooling", definition.POOLINGS)
    def test_is_the_definition(self, backend, pooling, gradient):
        x = randn(2, 2, 7, 9, seed=9).requires_grad_()
        y = soft_pool2d(x, *pooling, gradient=gradient)
        g = randn(*y.shape, seed=10)
        (grad,) = torch.autograd.grad(y, x, g)
        _, truth = definition.soft_pool2d(x, pooling, g, gradient)
        torch.testing.assert_close(grad.double(), truth, rtol=0, atol=3e-6)

    @pytest.mark.parametrize("pooling", definition.POOLINGS)
    def test_gradcheck_and_gradgradcheck(self, backend, pooling):
        x = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: soft_pool2d(x, *pooling), x)
        assert gradgradcheck(lambda x: soft_pool2d(x, *pooling), x)

    @pytest.mark.parametrize("alpha", definition.ALPHAS)
    def test_gradcheck_and_gradgradcheck_over_alpha(self, backend, alpha):
        x = randn(1, 2, 6, 7).double().requires_grad_()
        assert gradcheck(lambda x: soft_pool2d(x, 3, 2, 1, alpha=alpha), x)
        assert gradgradcheck(lambda x: soft_pool2d(x, 3, 2, 1, alpha=alpha), x)

    @pytest.mark.parametrize("gradient", ["exact", "paper"])
    @pytest.mark.parametrize("alpha", definition.ALPHAS)
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_over_alpha_is_the_definition(self, backend, format, alpha, gradient):
        x = randn(2, 5, 7, 9, seed=9).contiguous(memory_format=format).requires_grad_()
        for pooling in definition.POOLINGS[:4]:
            y = soft_pool2d(x, *pooling, alpha=alpha, gradient=gradient)
            g = randn(*y.shape, seed=10)
            (grad,) = torch.autograd.grad(y, x, g)
            _, truth = definition.soft_pool2d(x, pooling, g, gradient, alpha)
            # 1 + alpha (x - y) magnifies the rounding of x - y.
            atol = 3e-6 * max(1, alpha)
            torch.testing.assert_close(grad.double(), truth, rtol=0, atol=atol)

    def test_the_papers_gradient_has_a_derivative_too(self, backend):
        arguments = Pooling.check(2, 3, 2, 1, gradient="paper")
        x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
        g = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        backward = torch.ops.mmsoftpool.soft_pool_backward
        assert gradcheck(lambda g, x: backward(g, x, *arguments), (g, x))

    def test_the_exact_gradient_of_shifting_a_window_is_one(self, backend):
        # y(x + c) = y(x) + c, so the gradients of a window add up to 1.
        x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(soft_pool2d(x, 2).sum(), x)
        torch.testing.assert_close(F.avg_pool2d(grad, 2) * 4, torch.ones_like(grad[..., :4, :4]))

    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    def test_does_not_depend_on_the_number_of_threads(self, format):
        x = torch.randn(1, 80, 17, 23).to(memory_format=format).requires_grad_()
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                y = soft_pool2d(x, 3, 2, 1)
                results.append((y, *torch.autograd.grad(y.sum(), x)))
        finally:
            torch.set_num_threads(threads)
        for y, grad in results[1:]:
            assert y.equal(results[0][0]) and grad.equal(results[0][1])

    def test_only_the_input_is_saved(self):
        saved = []
        x = torch.randn(1, 2, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            soft_pool2d(x, 3, 2, 1)
        assert [t.data_ptr() for t in saved] == [x.data_ptr()]


class TestTorchFunc:
    def test_vmap(self):
        x = torch.randn(2, 3, 4, 9, 8)
        for dim in (0, 2):
            y = torch.func.vmap(lambda t: soft_pool2d(t, 3, 2, 1), in_dims=dim)(x)
            assert y.equal(torch.stack([soft_pool2d(t, 3, 2, 1) for t in x.unbind(dim)]))
        arguments = Pooling.check(2, 3, 2, 1)
        backward = torch.ops.mmsoftpool.soft_pool_backward
        g, t = torch.randn(5, 3, 4, 5, 4), x[0]
        grads = torch.func.vmap(lambda g: backward(g, t.movedim(0, 1), *arguments))(g.movedim(1, 2))
        expected = torch.stack([backward(g.movedim(0, 1), t.movedim(0, 1), *arguments) for g in g])
        assert grads.equal(expected)

    def test_torch_func(self):
        pool = functools.partial(soft_pool2d, kernel_size=3, stride=2, padding=1)
        x = torch.randn(4, 2, 3, 7, 8, dtype=torch.float64, requires_grad=True)

        def loss(x):
            return pool(x).sin().sum()

        slopes, curves = [], []
        for image in x:
            (slope,) = torch.autograd.grad(loss(image), image, create_graph=True)
            slopes.append(slope)
            curves += torch.autograd.grad(slope.pow(2).sum(), image)
        slopes, curves = torch.stack(slopes).detach(), torch.stack(curves)
        grad, vmap = torch.func.grad, torch.func.vmap
        close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        close(vmap(grad(loss))(x.detach()), slopes)
        close(grad(lambda x: vmap(pool)(x).sin().sum())(x.detach()), slopes)
        close(torch.autograd.grad(vmap(pool)(x).sin().sum(), x)[0], slopes)
        close(grad(lambda x: grad(loss)(x).pow(2).sum())(x[0].detach()), curves[0])
        image = x[0, :1, :1, :3, :4].detach()
        close(torch.func.jacrev(pool)(image), torch.autograd.functional.jacobian(pool, image))

    @since(2, 5)
    def test_vmap_over_an_empty_batch(self):
        x = torch.zeros(0, 2, 3, 4, 6)
        assert torch.func.vmap(lambda t: soft_pool2d(t, 2))(x).shape == (0, 2, 3, 2, 3)


@pytest.mark.parametrize("alpha", [0.5, 4.0])
@pytest.mark.parametrize("gradient", ["exact", "paper"])
class TestForwardMode:
    """Forward mode alone, over and under reverse mode and itself, is what reverse mode gives."""

    @pytest.fixture
    def loss(self, backend, gradient, alpha):
        return lambda x: soft_pool2d(x, 3, 2, 1, alpha=alpha, gradient=gradient).sin().sum()

    @pytest.fixture
    def x(self):
        return randn(1, 2, 4, 5).double()

    def test_jvp_is_the_product_with_the_gradient(self, loss, x):
        tangent = randn(1, 2, 4, 5, seed=1).double()
        slope = torch.func.grad(loss)(x)
        _, change = torch.func.jvp(loss, (x,), (tangent,))
        torch.testing.assert_close(change, (slope * tangent).sum())
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            change = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
        torch.testing.assert_close(change, (slope * tangent).sum())

    def test_every_hessian_is_the_same(self, loss, x):
        func, functional = torch.func, torch.autograd.functional
        truth = functional.hessian(loss, x)
        torch.testing.assert_close(functional.hessian(loss, x, vectorize=True), truth)
        torch.testing.assert_close(func.jacrev(func.jacrev(loss))(x), truth)
        torch.testing.assert_close(func.hessian(loss)(x), truth)


def test_forward_over_forward_is_the_hessian(backend):
    def loss(x):
        return soft_pool2d(x, 3, 2, 1, alpha=2.0).sin().sum()

    x = randn(1, 2, 4, 5).double()
    truth = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(loss))(x), truth)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(loss))(x), truth)


def test_gradcheck_in_every_mode(backend):
    x = randn(1, 2, 5, 6).double().requires_grad_()

    def pool(x):
        return soft_pool2d(x, 3, 2, 1, alpha=2.0)

    assert gradcheck(pool, x, check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(pool, x, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(pool, x, check_fwd_over_rev=True, check_batched_grad=True)


@since(2, 4)
def test_without_torchs_private_names_there_still_is_a_gradient(run_script, tmp_path):
    script = tmp_path / "fallback.py"
    script.write_text(FALLBACK)
    run_script(script, PYTHONPATH=str(ROOT))


FALLBACK = """
import torch

del torch._functorch.autograd_function.enable_single_level_autograd_function

from mmsoftpool import adaptive_soft_pool2d, environment, soft_pool2d
from mmsoftpool.ops import autograd

assert "enable_single_level_autograd_function" in autograd.MISSING
(problem,) = environment.check_derivatives(autograd.MISSING)
assert "forward-mode" in problem.what and autograd.MISSING in problem.what
x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
for pool in (lambda x: soft_pool2d(x, 3, 2, 1), lambda x: adaptive_soft_pool2d(x, (2, 4))):
    assert torch.autograd.gradcheck(pool, x) and torch.autograd.gradgradcheck(pool, x)
    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    assert grad.equal(torch.autograd.grad(pool(x).sum(), x)[0])
"""
