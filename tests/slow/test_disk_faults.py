"""Faults of a disk, which are real ones, on a file system of 4 MB that `fault_runs.py` mounts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from resume_cases import outcome
from test_distributed import run_config, write_model_and_data

PROGRAM = Path(__file__).parents[1] / "programs/fault_runs.py"
CHECKPOINT = "the checkpoint of step 2 cannot be written: No space left on device; once that is"
FAULTS = {  # in this order, on one run, and the errors that they end with
    "fill trainer_log 1": r"trainer_log\.jsonl: No space left on device",
    "inodes checkpoints/1 3": "the checkpoint of step 1 cannot be written: No space left on device",
    "fill checkpoints/2 3": CHECKPOINT,
    "fill training_loss 1": r"run/training_loss\.png: No space left on device",
    "fill .adapter- 2": "run/adapter cannot be written: .*(No space left|os error 28)",
    "none": "",
}


@pytest.fixture(scope="module")
def on_a_small_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How runs of one config ended on a disk that fails, by fault; see `fault_runs.py`."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "disk").mkdir()
    write_model_and_data(folder)
    base = run_config(folder, "lora", 4)
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, cache=None),
        train=dataclasses.replace(base.train, save_every=1, eval_every=2, load_best=True),
        eval=dataclasses.replace(base.eval, exact_match_rows=0, samples=0),
    )
    file = folder / "config.json"
    file.write_text(config.to_json())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment["TESTS_COMPILATION_CACHE"] = jax.config.jax_compilation_cache_dir or ""
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(file), str(folder / "disk")]
    done = subprocess.run(
        [*command, "none", *FAULTS], capture_output=True, text=True, env=environment, check=False
    )
    if "no mount namespaces here" in done.stderr:
        pytest.skip("this system lets nobody mount a disk")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {line["fault"]: line for line in lines}
    found["runs"] = {"whole": outcome(folder / "run0"), "faults": outcome(folder / "run1")}
    return found


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "none"])
def test_a_disk_that_fails(on_a_small_disk: dict[str, dict[str, Any]], fault: str) -> None:
    line = on_a_small_disk[fault]
    assert line["code"] == 2, line["said"]
    (error,) = [text for text in line["said"].splitlines() if text.startswith("error: ")]
    assert re.search(FAULTS[fault], error), error


def test_after_the_faults_of_its_disk_a_run_ends_as_one_without(
    on_a_small_disk: dict[str, dict[str, Any]],
) -> None:
    runs = on_a_small_disk["runs"]
    assert runs["faults"] == runs["whole"]
