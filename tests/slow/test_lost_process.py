"""A process of several is killed: the others end in a bounded time, and do not wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorax_ft.commands.train import HEARTBEAT_SECONDS

PROGRAM = """
import time
import jax
from lorax_ft.commands.train import _join_processes
_join_processes()
print(f"joined {jax.process_count()}", flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("killed", [0, 1], ids=["the first", "the second"])
def test_a_killed_process_ends_the_other(tmp_path: Path, killed: int) -> None:
    root = Path(__file__).parents[2]
    slurm = {
        "SLURM_JOB_ID": str(os.getpid() + killed),  # JAX derives its port from it
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
    }
    environment = os.environ | slurm | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    outputs = [tmp_path / f"{i}.out" for i in range(2)]
    started = []
    for i, output in enumerate(outputs):
        own = environment | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        with output.open("w") as said:
            command = [sys.executable, "-c", PROGRAM]
            started.append(
                subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=own)
            )
    try:
        while not all("joined 2" in output.read_text() for output in outputs):
            assert all(process.poll() is None for process in started), outputs[0].read_text()
            time.sleep(0.2)
        started[killed].kill()
        # Twice the timeout: the machine may be busy. It is still less than JAX's default, 100 s.
        assert started[1 - killed].wait(timeout=2 * HEARTBEAT_SECONDS) != 0
    finally:
        for process in started:
            process.kill()
    assert "another task died" in outputs[1 - killed].read_text()
