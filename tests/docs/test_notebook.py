"""The notebook of examples/ runs from top to bottom, and is committed with small outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent.parent / "examples" / "digits.ipynb"


def test_the_notebook_is_committed_with_its_outputs():
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell["outputs"]) == 3


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert "target 0.5" in text and "the same answer for 360 of 360 images" in text
