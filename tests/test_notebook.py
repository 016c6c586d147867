"""docs/tour.ipynb runs as it is, and the outputs in it are those of such a run."""

import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "tour.ipynb"


def read() -> Any:
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_it_runs_without_network_and_without_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """It checks by itself that all ways of loading give the same logits."""
    monkeypatch.syspath_prepend(ROOT)
    from scripts.run_notebook import execute

    notebook = read()
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    execute(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for cell in cells for out in cell.outputs for kind in out.get("data", {})}
    assert "image/png" in kinds


def test_the_stored_outputs_are_of_one_whole_run() -> None:
    cells = code_cells(read())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


def test_the_stored_outputs_name_no_place_of_the_machine_that_ran_it() -> None:
    text = PATH.read_text(encoding="utf-8")
    for place in ("/home/", "/root/", "/tmp/", "/usr/", sys.prefix, str(ROOT)):
        assert place not in text
