"""A decoder of the Llama architecture in plain linen: its layers stacked, scanned and recomputed.

Shapes: B batch, T tokens, S slots of the cache, D width, F mlp width, H heads, K key/value heads,
C channels of a head, V vocabulary, L layers. Kernels are `[L, in, out]`; modules have the names of
Hugging Face's checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

Cache = dict[str, Array]
ROW_AXES = ("data", "fsdp")  # the mesh axes that rows are split over

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names("mlp"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder and how it is computed."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    tied: bool
    """Whether the output head is the embedding table."""
    max_positions: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: Literal["none", "dots", "mlp", "full"] = "full"


def rows_dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`lax.dot_general` of `[..., I]` and `[I, O]` with the leading axes as rows of one matrix: faster on CPUs."""
    rows = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def rotary(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines `[B, T, 1, C/2]` of the rotary embedding (2104.09864) at positions `[B, T]`, in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Queries or keys `[B, T, H, C]`, rotated in half-split order."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, in float32 (1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        full = x.astype(jnp.float32)
        full = full * lax.rsqrt(jnp.mean(full**2, axis=-1, keepdims=True) + self.eps)
        return full.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (2305.13245)."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, cos: Array, sin: Array, mask: Array | None, positions: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        """`[B, T, D]` to `[B, T, D]`; cos and sin `[B, T, 1, C/2]`, mask `[B, 1, T, S]`, positions `[B, T]`."""
        c = self.config
        q = _dense(c, c.heads * c.head_dim, "q_proj")(x)
        k = _dense(c, c.kv_heads * c.head_dim, "k_proj")(x)
        v = _dense(c, c.kv_heads * c.head_dim, "v_proj")(x)
        q = rotate(q.reshape(*q.shape[:2], c.heads, c.head_dim), cos, sin)
        k = rotate(k.reshape(*k.shape[:2], c.kv_heads, c.head_dim), cos, sin)
        v = v.reshape(*v.shape[:2], c.kv_heads, c.head_dim)
        if cache is not None:
            cache = {"k": _write(cache["k"], k, positions), "v": _write(cache["v"], v, positions)}
            k, v = cache["k"], cache["v"]
        y = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=cache is None, implementation=_attention_implementation(c)
        )
        return _dense(c, c.width, "o_proj")(y.reshape(*y.shape[:2], -1)), cache


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        c = self.config
        gate = checkpoint_name(_dense(c, c.mlp_width, "gate_proj")(x), "mlp")
        up = checkpoint_name(_dense(c, c.mlp_width, "up_proj")(x), "mlp")
        gated = nn.silu(gate) * up
        return _dense(c, c.width, "down_proj")(gated)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual path."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, cos: Array, sin: Array, mask: Array | None, positions: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        """`[B, T, D]` to `[B, T, D]`; cos and sin `[B, T, 1, C/2]`, mask `[B, 1, T, S]`, positions `[B, T]`."""
        c = self.config
        x = split_rows(x)
        y, cache = Attention(c, name="self_attn")(
            RMSNorm(c.norm_eps, name="input_layernorm")(x), cos, sin, mask, positions, cache
        )
        x = x + y
        return x + MLP(c, name="mlp")(RMSNorm(c.norm_eps, name="post_attention_layernorm")(x)), cache


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
    ) -> tuple[Array, Cache | None]:
        """Features `[B, T, D]` before the head, and the cache with the tokens written to it.

        Args:
          tokens: `[B, T]`.
          positions: `[B, T]`, counted from 0; None counts along T. With a cache, the slots to write.
          segment_ids: `[B, T]`; a token sees its own segment only. None: one segment a row.
          noise: `[B, T, D]`, added to the embeddings.
          cache: keys and values `[L, B, S, K, C]` (`empty_cache`); None computes without one.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = None
        if cache is not None:
            mask = (jnp.arange(cache["k"].shape[2]) <= positions[..., None])[:, None]  # [B, 1, T, S]
        elif segment_ids is not None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]  # [B, 1, T, T]
        x = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, name="embed_tokens")(tokens)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        cos, sin = rotary(positions, c.head_dim, c.rope_theta)
        block: Any = Block
        if c.remat != "none" and cache is None:
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.layers,
        )
        x, cache = layers(c, name="layers")(x, cos, sin, mask, positions, cache)
        return split_rows(RMSNorm(c.norm_eps, name="norm")(x)), cache


def split_rows(x: Array) -> Array:
    """x `[B, ...]` with its rows split over the ambient mesh (`jax.set_mesh`), if there is one that divides them.

    Without it XLA may leave the width split, as the embedding table is, and gather the whole batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ROW_AXES if axis in mesh.shape)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(axes))


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """Keys and values `[L, B, S, K, C]` of nothing yet."""
    shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}


# Which axes of a leaf the mesh splits, by slash path; the first match wins and every leaf must have one.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/.*/(q|k|v|gate|up)_proj/kernel", (None, "fsdp", "tensor")),
    (r"layers/.*/(o|down)_proj/kernel", (None, "tensor", "fsdp")),
    (r"(.*/)?\w*norm/scale", ()),
)


def _dense(config: DecoderConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=config.dtype, dot_general=rows_dot_general, name=name)


def _write(cache: Array, new: Array, positions: Array) -> Array:
    """The cache `[B, S, K, C]` with `new` `[B, T, K, C]` in the slots from each row's first position on."""
    return jax.vmap(lambda row, part, start: lax.dynamic_update_slice_in_dim(row, part, start, axis=0))(
        cache, new, positions[:, 0]
    )


def _attention_implementation(config: DecoderConfig) -> Literal["xla", "cudnn"]:
    if config.attention != "auto":
        return config.attention
    return "cudnn" if jax.default_backend() == "gpu" and config.dtype == "bfloat16" else "xla"
