"""The memory that a run has, and the most that it has taken."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

from lorax_ft.program import command

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
ADVICE = (
    "use a smaller --train.batch_size, --model.remat full, more --train.microbatches, "
    f"--quant.format nf4, or more --mesh.fsdp, which splits the weights; {command('plan')} finds "
    "what fits"
)
"""What to do where memory is too small."""
UNKNOWN_MEMORY = 8e9  # a guess, where the system does not say


def peak_memory() -> str:
    """The peak in words: of the fullest device, or of the process on a CPU."""
    peaks = []
    for device in jax.local_devices():
        # CPU devices report no statistics.
        statistics = device.memory_stats() or {}
        peaks.append(statistics.get("peak_bytes_in_use", 0))
    if max(peaks):
        return f"{max(peaks) / 1e6:,.0f} MB per device"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    # macOS counts bytes, other systems kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 1e6:,.0f} MB of this process"


def device_memory() -> float:
    """The bytes of one device: of the memory that it has, not of what is free."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return float(statistics["bytes_limit"])
    # The devices of a CPU share the memory of the machine.
    return host_memory() / jax.local_device_count()


def describe_memory() -> str:
    """The memory of a device and how much of it is free, in words; on a CPU of the machine.

    Where an allocation failed, its size is in the error, and this is what it did not fit into.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        whole = statistics["bytes_limit"]
        free = f"{(whole - statistics.get('bytes_in_use', 0)) / 1e9:,.2f} GB are free"
        return f"a device has {whole / 1e9:,.2f} GB, of which {free}"
    words = f"this machine has {host_memory() / 1e9:,.2f} GB"
    limit = process_limit()
    return words if limit is None else f"{words}, and a limit of {limit / 1e9:,.2f} GB a process"


def process_limit() -> int | None:
    """The limit of `ulimit -v` in bytes; None: there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def host_memory() -> float:
    """The bytes that this machine, or the container that it is, has."""
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        return UNKNOWN_MEMORY
    try:
        limit = CONTAINER_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return memory
    return min(memory, float(limit)) if limit.isdigit() else memory
