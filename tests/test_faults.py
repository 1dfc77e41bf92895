"""Faults from outside: a hub that does not answer, a full disk, a lost file, little memory.

docs/RELIABILITY.md lists them. The faults are real ones; more of them are in tests/slow.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import BYTES

from lorax_ft import cli, offline
from lorax_ft.config import EMBEDDED_MODEL
from lorax_ft.data.bad_rows import BadRows
from lorax_ft.data.chat import Encoded, Encoder, Sample
from lorax_ft.data.sources import read_rows
from lorax_ft.data.store import store_samples
from lorax_ft.data.token_cache import TokenCache
from lorax_ft.interop import tokenizer
from lorax_ft.interop.locate import locate
from lorax_ft.memory_limit import memory_limit
from lorax_ft.run import room
from lorax_ft.run.folder import check_writable, write_text
from lorax_ft.run.lock import LOCK, locked
from lorax_ft.run.log import LOG, PLOT, Log, plot_losses
from lorax_ft.run.write_errors import write_errors


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounts = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mounts, check=False).returncode:
        pytest.skip("only root can mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def write_log(disk: Path) -> None:
    with Log(disk, trackers=(), settings={}) as log:
        fill(disk)
        for step in range(1000):
            log.write(step, {"loss": 1.0})


def write_plot(disk: Path) -> None:
    (disk / LOG).write_text('{"step": 1, "loss": 1.0}\n')
    fill(disk)
    plot_losses(disk)


def write_config(disk: Path) -> None:
    fill(disk)
    write_text(disk / "config.json", "x" * 9999)


def write_bad_rows(disk: Path) -> None:
    fill(disk)
    BadRows(count=1, problems=["x" * 9999]).write(disk)


def write_samples(disk: Path) -> None:
    fill(disk)
    sample = Sample(np.zeros(9999, np.int32), np.zeros(9999, np.bool_))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(disk))
        store_samples([sample])


def write_lock(disk: Path) -> None:
    fill(disk)
    with locked(disk):
        pass


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (write_lock, LOCK),
        (write_log, LOG),
        (write_plot, PLOT),
        (write_config, "config.json"),
        (write_bad_rows, "bad_rows.txt"),
        (write_samples, " (TMPDIR names another one)"),
    ],
)
def test_a_full_disk_is_one_line_with_the_file(
    disk: Path,
    write: Callable[[Path], None],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        write(disk)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith(f"{named}: No space left on device\n")
    assert str(disk) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_tokens_are_not_kept_on_a_disk_that_fails(
    disk: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on, and nothing half-written stays."""
    if fault == "full":
        fill(disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = list(disk.iterdir())
    count = 9999
    tokens, mask = np.zeros(count, np.int32), np.zeros(count, np.bool_)
    encoded = Encoded(tokens=tokens, mask=mask, lengths=np.array([count]), endless=0, unwritten={})
    cache = TokenCache(disk, Encoder(tokenizer=BYTES))
    with caplog.at_level(logging.WARNING):
        cache.write("key", encoded)
    assert f"tokens are not kept in {disk}" in caplog.text
    assert cache.read("key") is None
    assert list(disk.iterdir()) == before


def test_a_read_only_output_folder(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ValueError, match=r"cannot write to .*disk: Read-only file system"):
        check_writable(disk / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_what_is_printed_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `> log.txt` on a full disk: one line, and Python's own last attempt does not fail."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end, cli.one_line_errors():
            print("step 1")
        assert end.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_a_tokenizer_whose_folder_vanishes_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is compared, and while its files are copied; training took hours until then."""
    text = "2 + 2 = 4"
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path) -> Any:
        source.unlink()
        return copyfile(source, target)

    for fault in ("before", "while"):
        folder, saved = tmp_path / fault, tmp_path / f"{fault}-saved"
        shutil.copytree(EMBEDDED_MODEL, folder)
        loaded = tokenizer.load_tokenizer(folder)
        saved.mkdir()
        if fault == "before":
            shutil.rmtree(folder)
        else:
            monkeypatch.setattr(tokenizer.shutil, "copyfile", copy)
        tokenizer.save_tokenizer(loaded, saved)
        again = tokenizer.load_tokenizer(saved)
        assert again.encode(text) == loaded.encode(text)
        assert again.chat_template == loaded.chat_template


@pytest.fixture(scope="module")
def large_step() -> Any:
    """A compiled program with a temporary array of 268 MB."""

    def step(x: jax.Array) -> jax.Array:
        return jnp.sort(x[:, None] * x[None, :], axis=0)[0]

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(step).lower(jnp.zeros(8192)).compile()


def test_too_little_memory_is_said_before(large_step: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the machine may be full
        room.check_room(large_step)
        expected = (
            r"takes \d\.\d\d GB beside the .* \(ulimit -v\) has \d\.\d\d GB left; use a smaller"
        )
        with memory_limit(100_000_000), pytest.raises(ValueError, match=expected):
            room.check_room(large_step)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_step: Any, version: int
) -> None:
    """A warning: its cache of files may shrink further, and other processes may end."""
    files = {"memory.max": "max\n", "memory.current": "300\n", "memory.stat": "anon 0\nfile 100\n"}
    root = tmp_path
    if version == 1:
        root = tmp_path / "memory"
        files = {"limit_in_bytes": f"{2**63 - 4096}", "usage_in_bytes": "300"}
        files = {f"memory.{name}": text for name, text in files.items()}
        files["memory.stat"] = "cache 7\ntotal_cache 100\n"
    root.mkdir(exist_ok=True)
    for name, text in files.items():
        (root / name).write_text(text)
    monkeypatch.setattr(room, "GROUPS", tmp_path)
    monkeypatch.setattr(room, "MACHINE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemAvailable: 99000000 kB\nSwapFree: 0 kB\n")
    room.check_room(large_step)
    limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
    (root / limit).write_text("1000\n")
    with pytest.warns(UserWarning, match=r"but this container has 0\.00 GB left"):
        room.check_room(large_step)
    assert [left.free for left in room.rooms()][1:] == [800]


OPEN_FILES = """
import resource
from lorax_ft.run.room import check_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
check_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "said"),
    [
        (32, 32, r"may open only 32 files, and a run needs 64; .* ulimit -n 1024"),
        (32, 500, r"^\(64, 500\)"),
        (100, 500, r"^\(100, 500\)"),
    ],
)
def test_few_open_files_are_said_or_raised(soft: int, hard: int, said: str) -> None:
    program = OPEN_FILES.format(soft=soft, hard=hard)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert re.search(said, ended.stdout + ended.stderr), ended


@pytest.mark.parametrize("file", [None, "checkpoints/3.tmp/state", "other"])
def test_an_error_of_a_checkpoint_says_what_to_do(
    tmp_path: Path, file: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As orbax raises it: without a file, with one of the checkpoint's, or with another one."""
    monkeypatch.chdir(tmp_path)
    named = None if file is None else str(tmp_path / file)
    said = r"checkpoints: the checkpoint of step 3 cannot be written: No space .* the same command"
    expected = pytest.raises(OSError, match="other" if file == "other" else said)
    with expected, write_errors(Path("checkpoints"), 3):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)
