"""How A and B start, for every `adapter.init`: which of the files beside this one is asked, and for what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank import initial
from lorax_ft.lowrank.corda import corda
from lorax_ft.lowrank.loftq import loftq
from lorax_ft.lowrank.lora_ga import lora_ga
from lorax_ft.lowrank.lora_one import lora_one
from lorax_ft.lowrank.milora import milora
from lorax_ft.lowrank.olora import olora
from lorax_ft.lowrank.orthogonal import orthogonal
from lorax_ft.lowrank.pissa import pissa
from lorax_ft.lowrank.svd import Factors, svd
from lorax_ft.quant.kernels import Quantized, dense

CHANGES_BASE = frozenset({"pissa", "milora", "olora", "loftq", "corda", "lora_ga"})
"""The inits whose start is taken out of the base."""


class Start(NamedTuple):
    """Where a stack of adapters starts."""

    factors: Factors
    """A and B."""
    taken: Factors | None = None
    """A₀ and B₀ of s A₀ B₀, which is taken out of the base; None where nothing is."""


def start(
    w: Array | Quantized,
    config: AdapterConfig,
    *,
    embed: bool,
    rank: int,
    ranks: np.ndarray,
    scales: np.ndarray,
    keys: Array,
    rounded: Callable[[Array], Array] | None = None,
    rounds: int = 1,
    statistic: Array | None = None,
) -> Start:
    """A `[L, I, R]` and B `[L, R, O]` of a stack `[L, I, O]`, with zeros beyond each matrix's own rank.

    Args:
      w: W; its values are asked for only by inits that start from them.
      config: the init and its options.
      embed: whether W is an embedding's table.
      rank: R.
      ranks: `[L]`.
      scales: s, `[L]`.
      keys: `[L]`.
      rounded: quantising and back, where the base is to be quantised once the start is out of it.
      rounds: of decomposition and quantising.
      statistic: what an init from data is given: EVA its A `[L, I, R]`, CorDA Σ xᵀ x / N `[L, I, I]`, LoRA-GA and
        LoRA-One ∂L/∂W `[L, I, O]`.
    """
    count, rows, columns = w.shape
    root = jnp.sqrt(jnp.maximum(jnp.asarray(scales), jnp.finfo(jnp.float32).tiny))[:, None, None]
    used = jnp.arange(rank) < jnp.asarray(ranks)[:, None]  # [L, R]

    def own(a: Array, b: Array) -> Factors:
        return jnp.where(used[:, None, :], a, 0), jnp.where(used[:, :, None], b, 0)

    def triples(w: Array, count: int = rank, *, last: bool = False) -> Factors:
        return svd(w, rank=count, iterations=config.svd_iterations, keys=keys, last=last)

    def decomposed(w: Array, *, last: bool = False) -> Factors:
        return own(*triples(w, last=last))

    def over_root(a: Array, b: Array) -> Factors:
        return a / root, b / root

    def random(f: Callable[..., Array], size: int) -> Array:
        return jax.vmap(lambda key: f(key, size, rank=rank))(keys)

    no_a, no_b = jnp.zeros((count, rows, rank), jnp.float32), jnp.zeros((count, rank, columns), jnp.float32)
    if embed:
        return Start(own(no_a, random(initial.embedding, columns)))
    match config.init:
        case "kaiming":
            return Start(own(random(initial.kaiming, rows), no_b))
        case "gaussian":
            return Start(
                own(random(initial.gaussian, rows) / np.maximum(ranks, 1).astype(np.float32)[:, None, None], no_b)
            )
        case "orthogonal":
            one = functools.partial(orthogonal, rows=rows, columns=columns, rank=rank)
            return Start(own(*jax.vmap(one)(keys, jnp.asarray(ranks))))
        case "olora":
            factors = own(*olora(dense(w), rank=rank))
            return Start(factors, factors)
        case "pissa":
            factors = over_root(*pissa(dense(w), svd=decomposed, rounded=rounded, rounds=rounds))
            return Start(factors, factors)
        case "milora":
            factors = over_root(*milora(dense(w), svd=decomposed))
            return Start(factors, factors)
        case "loftq":
            if rounded is None:
                raise ValueError(
                    "adapter.init is loftq, which starts from what quantising loses, and a kernel is not quantised; "
                    "set quant.format, leave adapter.keep_base out and target linear layers, not the head"
                )
            last, before = loftq(dense(w), rank=rank, svd=decomposed, rounded=rounded, rounds=rounds)
            return Start(over_root(*last), over_root(*before))
        case "eva":
            assert statistic is not None
            return Start(own(statistic, no_b))
        case "corda" | "lora_ga" | "lora_one":
            assert statistic is not None
            factors = own(*_from_data(w, statistic, config, rank=rank, ranks=ranks, root=root, svd=triples))
            return Start(factors, factors if config.init in CHANGES_BASE else None)


def _from_data(
    w: Array | Quantized,
    statistic: Array,
    config: AdapterConfig,
    *,
    rank: int,
    ranks: np.ndarray,
    root: Array,
    svd: Callable[..., Factors],
) -> Factors:
    """A and B, by the inits that are given a statistic of the data."""
    match config.init:
        case "corda":
            last, exact = config.corda_mode == "kpm", config.svd_iterations is None
            a, b = corda(dense(w), statistic, rank=rank, last=last, exact=exact)
            return a / root, b / root
        case "lora_ga":
            twice = functools.partial(svd, count=2 * rank)
            return lora_ga(statistic, rank=rank, ranks=ranks, gamma=config.lora_ga_gamma, svd=twice)
    return lora_one(statistic, gamma=config.lora_one_gamma, svd=svd)
