"""The one place that turns errors into one line: cli.run, beside the tools."""

import argparse
from pathlib import Path

import cli
import pytest
import torch

from mmsoftpool import soft_pool2d
from mmsoftpool.config import load_config

from .common import config_path


def run(main, capsys):
    """Runs a tool's main that ends with an error; returns the exit status and stderr."""
    with pytest.raises(SystemExit) as info:
        cli.run(main, argparse.ArgumentParser())
    return info.value.code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool.py"])


def test_an_error_of_the_package_is_one_line(capsys):
    code, err = run(lambda args: soft_pool2d(torch.ones(1, 4, 4), kernel_size=0), capsys)
    assert code == 2
    assert err.startswith("error: kernel_size must be") and err.count("\n") == 1


def test_an_error_of_the_tool_is_one_line(capsys):
    def main(args):
        raise ValueError("scale must be positive, got 0")

    assert run(main, capsys) == (2, "error: scale must be positive, got 0\n")


def test_an_error_of_the_system_is_one_line(capsys):
    code, err = run(lambda args: Path("/missing/file").read_text(), capsys)
    assert (code, err) == (2, "error: [Errno 2] No such file or directory: '/missing/file'\n")


def test_a_message_of_several_lines_is_folded(capsys):
    def main(args):
        raise ValueError("two\n  lines")

    assert run(main, capsys) == (2, "error: two lines\n")


def test_an_error_without_a_message_has_its_name(capsys):
    def main(args):
        raise TimeoutError

    assert run(main, capsys) == (2, "error: TimeoutError\n")


def test_an_interruption_has_the_shells_exit_status(capsys):
    def main(args):
        raise KeyboardInterrupt

    assert run(main, capsys) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("bug", "error"),
    [
        (lambda args: torch.optim.SGD([torch.zeros(1)], lr=-1), ValueError),  # raised in torch
        (lambda args: torch.zeros(-1), RuntimeError),
        (lambda args: int("x"), ValueError),  # a function in C has no frame of its own
        (lambda args: load_config(config_path("retinanet_r50_softpool"), 5), TypeError),  # dict(5)
    ],
)
def test_a_bug_keeps_its_traceback(bug, error):
    with pytest.raises(error):
        cli.run(bug, argparse.ArgumentParser())
