"""One decoder in plain linen for all families. Its layers are stacked, scanned and rematerialized.

A step of the scan computes one layer or, where layers with other kinds of parameters alternate, one
period of P layers: `layers/2_of_4` stacks the third of every four layers.

Shapes: B batch, T tokens, D width, L layers, N distinct layer types. Kernels are
`[L / P, in, out]`. Modules have the names of Hugging Face's checkpoints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lorax_ft.constraints import split_embedded, split_tokens
from lorax_ft.models import layer_cache
from lorax_ft.models.attention import Attention, RopeAndMask, make_rope_and_mask
from lorax_ft.models.cache import Cache, slots_of
from lorax_ft.models.config import DecoderConfig, LayerType
from lorax_ft.models.linear_attention import GatedDeltaNet, Rows, make_rows
from lorax_ft.models.mlp import MLP, ROUTER, MoE
from lorax_ft.models.parts import RMSNorm, norm
from lorax_ft.soft_prompts.door import VirtualTokens
from lorax_ft.tree import member

SAVED_NAMES: dict[str, tuple[str, ...]] = {
    "full": (),
    "mlp": ("mlp",),
    # No product with a kernel is computed again. "adapter" is what a term's gradient needs of one.
    "products": ("mlp", "qkv", "attended", "residual", "adapter"),
}
"""The named values of a layer that each kind of rematerialization saves."""


def saved_per_token(
    config: DecoderConfig,
    remat: str,
    expert_devices: int = 1,
    *,
    scaled: bool = False,
) -> int:
    """The numbers that a kind of rematerialization saves of each token, in all layers.

    Args:
      config: the decoder's.
      remat: the kind.
      expert_devices: how many devices the experts are split over. Each has room for all copies of
        all their tokens that may choose its experts.
      scaled: whether adapters scale the outputs of projections, as DoRA's magnitudes do, whose
        gradients need the outputs before it; those of all projections are counted.
    """
    total = 0
    for layer_type in config.each_layer:
        copies = 1
        if config.experts:
            copies = min(config.experts.top_k * expert_devices, config.experts.count)
        widths = {"mlp": 2 * copies * config.mlp_width, "residual": config.width}
        if not layer_type.linear:
            heads = config.heads_of(layer_type)
            widths["attended"] = config.heads * heads.dim
            widths["qkv"] = (config.heads + 2 * heads.count) * heads.dim
        if scaled:
            outputs_of_mlp = widths["mlp"] + copies * config.width
            widths["adapter"] = widths.get("qkv", 0) + config.width + outputs_of_mlp
        for name in SAVED_NAMES[remat]:
            total += widths.get(name, 0)
    return total


class Shared(NamedTuple):
    """What all layers share."""

    # Of all N layer types.
    rope_and_mask: RopeAndMask
    # [B, T]
    positions: Array
    # [B, T], of the virtual tokens of a soft prompt; below 0 at all other tokens.
    virtual: Array
    rows: Rows
    # [B, T], the tokens that the router's loss counts.
    counted: Array | None


class Step(NamedTuple):
    """What differs between the steps of the scan."""

    # Its number, and that of its layer in the cache.
    number: Array
    # An index into the N layer types; of a period, one for each of its layers `[P]`.
    layer_type: Array


class Carry(NamedTuple):
    """What a layer gives to the next."""

    # [B, T, D]
    x: Array
    # Of all layers.
    cache: Cache | None


class Block(nn.Module):
    """One layer: attention and MLP with residual connections, and the norms of its family."""

    config: DecoderConfig
    # Its parameters depend on it. What else layers of one scan differ in, `Step` says.
    layer_type: LayerType

    @nn.compact
    def __call__(self, carry: Carry, shared: Shared, step: Step) -> tuple[Carry, None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache with the layer's tokens."""
        c = self.config
        x, cache = carry
        norm_before = c.norms in ("before", "around")
        norm_after = c.norms in ("after", "around")

        x = split_tokens(x)
        y = x
        if norm_before:
            y = norm(c, "input_layernorm")(y)
        linear = self.layer_type.linear
        if linear:
            state = None if cache is None else layer_cache.read(cache, step.number)
            y, state = GatedDeltaNet(c, linear, name="linear_attn")(y, shared.rows, state)
            if cache is not None and state is not None:
                cache = layer_cache.written(cache, state, step.number)
        else:
            rope_and_mask = _of_type(shared.rope_and_mask, step.layer_type)
            attention = Attention(c, c.heads_of(self.layer_type), name="self_attn")
            y, cache = attention(
                y, rope_and_mask, shared.positions, shared.virtual, step.number, cache
            )
        if norm_after:
            y = norm(c, "post_attention_layernorm")(y)
        x = checkpoint_name(x + y, "residual")

        y = x
        if c.norms == "before":
            # Checkpoints of these families name the MLP's input norm after the attention before it.
            y = norm(c, "post_attention_layernorm")(y)
        elif c.norms == "around":
            y = norm(c, "pre_feedforward_layernorm")(y)
        y = MoE(c, name="mlp")(y, shared.counted) if c.experts else MLP(c, name="mlp")(y)
        if norm_after:
            y = norm(c, "post_feedforward_layernorm")(y)
        x = x + y
        if c.layer_scalar:
            scalar = self.param("layer_scalar", nn.initializers.ones, (1,))
            x = x * scalar.astype(x.dtype)
        return Carry(x, cache), None


