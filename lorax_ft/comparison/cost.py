"""What a method costs: numbers that train, time of a step, memory."""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax

from lorax_ft.sweep.setup import SweepJob
from lorax_ft.sweep.stack import take

TIMED_STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method costs, measured on a run of its own."""

    parameters: int
    """Numbers that train."""
    seconds_per_step: float
    """Median of a few steps."""
    memory: int | None
    """Bytes of the step's arguments and temporaries, by XLA's analysis; None if it has none."""


def measure_cost(job: SweepJob) -> Cost:
    """The parameters, the time of a step and the memory of the only point of a job."""
    # A copy, for a step donates its state.
    state, owned, keys = take((job.state, job.owned, job.keys), [0])
    program = job.compile([0], state, owned)
    seconds = []
    for step in range(TIMED_STEPS + 1):
        batch, _ = job.batch([0], step)
        start = time.perf_counter()
        state, metrics = program.step(state, owned, job.base, batch, keys)
        # A call returns before the device has computed.
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    analysis = program.step.memory_analysis()
    memory = None
    if analysis is not None:
        memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    return Cost(
        parameters=parameters,
        # The first step also fills caches.
        seconds_per_step=statistics.median(seconds[1:]),
        memory=memory,
    )
