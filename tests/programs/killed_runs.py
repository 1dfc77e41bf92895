"""Runs in child processes that are killed at chosen moments, for the tests of exact resuming.

    python tests/programs/killed_runs.py CONFIG.json MOMENT ...

Each child runs `train` of the same config. When one comes to its end, its folder is renamed (a
number is put behind it), so that the next one begins anew. A moment is "event N" (the N-th time
that the run opens for writing, renames, makes or deletes something in its folder), "NAME N" (the
N-th of these whose path contains NAME), "seconds S", or "never". The children follow one another; a
line of JSON for each says how it ended and how many events it had. They are forked from a process
that has imported everything and started nothing, as importing JAX takes longer than the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"

import jax

from lorax_ft.config import Config
from lorax_ft.run.loop import train

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


class Moment:
    """Kills this process at a moment of its run, and counts the events so far."""

    def __init__(self, text: str, folder: Path) -> None:
        self.name, _, number = text.partition(" ")
        self.number = float(number or 0)
        self.folder = str(folder)
        self.events = 0
        self.named = 0
        self.report = -1
        if self.name == "seconds":
            threading.Timer(self.number, self.kill).start()
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: before the event happens."""
        if event not in EVENTS or not isinstance(args[0], str | os.PathLike):
            return
        path = os.fspath(args[0])
        if not str(path).startswith(self.folder):
            return
        if event == "open" and not args[2] & WRITES:
            return
        self.events += 1
        self.named += self.name in str(path)
        if self.name == "event" and self.events == self.number:
            self.kill()
        if self.name not in ("event", "seconds", "never") and self.named == self.number:
            self.kill()

    def kill(self) -> None:
        """End the process as a power cut would: nothing is caught or closed."""
        os.write(self.report, str(self.events).encode())
        os.kill(os.getpid(), signal.SIGKILL)


def child(config: Config, moment: str, report: int) -> int:
    """Run in a forked process, up to the moment."""
    use_test_cache()
    watched = Moment(moment, Path(config.train.output).absolute())
    watched.report = report
    try:
        train(config)
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        return 1
    os.write(report, str(watched.events).encode())
    return 0


def use_test_cache() -> None:
    """One device, and the programs that earlier tests have compiled."""
    jax.config.update("jax_num_cpu_devices", 1)
    if cache := os.environ.get("TESTS_COMPILATION_CACHE"):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def main(file: str, *moments: str) -> None:
    """Run one child for each moment."""
    config = Config.from_json(Path(file).read_text())
    output = str(Path(config.train.output).absolute())
    train_config = dataclasses.replace(config.train, output=output)
    config = dataclasses.replace(config, train=train_config)
    ended = 0
    for moment in moments:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            sys.stdout = sys.stderr  # what the run prints
            code = child(config, moment, writer)
            sys.stderr.flush()
            os._exit(code)
        os.close(writer)
        events = int(os.read(reader, 20) or -1)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        line = {"moment": moment, "killed": killed, "events": events}
        line["code"] = None if killed else os.WEXITSTATUS(status)
        print(json.dumps(line), flush=True)
        if line["code"] == 0:
            Path(output).rename(f"{output}{ended}")
            ended += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
