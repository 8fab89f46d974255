"""The picture of one window under several pools."""

import math

import pytest
import torch

import draw_window


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0, math.inf])
def test_the_numbers_are_those_of_the_pool(alpha):
    weights, gradient, output = draw_window.pool(draw_window.WINDOW, alpha)
    assert (weights * draw_window.WINDOW).sum().item() == pytest.approx(output)
    assert weights.sum().item() == pytest.approx(1)
    assert gradient.sum().item() == pytest.approx(1)  # adding 1 to the window adds 1 to the output
    if not math.isinf(alpha):
        expected = weights * (1 + alpha * (draw_window.WINDOW - output))
        torch.testing.assert_close(gradient, expected)


def test_the_picture_is_drawn(run_tool, tmp_path):
    status, _, _ = run_tool("draw_window", "--out", tmp_path / "window.png")
    assert status == 0 and (tmp_path / "window.png").stat().st_size > 10_000
