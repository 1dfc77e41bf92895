"""The notebooks are in order, and those that take little time run on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
from notebook_cases import COLAB, NAMES, executed, read

ROOT = COLAB.parent


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_and_installs_the_library(name: str) -> None:
    notebook = read(name)
    badge = f"colab.research.google.com/github/lorax-ft/lorax_ft/blob/main/colab/{name}.ipynb"
    assert badge in notebook.cells[0].source
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "%pip install" in first.source
    assert not any(cell.get("outputs") for cell in notebook.cells), "strip the outputs"
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert f"colab/{name}.ipynb" in page.read_text(), page


def test_first_steps_runs_and_the_tuned_model_answers(tmp_path: Path) -> None:
    # A shorter run; the second tier tests what it learns.
    shorter = {"steps=150": "steps=12", "exact_match_rows=50": "exact_match_rows=4"}
    printed = executed("first_steps", tmp_path, shorter)
    assert "parameters train" in printed
    assert (tmp_path / "out/first_steps/training_loss.png").stat().st_size > 10_000
    assert (tmp_path / "out/first_steps/merged/model.safetensors").is_file()


def test_adapters_on_a_model_of_your_own(tmp_path: Path) -> None:
    shorter = {"steps=100": "steps=4", "steps=120": "steps=4", "shape, 800": "shape, 80"}
    printed = executed("own_model", tmp_path, shorter)
    assert "largest difference of the logits: 0.0" in printed
    assert "saved: 20 kB, of a model of 184 kB" in printed
    said = dict(line.split(": ") for line in printed.splitlines() if ": " in line)
    assert said["loaded"] == said["merged"]
