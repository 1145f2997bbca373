"""The notebook of examples/ runs from its first cell to its last, as a kernel runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_no_output_is_in_the_repository() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_it_trains_draws_the_map_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="no ipykernel here: the notebook is not run (pip install 'bd3_scale[test]')")
    client = pytest.importorskip("nbclient", reason="no nbclient here: the notebook is not run (pip install 'bd3_scale[test]')")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=":")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in shown)
    assert "step  80: NELBO" in said and "nats for words" in said and "'Return " in said
    assert any("image/png" in output.get("data", {}) for output in shown), "the tuner's map"
    page = (tmp_path / "runs" / "notebook" / "report" / "index.html").read_text("utf-8")
    assert "Samples of step 80" in page and "Where the time went" in page and "tuner.png" in page
