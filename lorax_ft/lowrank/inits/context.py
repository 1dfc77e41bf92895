"""What an init is given, and what it gives back.

Letters: L matrices of the stack, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lorax_ft.lowrank.inits.svd import Factors, svd
from lorax_ft.quant.kernels import Quantized, dense


class InitResult(NamedTuple):
    """Where the adapters of a stack start."""

    factors: Factors
    """A `[L, I, R]` and B `[L, R, O]`, float32."""
    removed: Factors | None = None
    """A₀ and B₀ of the s A₀ B₀ that is subtracted from the base; None leaves the base as it is."""
    explained: Array | None = None
    """What the ranks are chosen by, `[L, R]`; None keeps them."""

    def within_ranks(self, ranks: np.ndarray) -> InitResult:
        """The same, zero beyond each matrix's own rank `[L]`."""
        removed = self.removed
        if removed is not None:
            removed = within_ranks(removed, ranks)
        return InitResult(within_ranks(self.factors, ranks), removed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitContext:
    """A stack of matrices whose adapters are initialized, and what the init declares it needs."""

    kernel: Array | Quantized
    """W `[L, I, O]`. `weight` is the same as an array."""
    rank: int
    """R, the largest rank. A and B are set to zero beyond each matrix's own rank afterwards."""
    ranks: np.ndarray
    """Each matrix's own rank, `[L]`; 0 where it is not adapted."""
    scales: np.ndarray
    """s, `[L]`."""
    keys: Array
    """A random key for each matrix, `[L]`, folded from its path."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The options of AdapterConfig that the init's row lists."""
    statistic: Array | None = None
    """What the init's row says is measured on data: `[L, I, I]` of the inputs, or `[L, I, O]`."""
    quantize: Callable[[Array], Array] | None = None
    """Quantizes W as the base is and dequantizes it again; None: the base is not quantized."""
    rounds: int = 1
    """Rounds of decomposition and quantization (`quant.rounds`)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, I and O."""
        count, rows, columns = self.kernel.shape
        return count, rows, columns

    @property
    def weight(self) -> Array:
        """W `[L, I, O]` as an array."""
        return dense(self.kernel)

    @property
    def measured(self) -> Array:
        """The statistic.

        Raises:
          ValueError: there is none.
        """
        if self.statistic is None:
            raise ValueError("this init needs a statistic; pass statistics=lorax_ft.calibrate(...)")
        return self.statistic

    def part(self, first: int, count: int, *, statistic: Any = None) -> InitContext:
        """Some matrices of the stack, and what was measured for them, `[count, I, I or O]`."""
        if count == len(self.ranks):
            return dataclasses.replace(self, statistic=statistic)

        def some(leaf: Array) -> Array:
            # A slice of constant bounds would be compiled again for each of them.
            return lax.dynamic_slice_in_dim(leaf, first, count)

        rows = slice(first, first + count)
        return dataclasses.replace(
            self,
            kernel=jax.tree.map(some, self.kernel),
            ranks=self.ranks[rows],
            scales=self.scales[rows],
            keys=some(self.keys),
            statistic=statistic,
        )

    @property
    def svd_iterations(self) -> int | None:
        """Power iterations of a randomized SVD, or None for the exact one."""
        return self.options.get("svd_iterations")

    def svd(self, w: Array, *, rank: int | None = None, last: bool = False) -> Factors:
        """U_r √S_r `[L, I, r]` and √S_r V_rᵀ `[L, r, O]` of matrices `[L, I, O]`.

        r is R by default.
        """
        if rank is None:
            rank = self.rank
        return svd(
            w,
            rank=rank,
            iterations=self.svd_iterations,
            keys=self.keys,
            last=last,
        )

    def truncated_svd(self, w: Array, *, last: bool = False) -> Factors:
        """The same, zero beyond each matrix's own rank."""
        return within_ranks(self.svd(w, last=last), self.ranks)

    def divided_by_scale(self, factors: Factors) -> Factors:
        """A / √s and B / √s, so that s A B is the product of the given factors."""
        a, b = factors
        # Matrices that are not adapted have s = 0, and zero factors.
        scales = jnp.asarray(self.scales)
        smallest = jnp.finfo(jnp.float32).tiny
        positive = jnp.maximum(scales, smallest)
        root = jnp.sqrt(positive)[:, None, None]
        return a / root, b / root

    def draw(self, sample: Callable[..., Array], size: int) -> Array:
        """A random factor of every matrix, by its own key."""

        def one(key: Array) -> Array:
            return sample(key, size, rank=self.rank)

        return jax.vmap(one)(self.keys)

    def zeros_a(self) -> Array:
        """A = 0, `[L, I, R]`."""
        count, rows, _ = self.shape
        return jnp.zeros((count, rows, self.rank), jnp.float32)

    def zeros_b(self) -> Array:
        """B = 0, `[L, R, O]`."""
        count, _, columns = self.shape
        return jnp.zeros((count, self.rank, columns), jnp.float32)


def within_ranks(factors: Factors, ranks: np.ndarray) -> Factors:
    """A `[L, I, R]` and B `[L, R, O]`, zero beyond each matrix's own rank `[L]`."""
    a, b = factors
    rank = a.shape[-1]
    used = jnp.arange(rank) < jnp.asarray(ranks)[:, None]  # [L, R]
    a = jnp.where(used[:, None, :], a, 0)
    b = jnp.where(used[:, :, None], b, 0)
    return a, b
