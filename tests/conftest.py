import importlib.util
import runpy
import sys

import pytest

from mmsoftpool import cli

from .common import SCRIPTS, SHARED, execute


@pytest.fixture(scope="session", autouse=True)
def configs_as_they_are():
    """mmengine lays out a config with yapf each time that it saves, logs or compares it, which
    takes longer than a training of some iterations."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("yapf") is not None:
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda code, **style: (code, True))
        yield


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
    return execute


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
