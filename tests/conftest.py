import os
import runpy
import subprocess
import sys

import pytest

from mmsoftpool import cli

from .common import ROOT, SCRIPTS, SHARED


@pytest.fixture(scope="session")
def coco_root():
    """A small cut of COCO 2017 in the standard layout."""
    root = SHARED / "data" / "coco"
    if not (root / "annotations" / "instances_train2017.json").exists():
        pytest.skip(f"no COCO photos at {root}")
    return root


@pytest.fixture
def run_script():
    """Runs a Python script of the project as a user would; returns the finished process."""

    def run(*args, cwd=ROOT, check=True, **env):
        result = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        if check and result.returncode != 0:
            pytest.fail(f"{args} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
        return result

    return run


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs a command or script in this process; returns its status, stdout and stderr."""

    def run(tool, *args):
        status = 0
        try:
            if tool in cli.COMMANDS:
                cli.main([tool, *map(str, args)])
            else:
                (path,) = (str(path) for path in SCRIPTS if path.stem == tool)
                monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
                runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())

    return run
