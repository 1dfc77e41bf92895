"""The largest memory that a run has taken."""

from __future__ import annotations

import sys

import jax


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
