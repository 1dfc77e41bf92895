"""A disk that takes long to write: steps do not wait for it, and the run is the same."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from resume_cases import outcome
from test_distributed import write_model_and_data
from test_reliability import config

from lorax_ft.config import Config

SLOW = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void wait_for_disk(int file) {
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    if (strstr(path, "/checkpoints/")) usleep(150000);
}

#define SLOW(result, name, parameters, arguments) \
    result name parameters { \
        static result (*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        wait_for_disk(file); \
        return real arguments; \
    }

SLOW(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
SLOW(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
SLOW(ssize_t, pwrite64, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
SLOW(int, fsync, (int file), (file))
SLOW(int, fdatasync, (int file), (file))
"""
PROGRAM = """
import json, sys, time
from pathlib import Path
from lorax_ft.config import Config
from lorax_ft.run.checkpoints import Checkpoints
from lorax_ft.run.loop import train

seconds = {"save": [], "close": []}

def timed(name):
    inner = getattr(Checkpoints, name)
    def outer(*args, **options):
        start = time.monotonic()
        inner(*args, **options)
        seconds[name].append(time.monotonic() - start)
    setattr(Checkpoints, name, outer)

timed("save")
timed("close")
train(Config.from_json(Path(sys.argv[1]).read_text()))
print(json.dumps(seconds))
"""


def run(settings: Config, file: Path, **environment: str) -> dict[str, list[float]]:
    """Train in a process of its own; returns how long its checkpoints were waited for."""
    file.write_text(settings.to_json())
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)} | environment,
        check=True,
    )
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_steps_do_not_wait_for_a_slow_disk(tmp_path: Path) -> None:
    """One checkpoint in the middle, whose writing the later steps and the end go on beside."""
    write_model_and_data(tmp_path)
    (tmp_path / "slow.c").write_text(SLOW)
    library = tmp_path / "slow.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "slow.c"), "-ldl"], check=True
    )
    usual = config(tmp_path, tmp_path / "usual", last=6, save_every=3, load_best=False)
    slow = dataclasses.replace(
        usual, train=dataclasses.replace(usual.train, output=str(tmp_path / "slow"))
    )
    fast = run(usual, tmp_path / "usual.json")
    found = run(slow, tmp_path / "slow.json", LD_PRELOAD=str(library))
    print(f"seconds without delays {fast}, with them {found}")
    # The first save begins the writing, and the second waits for its end, as orbax has one at a
    # time.
    first, second = found["save"]
    written = max(second, sum(found["close"]))
    assert written > 3
    assert first < written / 2
    assert outcome(tmp_path / "slow") == outcome(tmp_path / "usual")
