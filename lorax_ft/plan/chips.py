"""Accelerators: their memory, speeds and topologies. Imports no JAX.

Speeds are the peak figures of Google's and NVIDIA's documents.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

GB = 1e9
MOST_GPUS = 16
"""GPUs of the largest machines with these chips."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator."""

    label: str
    memory: float
    """Bytes that a program may use."""
    flops: float
    """Multiplications and additions a second, dense, in bfloat16."""
    bandwidth: float
    """Bytes a second from its memory."""
    link: float
    """Bytes a second that it receives from its neighbors along one axis of the topology."""
    shapes: tuple[str, ...] = ()
    """Topologies of a TPU; empty for a GPU, whose number is free."""

    @property
    def is_tpu(self) -> bool:
        """Whether a program can be compiled for it here."""
        return bool(self.shapes)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(
        label="TPU v5e",
        memory=15.75 * 2**30,
        flops=197e12,
        bandwidth=819 * GB,
        link=90 * GB,
        shapes=_FLAT,
    ),
    "v6e": Chip(
        label="TPU v6e",
        memory=31.25 * 2**30,
        flops=918e12,
        bandwidth=1640 * GB,
        link=180 * GB,
        shapes=_FLAT,
    ),
    "v5p": Chip(
        label="TPU v5p",
        memory=95.0 * 2**30,
        flops=459e12,
        bandwidth=2765 * GB,
        link=180 * GB,
        shapes=_CUBE,
    ),
    "a100": Chip(
        label="NVIDIA A100 80 GB",
        memory=79 * 2**30,
        flops=312e12,
        bandwidth=2039 * GB,
        link=300 * GB,
    ),
    "h100": Chip(
        label="NVIDIA H100 SXM",
        memory=79 * 2**30,
        flops=989e12,
        bandwidth=3350 * GB,
        link=450 * GB,
    ),
    "h200": Chip(
        label="NVIDIA H200",
        memory=140 * 2**30,
        flops=989e12,
        bandwidth=4800 * GB,
        link=450 * GB,
    ),
}
"""By the name in front of a topology."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """How many chips there are, and how they are connected."""

    name: str
    chip: Chip
    chips: int
    """Of one slice."""
    slices: int
    """Slices of a pod that are connected by the data center's network only."""

    @property
    def devices(self) -> int:
        """All chips."""
        return self.chips * self.slices

    @property
    def network(self) -> float:
        """Bytes a second that a chip receives from others of its slice."""
        if not self.chip.is_tpu:
            return self.chip.link
        # An axis of one chip has no links.
        axes = [size for size in map(int, _shape(self.name).split("x")) if size > 1]
        return self.chip.link * max(len(axes), 1)


def parse_topology(name: str, *, slices: int = 1) -> Topology:
    """The topology of a name such as "v5e:4x4" (a TPU) or "h100:8" (GPUs of one machine).

    Raises:
      ValueError: there is no such chip or topology; the error lists those that exist.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind.lower(), CHIPS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--topology {name}: {kind} is no known chip; known are {', '.join(CHIPS)}, such as "
            f"v5e:4x4 or h100:8{hint}"
        )
    chip = CHIPS[kind]
    if slices < 1:
        raise ValueError(f"--slices is {slices}; it must be 1 or more")
    if chip.is_tpu:
        if shape not in chip.shapes:
            listed = ", ".join(f"{kind}:{each}" for each in chip.shapes)
            raise ValueError(f"--topology {name} does not exist; there are {listed}")
        chips = math.prod(map(int, shape.split("x")))
        return Topology(name=name, chip=chip, chips=chips, slices=slices)
    if not re.fullmatch(r"[1-9]\d*", shape):
        raise ValueError(f"--topology {name}: give the number of GPUs, such as {kind}:8")
    if int(shape) > MOST_GPUS:
        raise ValueError(
            f"--topology {name}: these are GPUs of one machine, which has at most {MOST_GPUS}"
        )
    if slices > 1:
        raise ValueError("--slices is for TPUs; name all GPUs in --topology")
    return Topology(name=name, chip=chip, chips=int(shape), slices=1)


def _shape(name: str) -> str:
    return name.partition(":")[2]
