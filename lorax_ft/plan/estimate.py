"""How fast a step could be: a roofline of arithmetic, memory and network. All of it is an estimate.

A step takes at least as long as the slowest of the three, if they overlap in full, and the sum of
them if they do not overlap at all. The network is that of a slice: what crosses between slices
counts as if it stayed inside.
"""

from __future__ import annotations

import dataclasses

from lorax_ft.config import Config
from lorax_ft.plan.chips import Topology
from lorax_ft.plan.program import Program

PASSES = 3
"""Reads of the weights in a step: forward, recomputed, and backward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a step at peak speeds, and what follows from them."""

    compute: float
    memory: float
    network: float
    tokens: int
    """Tokens of a step, padding included."""

    @property
    def seconds(self) -> float:
        """The shortest time of a step: that of the slowest part."""
        return max(self._parts().values())

    @property
    def longest(self) -> float:
        """The time if nothing overlaps."""
        return sum(self._parts().values())

    @property
    def bound(self) -> str:
        """What limits the step."""
        parts = self._parts()
        return max(parts, key=lambda name: parts[name])

    def _parts(self) -> dict[str, float]:
        return {"arithmetic": self.compute, "memory": self.memory, "network": self.network}

    @property
    def tokens_per_second(self) -> float:
        """At the shortest time."""
        return self.tokens / self.seconds

    @property
    def efficiency(self) -> float:
        """The share of the shortest time in which a chip computes."""
        return self.compute / self.seconds


def estimate(program: Program, config: Config, topology: Topology) -> Estimate:
    """The roofline of a compiled step."""
    chip = topology.chip
    length = config.data.max_length
    assert length != "auto"
    # Each microbatch reads the weights again, those that other chips hold as well.
    shards = config.mesh.fsdp * config.mesh.context
    weights = PASSES * program.weights * shards * config.train.microbatches
    # The temporaries are written and read; the state is read and written.
    moved = weights + 2 * program.temporaries + 2 * (program.trained + program.moments)
    return Estimate(
        compute=program.flops / chip.flops,
        memory=moved / chip.bandwidth,
        network=program.traffic.total / topology.network,
        tokens=config.train.batch_size * length,
    )
