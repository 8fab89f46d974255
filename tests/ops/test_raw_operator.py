"""The operators called without the checks of the Python functions: no argument reaches memory
outside of the tensors."""

import pytest
import torch

import mmsoftpool  # noqa: F401 (registers the operators)

from ..common import since

X = torch.zeros(1, 1, 4, 4)
HUGE = 2**61


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"),
    [
        (9, 1, 0, HUGE),  # (kernel_size - 1) * dilation is 2^64
        (2, 1, 0, 2**63 - 1),
        (HUGE, 1, HUGE // 2, 8),
        (2**31, 1, 2**30, 1),
        (2, 2**63 - 1, 1, 1),
    ],
)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_arguments_that_overflow_are_refused(kernel_size, stride, padding, dilation, ceil_mode):
    lists = ([kernel_size] * 2, [stride] * 2, [padding] * 4, [dilation] * 2)
    with pytest.raises(RuntimeError, match="soft_pool: invalid pooling of axis 0"):
        torch.ops.mmsoftpool.soft_pool(X, *lists, ceil_mode, 1.0, "exact")
    with pytest.raises(RuntimeError, match="soft_pool: invalid pooling of axis 0"):
        torch.ops.mmsoftpool.soft_pool_backward(X, X, *lists, ceil_mode, 1.0, "exact")


def test_a_kernel_of_2_31_taps_is_cut_to_the_map():
    x = torch.randn(1, 1, 4, 4, 4)
    pool = torch.ops.mmsoftpool.soft_pool
    huge, covering = (
        pool(x, [size] * 3, [1] * 3, [size // 2] * 6, [1] * 3, False, 1.0, "exact")
        for size in (2**31 - 1, 7)
    )
    assert huge.equal(covering)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_alpha_must_be_finite_and_not_negative(alpha):
    with pytest.raises(RuntimeError, match="alpha must be a finite number >= 0"):
        torch.ops.mmsoftpool.soft_pool(X, [2, 2], [2, 2], [0] * 4, [1, 1], False, alpha, "exact")


def test_gradient_must_be_exact_or_paper():
    with pytest.raises(RuntimeError, match="gradient must be 'exact' or 'paper', got 'none'"):
        torch.ops.mmsoftpool.soft_pool(X, [2, 2], [2, 2], [0] * 4, [1, 1], False, 1.0, "none")


@pytest.mark.parametrize(
    ("grad_output", "name"),
    [
        (torch.zeros(1, 1, 2, 2, device="meta"), "device"),
        (torch.zeros(1, 1, 2, 2, device="meta", dtype=torch.float64), "device"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.float64), "dtype"),
    ],
)
def test_the_gradient_of_the_output_must_be_like_the_input(grad_output, name):
    lists = ([2, 2], [2, 2], [0] * 4, [1, 1])
    with pytest.raises((RuntimeError, ValueError), match=f"grad_output must .*{name} of input"):
        torch.ops.mmsoftpool.soft_pool_backward(grad_output, X, *lists, False, 1.0, "exact")


@since(2, 13)  # the stable ABI of older ones does not pass the text on
def test_memory_that_runs_out_is_named_as_torch_names_it():
    x = X[:, :, :1, :1].expand(2**22, 1, 2**10, 2**10)  # 16 TB if it were contiguous
    lists = ([2, 2], [2, 2], [0] * 4, [1, 1])
    with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate"):
        torch.ops.mmsoftpool.soft_pool(x, *lists, False, 1.0, "exact")
