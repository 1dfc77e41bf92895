"""A run whose output is on a bucket, with the real clients and a server of the bucket's API.

Needs `pip install gcsfs gcp-storage-emulator`. gcsfs writes the log and the adapter, TensorStore
the arrays of the checkpoints. The server is tests/programs/gcs_server.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_distributed import (
    run_config,
    start_processes,
    train_in_processes,
    write_model_and_data,
)

from lorax_ft.config import Config
from lorax_ft.run.log import read_log

URL = "gs://bucket/runs/mine"
LAST = 6

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gcsfs", "gcp_storage_emulator")),
    reason="pip install gcsfs gcp-storage-emulator",
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the server, which the clients find by environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs, google-cloud-storage
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    program = Path(__file__).parents[1] / "programs/gcs_server.py"
    with (tmp_path / "server.out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(program), str(port)], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        while not _answers(address):
            assert process.poll() is None, (tmp_path / "server.out").read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def test_a_killed_run_on_a_bucket_goes_on_as_if_it_never_had_stopped(
    server: str, tmp_path: Path
) -> None:
    """Two processes are killed while they write the second checkpoint; one goes on."""
    write_model_and_data(tmp_path)
    train_part(tmp_path, config(tmp_path, str(tmp_path / "disk")))

    file = tmp_path / "config.json"
    file.write_text(config(tmp_path, URL).to_json())
    started = start_processes(tmp_path, [file], processes=2, devices=2)
    try:
        while not objects(server, "runs/mine/checkpoints/4/"):
            assert all(process.poll() is None for process in started), output(tmp_path)
            time.sleep(0.05)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()
    whole = "runs/mine/checkpoints/{}/commit_success.txt"
    assert objects(server, whole.format(2))
    assert not objects(server, whole.format(4))

    train_part(tmp_path, config(tmp_path, URL))
    assert "Resuming from step 2 of 6" in (tmp_path / "process0.out").read_text()
    download(server, "runs/mine/", tmp_path / "copy")
    losses = [
        {line["step"]: line["loss"] for line in read_log(tmp_path / name) if "loss" in line}
        for name in ("disk", "copy")
    ]
    assert list(losses[0]) == list(range(1, LAST + 1))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    disk, copy = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        for name in ("disk", "copy")
    )
    assert disk.keys() == copy.keys()
    for name, leaf in disk.items():
        np.testing.assert_allclose(copy[name], leaf, atol=1e-3, err_msg=name)
    assert {path.name for path in (tmp_path / "copy/checkpoints").iterdir()} == {"4", "6"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        path.name for path in (tmp_path / "disk").iterdir()
    }


def config(folder: Path, output: str) -> Config:
    plain = run_config(folder, "lora", LAST)
    return dataclasses.replace(
        plain,
        train=dataclasses.replace(plain.train, output=output, save_every=2, resume="auto"),
        eval=dataclasses.replace(plain.eval, exact_match_rows=0, samples=0),
    )


def train_part(folder: Path, part: Config) -> None:
    """Train in one process of four devices."""
    file = folder / "part.json"
    file.write_text(part.to_json())
    train_in_processes(folder, [file], processes=1, devices=4)


def output(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("process*.out")))


def objects(server: str, prefix: str) -> list[str]:
    """The names of the objects that begin with a prefix."""
    with urllib.request.urlopen(f"{server}/storage/v1/b/bucket/o?prefix={prefix}") as reply:
        return [item["name"] for item in json.load(reply)["items"]]


def download(server: str, prefix: str, folder: Path) -> None:
    """Copy the objects below a prefix into a folder, by the API alone."""
    for name in objects(server, prefix):
        file = folder / os.path.relpath(name, prefix)
        file.parent.mkdir(parents=True, exist_ok=True)
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"{server}/storage/v1/b/bucket/o/{quoted}?alt=media") as reply:
            file.write_bytes(reply.read())


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address) as reply:
            return bool(reply.status == 200)
    except urllib.error.URLError:
        return False
