"""Run a notebook from its first cell to its last one and keep the outputs in it.

    python scripts/run_notebook.py docs/tour.ipynb

The notebook runs in an empty folder, so that it cannot lean on the files of a checkout. Bars and
other texts on stderr are dropped.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

TIMEOUT = 600
"""Maximum seconds for one cell."""


def execute(notebook: NotebookNode, kernel: str = "python3") -> None:
    """Run all cells in an empty folder and store their outputs in `notebook`.

    Raises:
        CellExecutionError: a cell raised an exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name=kernel, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # times of day
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    notebook = nbformat.read(path, as_version=4)
    execute(notebook)
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
