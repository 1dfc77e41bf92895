"""Where the factors of all modules start, found a few matrices of a stack at a time.

An init needs a matrix in float32 or float64, its decomposition, and maybe a statistic of its size.
Only the matrices at work have these; the factors that stay are small. Letters: L matrices of a
stack, I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.inits import (
    Init,
    InitResult,
    find_init,
    init_options,
    initialize_embedding,
)
from lorax_ft.lowrank.inits.context import InitContext
from lorax_ft.lowrank.inits.svd import at_once
from lorax_ft.lowrank.keys import matrix_keys
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.requantize import Original, read_matrix, requantizer
from lorax_ft.lowrank.statistics import Measured
from lorax_ft.quant.kernels import Quantized, matrices
from lorax_ft.schema import init_schema
from lorax_ft.tree import Shape


class Stack(NamedTuple):
    """The matrices of a module, and how their factors start."""

    context: InitContext
    """Of all of them; without a statistic."""
    init: Init
    reads: bool
    """Whether the init reads W."""
    shape: Shape
    """The axes of the stack, `[*L]`."""
    original: Original | None = None
    """Reads W where the kernel is quantized and the init changes it."""


def stack_of(
    kernel: Array | Quantized,
    plan: Plan,
    init: Init | None,
    original: Original | None,
    *,
    key: Array,
    rounds: int,
) -> Stack:
    """The matrices of a module whose factors are to start.

    Args:
      kernel: the module's, in its own order of axes.
      plan: the module's.
      init: a custom one; None: that of the config.
      original: reads W where the kernel is quantized and the init changes it.
      key: every matrix's randomness is folded from it and the matrix's path.
      rounds: of decomposition and quantization.
    """
    spec, config = plan.spec, plan.config
    stack, rows, _ = spec.sizes(kernel.shape)
    canonical = spec.canonical("kernel", kernel)
    context = InitContext(
        kernel=matrices(canonical, stack=len(plan.paths), rows=rows),
        rank=plan.width,
        ranks=plan.ranks.reshape(-1),
        scales=plan.scales.reshape(-1),
        keys=matrix_keys(key, plan.paths),
        options=init_options(config.init, config),
        rounds=rounds,
    )
    row = init_schema(config.init)
    reads = row.changes_base or row.reads_base or init is not None
    if spec.module == "embed" and (init is not None or not row.adapts_embeddings):
        init, reads = initialize_embedding, False
    return Stack(context, init or find_init(config.init), reads, stack, original)


def find_starts(
    stacks: Mapping[str, Stack],
    statistics: Iterable[Measured],
    *,
    measured: Collection[str],
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, InitResult]:
    """What the inits of all stacks return, by module path.

    Args:
      stacks: by module path.
      statistics: the statistics of the matrices of `measured`, each of which is used before the
        next is taken.
      measured: the modules whose inits use a statistic.
      advance: called with a share of the work whenever it is done; the shares make up 1.
    """
    parts: dict[str, dict[int, InitResult]] = {path: {} for path in stacks}
    total = sum(len(stack.context.ranks) for stack in stacks.values())
    for path, stack in stacks.items():
        if path in measured:
            continue
        count, rows, columns = stack.context.shape
        step = at_once(rows, columns) if stack.reads else count
        for first in range(0, count, step):
            taken = min(step, count - first)
            parts[path][first] = _start(stack, first, taken)
            advance(taken / total)
    for path, i, statistic in statistics:
        parts[path][i] = _start(stacks[path], i, 1, statistic=jnp.asarray(statistic)[None])
        advance(1 / total)
    return {path: _joined(of_path) for path, of_path in parts.items()}


def _start(stack: Stack, first: int, count: int, *, statistic: Any = None) -> InitResult:
    """What the init returns for some matrices of a stack."""
    context = stack.context.part(first, count, statistic=statistic)
    kernel = context.kernel
    if stack.original is not None and isinstance(kernel, Quantized):
        _, rows, columns = kernel.shape
        places = range(first, first + count)
        originals = [read_matrix(stack.original, stack.shape, i) for i in places]
        w = jnp.stack(originals).reshape(count, rows, columns)
        context = dataclasses.replace(context, kernel=w, quantize=requantizer(kernel))
    # Dispatch is asynchronous: without this wait many matrices would be in memory at once.
    return jax.block_until_ready(stack.init(context))


def _joined(parts: Mapping[int, InitResult]) -> InitResult:
    """The results of a whole stack, from those that begin at some of its matrices."""
    in_order = [parts[first] for first in sorted(parts)]
    if len(in_order) == 1:
        return in_order[0]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *in_order)
