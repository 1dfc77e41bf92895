"""Runs in child processes that meet a fault of their disk, for the tests of faults.

    python tests/programs/fault_runs.py CONFIG.json DISK FAULT ...

DISK is an empty folder, on which a small file system of its own is mounted (tmpfs, in a mount
namespace that ends with this process); the run writes to DISK/run. Each child runs `train` of the
same config as scripts/train.py does, up to a fault, "ACTION NAME N": before the N-th time that the
run opens for writing, renames, makes or deletes a path that contains NAME, ACTION happens. "none"
lets it run to its end, after which its folder is moved out of the way (a number is put behind it).
After each child the disk is mended. A line of JSON for each says how it ended and what it said.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from killed_runs import Moment, use_test_cache

from lorax_ft import cli
from lorax_ft.config import Config
from lorax_ft.run.loop import train

SIZE, INODES = "4m", 2000
NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000  # sched.h


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


def use_inodes(disk: Path) -> None:
    """Leave no file to be made."""
    (disk / "fillers").mkdir()
    try:
        for i in range(INODES):
            (disk / "fillers" / str(i)).touch()
    except OSError:
        return


def lose_checkpoints(disk: Path) -> None:
    """Delete the checkpoints while the run uses them."""
    shutil.rmtree(disk / "run/checkpoints")


def lose_run(disk: Path) -> None:
    """Delete the whole output folder."""
    shutil.rmtree(disk / "run")


ACTIONS: dict[str, Callable[[Path], None]] = {
    "fill": fill,
    "inodes": use_inodes,
    "lose-checkpoints": lose_checkpoints,
    "lose-run": lose_run,
}


class Fault(Moment):
    """Something that happens to the disk at a moment of the run."""

    def __init__(self, text: str, disk: Path) -> None:
        self.action, _, moment = text.partition(" ")
        self.disk = disk
        super().__init__(moment, disk / "run")

    def kill(self) -> None:
        """The fault, once."""
        self.name = "never"
        ACTIONS[self.action](self.disk)


def mend(disk: Path) -> None:
    """What somebody does who reads the error."""
    (disk / "filler").unlink(missing_ok=True)
    shutil.rmtree(disk / "fillers", ignore_errors=True)


def mount(*arguments: object) -> None:
    """The system's command."""
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def mount_disk(disk: Path) -> None:
    """A file system that this process and its children see."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS | (NEW_USERS if user else 0)):
        raise OSError(ctypes.get_errno(), "no mount namespaces here")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={INODES}", "tmpfs", disk)


def child(config: Config, fault: str, disk: Path) -> None:
    """Run in a forked process, as the script does."""
    use_test_cache()
    Fault(fault, disk)
    with cli.one_line_errors():
        train(config)


def main(file: str, disk: str, *faults: str) -> None:
    """Run one child for each fault."""
    place = Path(disk)
    mount_disk(place)
    config = Config.from_json(Path(file).read_text())
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, output=str(place / "run"))
    )
    said = Path(file).with_suffix(".said")
    ended = 0
    for fault in faults:
        pid = os.fork()
        if pid == 0:
            with said.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                code = 1
                try:
                    child(config, fault, place)
                    code = 0
                except SystemExit as end:
                    code = int(end.code or 0)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
        _, status = os.waitpid(pid, 0)
        mend(place)
        line = {"fault": fault, "code": os.waitstatus_to_exitcode(status), "said": said.read_text()}
        print(json.dumps(line), flush=True)
        if line["code"] == 0 and fault == "none":
            shutil.move(place / "run", Path(file).parent / f"run{ended}")
            ended += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
