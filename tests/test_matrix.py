"""The matrix of versions, with stand-ins for uv and for the tests."""

import json

import pytest

from .common import ROOT, load_tool

NO_WHEEL = """error: No solution found when resolving dependencies
  cause: Because all versions of onedl-mmcv have no usable wheels
         and you require onedl-mmcv, we can conclude that your requirements are unsatisfiable.
"""


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """The script with two rows; ``uv`` finds whatever is not called onedl."""
    script = load_tool(ROOT / "scripts" / "matrix.py")

    def uv(runner, *arguments):
        if "list" in arguments:
            return 0, json.dumps([{"name": "torch", "version": "2.4.1"}])
        wanted = arguments.count("onedl-mmcv") > 1  # once it names what must not be compiled
        return (1, NO_WHEEL) if wanted else (0, "")

    monkeypatch.setattr(script, "FOLDER", tmp_path)
    monkeypatch.setattr(
        script,
        "ROWS",
        [
            script.Row("plain", "3.12", ("torch==2.4.*", "numpy<2")),
            script.Row("onedl", "3.13", ("torch", "onedl-mmcv")),
        ],
    )
    monkeypatch.setattr(script.Runner, "uv", uv)
    monkeypatch.setattr(script.Runner, "build", lambda runner: None)
    monkeypatch.setattr(script.Runner, "call", lambda *_: (0, "Python 3.12.1\n"))
    monkeypatch.setattr(script.Runner, "test_operator", lambda runner: "7 passed")
    # main changes the environment for its child processes.
    monkeypatch.setattr(script.os, "environ", {})
    return script


def run(script, *names):
    with pytest.raises(SystemExit) as end:
        script.main(list(names))
    return end.value.code


def test_the_table_has_results_and_the_reasons_of_what_was_skipped(matrix, tmp_path):
    assert run(matrix) == 0
    table = (tmp_path / "table.md").read_text()
    assert "| 2.4.1 | 3.12.1 | <2 |  | 7 passed |  |" in table
    reason = "skipped: all versions of onedl-mmcv have no usable wheels"
    assert f"| newest | 3.13 |  | onedl-mmcv newest | {reason} |  |" in table


def test_a_row_that_passed_is_kept_and_one_that_failed_runs_again(matrix, tmp_path, monkeypatch):
    def fail(runner):
        raise matrix.Failure("1 failed: test_value")

    monkeypatch.setattr(matrix.Runner, "test_operator", fail)
    assert run(matrix, "plain") == 1
    assert "fails: 1 failed: test_value" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(matrix.Runner, "test_operator", lambda runner: "7 passed")
    assert run(matrix, "plain") == 0
    monkeypatch.setattr(matrix.Runner, "test_operator", fail)
    assert run(matrix, "plain") == 0


def test_an_unknown_row_is_named(matrix):
    assert "unknown rows ['torch9']" in run(matrix, "torch9")
