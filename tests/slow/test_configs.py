"""Every config learns the embedded task; SmolLM2 learns the answer format of GSM8K."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import CONFIGS as METHODS
from run_cases import Main, resumed

from lorax_ft.run.log import read_log

ROOT = Path(__file__).parent.parent.parent
LEAST = {"prompt_tuning": 0.2, "p_tuning": 0.1}
"""The exact match of methods that do not learn the whole task, as their configs say."""
CONFIGS = [path.stem for path in sorted((ROOT / "configs").glob("*.py"))]


def train(*argv: object) -> None:
    # The XLA flags of conftest are for small tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", *map(str, argv)], check=True, env=environment
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_config_learns_the_embedded_task(name: str, tmp_path: Path) -> None:
    train("--config", ROOT / f"configs/{name}.py", "--train.output", tmp_path / name)
    log = read_log(tmp_path / name)
    assert log[0]["exact_match"] < 0.1
    assert log[-1]["exact_match"] > LEAST.get(name, 0.8)


@pytest.mark.parametrize("name", METHODS)
def test_a_config_resumes_as_if_never_stopped(
    name: str, main: Main, tmp_path: Path, standard_promotion: None
) -> None:
    resumed(main, name, tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_smollm2_on_gsm8k(name: str, tmp_path: Path) -> None:
    model, data = os.environ.get("LORAX_FT_SMOLLM2"), os.environ.get("LORAX_FT_GSM8K")
    if not (model and data):
        pytest.skip(
            "set LORAX_FT_SMOLLM2 to a folder or .gguf file, "
            "and LORAX_FT_GSM8K to a folder with train.jsonl"
        )
    small = [
        "--train.steps",
        20,
        "--train.batch_size",
        2,
        "--train.microbatches",
        1,
        "--optim.learning_rate",
        1e-4,
    ]
    small += ["--data.max_length", 128, "--data.limit", 400]
    small += ["--eval.rows", 16, "--eval.exact_match_rows", 0, "--eval.samples", 0]
    train(
        "--config",
        ROOT / f"configs/{name}.py",
        "--model.path",
        model,
        "--data.train",
        data,
        *small,
        "--data.validation",
        Path(data) / "test.jsonl",
        "--train.output",
        tmp_path / name,
    )
    losses = [
        line["validation_loss"] for line in read_log(tmp_path / name) if "validation_loss" in line
    ]
    assert losses[-1] < losses[0]