def _of_type(rope_and_mask: RopeAndMask, type_index: Array) -> RopeAndMask:
    """One type's cosines, sines and mask, without the axis N."""

    def select(stacked: Array) -> Array:
        if len(stacked) == 1:  # all types share it: no gather
            return stacked[0]
        return stacked[type_index]

    return jax.tree.map(select, rope_and_mask)


class Period(nn.Module):
    """Successive layers, of which some have other kinds of parameters."""

    config: DecoderConfig
    # The module of a layer.
    block: Any

    @nn.compact
    def __call__(self, carry: Carry, shared: Shared, step: Step) -> tuple[Carry, None]:
        """As `Block`, with types `[P]`, and the cache of each place by its name."""
        c = self.config
        x, cache = carry
        caches = {}
        for place, layer_type in enumerate(c.each_layer[: c.period]):
            name = member(place, c.period)
            block = self.block(c, layer_type, name=name)
            own = Carry(x, cache and cache[name])
            (x, caches[name]), _ = block(own, shared, Step(step.number, step.layer_type[place]))
        return Carry(x, caches if cache else None), None


def scan_step(config: DecoderConfig, *, recompute: bool = False) -> tuple[Any, tuple[Any, ...]]:
    """The module of a step of the scan, a block or a period of blocks, and its fields.

    With `recompute`, the backward pass computes again what the config's remat names.
    """
    block: Any = Block
    if recompute and config.remat != "none":
        names = SAVED_NAMES[config.remat]
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        # XLA does not look for common subexpressions across a scan's forward and backward loop.
        block = nn.remat(Block, prevent_cse=False, policy=policy)
    if config.period > 1:
        return Period, (config, block)
    return block, (config, config.each_layer[0])


def _scanned_layers(config: DecoderConfig, *, recompute: bool) -> Any:
    """The submodule `layers`: all blocks, or periods of blocks, as one scan."""
    body, fields = scan_step(config, recompute=recompute)
    scanned = nn.scan(
        body,
        variable_axes={"params": 0, ROUTER: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=config.layers // config.period,
    )
    return scanned(*fields, name="layers")


class Entry(NamedTuple):
    """What the layers are given."""

    # [B, T, D]
    x: Array
    shared: Shared
    # Of all steps of the scan: numbers [L / P], and types [L] or [L / P, P].
    steps: Step


class Decoder(nn.Module):
    """Tokens to features. `Model.head` is applied outside, so that a loss can chunk it."""

    config: DecoderConfig

    def setup(self) -> None:
        """The submodules outside of the layers, which `enter` and `leave` use."""
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.width, dtype=c.dtype)
        self.soft_prompt = VirtualTokens()
        self.norm = RMSNorm(c.norm_eps, c.norm_offset)

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
        counts: Array | None = None,
        counted: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Features `[B, T, D]` before the head, and the cache with the tokens written to it.

        Args:
          tokens: `[B, T]`; ids from the vocabulary's size on are virtual tokens, see
            `lorax_ft.soft_prompts`.
          positions: `[B, T]`, from 0; None: 0 to T − 1. With a cache, the slots to write.
          segment_ids: `[B, T]`; a token sees only its segment. None: one segment for each row.
          noise: `[B, T, D]`, added to the embeddings.
          cache: as `empty_cache` makes it; None: no cache. All rows share a cache of one row.
          length: `[B]`, the length that each text may grow to; None: its present length.
          counts: `[B]`, the tokens of each row before its padding, which the states of linear
            attention leave out; None: all.
          counted: `[B, T]`, the tokens whose use of experts goes into the collection `ROUTER`, if
            that is mutable; None: it is not needed.
        """
        x, shared, steps = self.enter(
            tokens,
            positions,
            segment_ids,
            noise=noise,
            cache=cache,
            length=length,
            counts=counts,
            counted=counted,
        )
        layers = _scanned_layers(self.config, recompute=cache is None)
        (x, cache), _ = layers(Carry(x, cache), shared, steps)
        return self.leave(x), cache

    def enter(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        noise: Array | None = None,
        cache: Cache | None = None,
        length: Array | None = None,
        counts: Array | None = None,
        counted: Array | None = None,
    ) -> Entry:
        """What the layers are given. The arguments are those of `__call__`."""
        c = self.config
        if positions is None:
            places = jnp.arange(tokens.shape[1])
            positions = jnp.broadcast_to(places, tokens.shape)
        slots = None
        if cache:
            slots = slots_of(cache)
        rope_and_mask, type_indices = make_rope_and_mask(
            c, positions, segment_ids, slots=slots, length=length
        )
        if c.period > 1:
            type_indices = type_indices.reshape(-1, c.period)
        rows = make_rows(segment_ids, counts)
        virtual = tokens - c.vocab_size
        shared = Shared(rope_and_mask, positions, virtual, rows, counted)

        # Virtual tokens have no row in the table; a soft prompt gives them one, or keys and values.
        x = split_embedded(self.embed_tokens(jnp.minimum(tokens, c.vocab_size - 1)))
        if noise is not None:
            x = x + noise.astype(x.dtype)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        (x,) = self.soft_prompt(virtual, x)
        steps = Step(jnp.arange(len(type_indices)), type_indices)
        return Entry(x, shared, steps)

    def leave(self, x: Array) -> Array:
        """Features `[B, T, D]` of what the last layer gives."""
        return split_tokens(self.norm(x))
