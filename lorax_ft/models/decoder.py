"""One decoder in plain linen for all families: its layers stacked, scanned and recomputed.

Shapes: B batch, T tokens, S slots of the cache, D width, K key/value heads, C channels of a head, L layers,
N distinct kinds of layers. Kernels are `[L, in, out]`; modules have the names of Hugging Face's checkpoints.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.models.attention import Attention, Cache, RopeAndMask, rope_and_mask
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.mlp import MLP, MoE
from lorax_ft.models.parts import norm
from lorax_ft.sharding import split_rows

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
        self, x: Array, around: RopeAndMask, positions: Array, kind: Array, cache: Cache | None
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
        y = MoE(c, name="mlp")(y) if c.experts else MLP(c, name="mlp")(y)
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
        around, kinds = rope_and_mask(
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
