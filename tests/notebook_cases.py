"""The notebooks of colab/, executed with fewer steps than a reader has."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

COLAB = Path(__file__).parent.parent / "colab"
NAMES = sorted(file.stem for file in COLAB.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def executed(name: str, folder: Path, replaced: dict[str, str]) -> str:
    """Executes a notebook in a folder, and returns what its cells print.

    `replaced` are texts in its cells, which must be there, and what stands in their place.
    """
    notebook = read(name)
    whole = "".join(cell.source for cell in notebook.cells)
    for old, new in replaced.items():
        assert old in whole, old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)
