"""How A and B start, for every `adapter.init`: which of the files beside this one is asked, and for what."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where adapters are to start: a stack of matrices, and what is known of each."""

    w: Array | Quantized
    """W `[L, I, O]`; its values are asked for only by inits that start from them."""
    rank: int
    """R, the largest rank: A and B are zero beyond each matrix's own."""
    ranks: np.ndarray
    """`[L]`."""
    scales: np.ndarray
    """s, `[L]`."""
    keys: Array
    """`[L]`."""
    embed: bool = False
    """Whether W is an embedding's table."""
    statistic: Array | None = None
    """What an init from data is given: EVA its A `[L, I, R]`, CorDA Σ xᵀ x / N `[L, I, I]`, LoRA-GA and LoRA-One
    ∂L/∂W `[L, I, O]`."""
    rounds: int = 1
    """Rounds of decomposition and quantizing."""
    rounded: Callable[[Array], Array] | None = None
    """Quantizing and back, where the base is to be quantized once the start is out of it."""

    def own(self, a: Array, b: Array) -> Factors:
        """The factors, with zeros beyond each matrix's own rank."""
        used = jnp.arange(self.rank) < jnp.asarray(self.ranks)[:, None]  # [L, R]
        return jnp.where(used[:, None, :], a, 0), jnp.where(used[:, :, None], b, 0)

    def over_root(self, a: Array, b: Array) -> Factors:
        """A / √s and B / √s."""
        root = jnp.sqrt(jnp.maximum(jnp.asarray(self.scales), jnp.finfo(jnp.float32).tiny))[
            :, None, None
        ]
        return a / root, b / root

    def drawn(self, draw: Callable[..., Array], size: int) -> Array:
        """A random factor of every matrix."""
        return jax.vmap(lambda key: draw(key, size, rank=self.rank))(self.keys)


class Start(NamedTuple):
    """Where a stack of adapters starts."""

    factors: Factors
    """A and B."""
    taken: Factors | None = None
    """A₀ and B₀ of s A₀ B₀, which is taken out of the base; None where nothing is."""


def start(site: Site, config: AdapterConfig) -> Start:
    """A `[L, I, R]` and B `[L, R, O]` of a stack, and what of them is taken out of its base."""
    count, rows, columns = site.w.shape
    if site.embed:
        no_a = jnp.zeros((count, rows, site.rank), jnp.float32)
        return Start(site.own(no_a, site.drawn(initial.embedding, columns)))
    triples = functools.partial(
        svd, rank=site.rank, iterations=config.svd_iterations, keys=site.keys
    )
    if config.init in CHANGES_BASE:
        return _taken_out(site, config, triples)
    return Start(site.own(*_beside(site, config, triples)))


def _beside(site: Site, config: AdapterConfig, triples: Callable[..., Factors]) -> Factors:
    """A and B, by an init that leaves the base as it is."""
    count, rows, columns = site.w.shape
    no_b = jnp.zeros((count, site.rank, columns), jnp.float32)
    match config.init:
        case "gaussian":
            ranks = np.maximum(site.ranks, 1).astype(np.float32)[:, None, None]
            return site.drawn(initial.gaussian, rows) / ranks, no_b
        case "orthogonal":
            one = functools.partial(orthogonal, rows=rows, columns=columns, rank=site.rank)
            return jax.vmap(one)(site.keys, jnp.asarray(site.ranks))
        case "eva":
            assert site.statistic is not None
            return site.statistic, no_b
        case "lora_one":
            assert site.statistic is not None
            return lora_one(site.statistic, gamma=config.lora_one_gamma, svd=triples)
    return site.drawn(initial.kaiming, rows), no_b


def _taken_out(site: Site, config: AdapterConfig, triples: Callable[..., Factors]) -> Start:
    """A and B, by an init whose start is taken out of the base."""

    def decomposed(w: Array, *, last: bool = False) -> Factors:
        return site.own(*triples(w, last=last))

    match config.init:
        case "pissa":
            factors = site.over_root(
                *pissa(dense(site.w), svd=decomposed, rounded=site.rounded, rounds=site.rounds)
            )
        case "milora":
            factors = site.over_root(*milora(dense(site.w), svd=decomposed))
        case "corda":
            assert site.statistic is not None
            last, randomized = (
                config.corda_mode == "kpm",
                None if config.svd_iterations is None else triples,
            )
            found = corda(
                dense(site.w), site.statistic, rank=site.rank, last=last, randomized=randomized
            )
            factors = site.over_root(*found)
        case "lora_ga":
            assert site.statistic is not None
            twice = functools.partial(triples, rank=2 * site.rank)
            gamma = config.lora_ga_gamma
            factors = lora_ga(
                site.statistic, rank=site.rank, ranks=site.ranks, gamma=gamma, svd=twice
            )
        case "loftq":
            if site.rounded is None:
                raise ValueError(
                    "adapter.init is loftq, which starts from what quantizing loses, and a kernel is not quantized; "
                    "set quant.format, leave adapter.keep_base out and target linear layers, not the head"
                )
            fitted = loftq(
                dense(site.w),
                rank=site.rank,
                svd=decomposed,
                rounded=site.rounded,
                rounds=site.rounds,
            )
            return Start(*(site.over_root(*factors) for factors in fitted))
        case _:
            factors = olora(dense(site.w), rank=site.rank)
    factors = site.own(*factors)
    return Start(factors, factors)
