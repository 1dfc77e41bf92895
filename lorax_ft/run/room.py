"""Says before training whether the process may have what a run takes: memory, open files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lorax_ft.run.memory import ADVICE, process_limit

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the control groups, which bound containers and jobs."""
MACHINE = Path("/proc/meminfo")
OPEN_FILES = 64
"""With fewer, a run fails somewhere: checkpoints are written by many threads."""


class Room(NamedTuple):
    """Memory that is left."""

    free: float
    """Bytes."""
    where: str
    """What has it, in words."""
    is_strict: bool
    """Whether more than that certainly fails. A machine frees caches, and other processes end."""


def check_room(step: Any) -> None:
    """Warn where a step takes more memory than there is left, or raise where it certainly fails.

    The arguments of the step (weights, optimizer, batch) are in memory already. Beside them it
    takes its temporaries, such as activations and gradients, and results with a place of their own.

    Args:
      step: the compiled step; what its compiler says is counted.

    Raises:
      ValueError: it takes more than its device has left, or than a limit of the process allows.
    """
    analysis = step.memory_analysis()
    if analysis is None:  # some backends report none
        return
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    needed = analysis.temp_size_in_bytes + results
    held = analysis.argument_size_in_bytes
    if jax.default_backend() == "cpu":  # whose devices share the memory of the machine
        needed *= jax.local_device_count()
        held *= jax.local_device_count()
    short = [room for room in rooms() if room.free < needed]
    if not short:
        return
    # One that is strict first, then the smallest.
    room = min(short, key=lambda room: (not room.is_strict, room.free))
    message = (
        f"a training step takes {needed / 1e9:,.2f} GB beside the {held / 1e9:,.2f} GB of its "
        f"weights, optimizer and batch, but {room.where} has {max(room.free, 0) / 1e9:,.2f} GB "
        f"left; {ADVICE}"
    )
    if room.is_strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def check_open_files() -> None:
    """Allow this process enough open files for a run, where its hard limit lets it.

    Raises:
      ValueError: it does not.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= OPEN_FILES or soft == resource.RLIM_INFINITY:
        return
    if hard < OPEN_FILES and hard != resource.RLIM_INFINITY:
        raise ValueError(
            f"this process may open only {hard} files, and a run needs {OPEN_FILES}; allow more of "
            "them, as with ulimit -n 1024"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


def rooms() -> list[Room]:
    """The memory that is left, by each thing that bounds it; empty if the system says nothing."""
    free = []
    for device in jax.local_devices():
        statistics = device.memory_stats() or {}
        if "bytes_limit" in statistics:
            free.append(statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    if free:
        return [Room(min(free), "a device", is_strict=True)]
    if jax.default_backend() != "cpu":
        return []
    return list(_host_rooms())


def _host_rooms() -> Iterator[Room]:
    limit = process_limit()
    try:
        if limit is not None:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            used = pages * os.sysconf("SC_PAGE_SIZE")
            yield Room(limit - used, "this process (ulimit -v)", is_strict=True)
        numbers = _numbers(MACHINE)
        # In kB.
        free = 1024 * (numbers["MemAvailable:"] + numbers["SwapFree:"])
        yield Room(free, "this machine", is_strict=False)
    except (OSError, KeyError):  # systems other than Linux
        return
    for group in _memory_groups():
        yield from _group_room(group)


def _memory_groups() -> list[Path]:
    """The folders of this process's control groups and of those around them, down from the root.

    In a container without a view of its own, only the root is there.
    """
    found = []
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, place = line.split(":", 2)
        # Version 2 names no controllers; version 1 has a tree for each.
        if controllers and "memory" not in controllers.split(","):
            continue
        root = GROUPS / "memory" if controllers else GROUPS
        group = root / place.strip("/")
        found += [group, *(folder for folder in group.parents if folder.is_relative_to(root))]
    return found


def _group_room(group: Path) -> Iterator[Room]:
    """What a control group has left; nothing if it has no limit."""
    try:
        if (group / "memory.max").exists():
            limit, used, cache = "memory.max", "memory.current", "file"
        else:
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"
        text = (group / limit).read_text(encoding="ascii").strip()
        if not text.isdigit():  # max
            return
        # The kernel gives up its cache of files first.
        in_use = int((group / used).read_text(encoding="ascii"))
        in_use -= _numbers(group / "memory.stat")[cache]
    except (OSError, KeyError):
        return
    yield Room(int(text) - in_use, "this container", is_strict=False)


def _numbers(file: Path) -> dict[str, int]:
    """The numbers in a file of the kernel with a name and a number a line."""
    numbers = {}
    for line in file.read_text(encoding="ascii").splitlines():
        name, number, *_ = line.split()
        numbers[name] = int(number)
    return numbers
