"""One decoder in plain linen for all families: its layers stacked, scanned and recomputed.

Shapes: B batch, T tokens, S slots of the cache, D width, K key/value heads, C channels of a head, L layers,
N distinct kinds of layers. Kernels are `[L, in, out]`; modules have the names of Hugging Face's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from lorax_ft.models.attention import Attention, Cache, Surroundings, surroundings
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.mlp import MLP, SparseMLP
from lorax_ft.models.parts import norm
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import first_match

Axis = str | tuple[str, ...] | None
ROW_AXES = ("data", "fsdp")  # the mesh axes that rows are split over

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names("mlp"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """One layer: attention and MLP, each beside a residual path, with norms where the family has them."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, around: Surroundings, positions: Array, kind: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        """`[B, T, D]` to `[B, T, D]`; positions `[B, T]`, `kind` the layer's index into `around`'s axis N."""
        c = self.config
        before, after = c.norms != "after", c.norms != "before"
        around = jax.tree.map(lambda y: y[kind if len(y) > 1 else 0], around)
        x = split_rows(x)
        y = norm(c, "input_layernorm")(x) if before else x
        y, cache = Attention(c, name="self_attn")(y, around, positions, cache)
        x = x + (norm(c, "post_attention_layernorm")(y) if after else y)
        names = {"before": "post_attention_layernorm", "around": "pre_feedforward_layernorm"}
        y = norm(c, names[c.norms])(x) if before else x
        y = SparseMLP(c, name="mlp")(y) if c.experts else MLP(c, name="mlp")(y)
        return x + (norm(c, "post_feedforward_layernorm")(y) if after else y), cache


class Decoder(nn.Module):
    """Tokens to features. The head is applied outside (`Model.head`), so that a loss can take it in chunks."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        noise: Array | None = None,
        cache: Cache | None = None,
        length: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Features `[B, T, D]` before the head, and the cache with the tokens written to it.

        Args:
          tokens: `[B, T]`.
          positions: `[B, T]`, counted from 0; None counts along T. With a cache, the slots to write.
          segment_ids: `[B, T]`; a token sees its own segment only. None: one segment a row.
          noise: `[B, T, D]`, added to the embeddings.
          cache: keys and values `[L, B, S, K, C]` (`empty_cache`); None computes without one.
          length: `[B]`, what each text may grow to; None: as long as it is.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        around, kinds = surroundings(
            c, positions, segment_ids, slots=cache["k"].shape[2] if cache else None, length=length
        )
        x = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, name="embed_tokens")(tokens)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        block: Any = Block
        if c.remat != "none" and cache is None:
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0),
            length=c.layers,
        )
        x, cache = layers(c, name="layers")(x, around, positions, kinds, cache)
        return split_rows(norm(c, "norm")(x)), cache


def split_rows(x: Array) -> Array:
    """x `[B, ...]` with its rows split over the ambient mesh (`jax.set_mesh`), if there is one that divides them.

    Without it XLA may leave the width split, as the embedding table is, and gather the whole batch on every device.
    """
    axes = tuple(axis for axis in ROW_AXES if axis in jax.sharding.get_abstract_mesh().shape)
    if not axes or x.shape[0] % row_devices():
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(axes))


def row_devices() -> int:
    """Over how many devices of the ambient mesh (`jax.set_mesh`) the rows of a batch are split; 1 without one."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in ROW_AXES)


def gathered(path: str, kernel: Quantized) -> Quantized:
    """A layer's quantised kernel, whole over the ambient mesh's fsdp axis, and split over tensor as the rules say.

    It is dequantised after that, so that codes travel between devices and not the values: a quarter of the bytes.
    Without it XLA dequantises first.

    Args:
      path: the module's, such as `layers/mlp/up_proj`.
      kernel: as the layer sees it, without the axis of layers.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = first_match(SHARDING_RULES, f"{path}/kernel")
    if sizes.get("fsdp", 1) == 1 or axes is None:
        return kernel
    _, *own = (None if axis == "fsdp" else axis for axis in axes)
    places = kernel.axes(tuple(own), sizes)

    def constrained(part: Array, axes: tuple[Axis, ...]) -> Array:
        return lax.with_sharding_constraint(part, fitted(axes, part.shape, sizes))

    return jax.tree.map(constrained, kernel, places)


def fitted(axes: tuple[Axis, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The mesh axes of an array's axes, without those that do not divide them."""

    def fits(axis: Axis, size: int) -> bool:
        names = axis if isinstance(axis, tuple) else (axis,)
        return axis is not None and size % math.prod(sizes[name] for name in names if name) == 0

    return PartitionSpec(*(axis if fits(axis, size) else None for axis, size in zip(axes, shape, strict=True)))


QUANTIZABLE = r"layers/.*_proj/kernel"
"""The leaves that a quantised base has in fewer bits: all linear layers but the head and the routers."""

# Which axes of a leaf the mesh splits, by slash path; the first match wins and every leaf must have one.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/.*/experts/(gate|up)_proj/kernel", (None, None, "fsdp", "tensor")),
    (r"layers/.*/experts/down_proj/kernel", (None, None, "tensor", "fsdp")),
    (r"layers/.*/(q|k|v|qkv|gate|up|gate_up)_proj/kernel", (None, "fsdp", "tensor")),
    (r"layers/.*/(q|k|v|qkv|gate|up|gate_up)_proj/bias", (None, "tensor")),
    (r"layers/.*/(o|down)_proj/kernel", (None, "tensor", "fsdp")),
    (r"layers/.*/(o|down)_proj/bias", ()),
    (r"layers/mlp/gate/kernel", ()),
    (r"(.*/)?\w*norm/scale", ()),
)
