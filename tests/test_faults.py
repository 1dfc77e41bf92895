"""Faults from outside: a hub that does not answer, a full disk, a process that dies.

docs/RELIABILITY.md lists them. The faults are real ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from resume_cases import outcome
from test_distributed import run_config, write_model_and_data

from lorax_ft import offline
from lorax_ft.data.sources import read_rows
from lorax_ft.interop.locate import locate

PROGRAM = Path(__file__).parent / "programs/fault_runs.py"
CHECKPOINT = "the checkpoint of step 2 cannot be written: No space left on device; once that is"
FAULTS = {  # in this order, on one run, and the errors that they end with
    "fill checkpoints/2 3": CHECKPOINT,
    "fill .adapter- 2": "run/adapter cannot be written: .*(No space left|os error 28)",
    "none": "",
}


@pytest.fixture(params=["silent", "refused", "no such host"])
def lost_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a hub that does not answer, for the real clients, without a cache."""
    with socket.socket() as server, pytest.MonkeyPatch.context() as patch:
        server.bind(("127.0.0.1", 0))
        # Without listen() the kernel refuses; with it the connection stands, and nobody answers.
        if request.param == "silent":
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "no such host":
            address = "http://hub.invalid"
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        patch.setattr(offline, "LIMIT", 0.5)
        yield address


def test_a_hub_that_does_not_answer(lost_hub: str) -> None:
    """The clients retry for minutes."""
    began = time.monotonic()
    expected = rf"the hub at {lost_hub} cannot be reached \(.+\): .*HF_HUB_OFFLINE=1"
    with pytest.raises(ValueError, match=expected) as of_model:
        locate("nobody/nothing", None)
    with pytest.raises(ValueError, match=expected) as of_data:
        list(read_rows(("nobody/nothing",)))
    assert time.monotonic() - began < 60  # on a busy machine
    assert "\n" not in f"{of_model.value}{of_data.value}"


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
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
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
