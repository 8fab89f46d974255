"""The notebook docs/tutorial.ipynb: it runs, and its outputs are those of a full run."""

import nbformat
import pytest
from nbclient import NotebookClient

from .common import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def pictures(notebook):
    return [
        output.data["image/jpeg"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/jpeg" in output.get("data", {})
    ]


def test_it_runs(notebook, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    for folder in ("configs", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("TUTORIAL_EPOCHS", "1")
    monkeypatch.setenv("TUTORIAL_IMAGES", "16")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    committed = len(pictures(notebook))
    client = NotebookClient(notebook, resources=dict(metadata=dict(path=str(tmp_path))))
    client.execute()  # raises what a cell raises
    assert len(pictures(notebook)) == committed
    assert (tmp_path / "work_dirs" / "tutorial" / "epoch_1.pth").exists()


def test_the_committed_outputs_are_those_of_one_run_and_small(notebook):
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert NOTEBOOK.stat().st_size < 500_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert str(ROOT.parent) not in NOTEBOOK.read_text()
