"""The one place that turns errors into one line: cli.run."""

import argparse
from pathlib import Path

import pytest
import torch

from mmsoftpool import cli, soft_pool2d
from mmsoftpool.config import load_config
from mmsoftpool.errors import UserError

from .common import config_path


def run(main, capsys):
    """Runs a command that ends with an error; returns the exit status and stderr."""
    with pytest.raises(SystemExit) as info:
        cli.run(main, argparse.Namespace())
    return info.value.code, capsys.readouterr().err


def test_an_error_of_the_user_is_one_line(capsys):
    def main(args):
        raise UserError("scale must be positive, got 0")

    assert run(main, capsys) == (2, "error: scale must be positive, got 0\n")


def test_an_error_of_the_system_is_one_line(capsys):
    code, err = run(lambda args: Path("/missing/file").read_text(), capsys)
    assert (code, err) == (2, "error: [Errno 2] No such file or directory: '/missing/file'\n")


def test_a_message_of_several_lines_is_folded(capsys):
    def main(args):
        raise UserError("two\n  lines")

    assert run(main, capsys) == (2, "error: two lines\n")


def test_an_error_without_a_message_has_its_name(capsys):
    def main(args):
        raise TimeoutError

    assert run(main, capsys) == (2, "error: TimeoutError\n")


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


def test_an_interruption_has_the_shells_exit_status(capsys):
    def main(args):
        raise KeyboardInterrupt

    assert run(main, capsys) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("bug", "error"),
    [
        (lambda args: soft_pool2d(torch.ones(1, 4, 4), kernel_size=0), ValueError),
        (lambda args: torch.optim.SGD([torch.zeros(1)], lr=-1), ValueError),  # raised in torch
        (lambda args: torch.zeros(-1), RuntimeError),
        (lambda args: int("x"), ValueError),  # a function in C has no frame of its own
        (lambda args: load_config(config_path("retinanet_r50_softpool"), 5), TypeError),  # dict(5)
    ],
)
def test_a_bug_keeps_its_traceback(bug, error):
    with pytest.raises(error):
        cli.run(bug, argparse.Namespace())
