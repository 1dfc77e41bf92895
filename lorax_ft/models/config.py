"""The config of a decoder. This module imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lorax_ft.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttention:
    """The sizes of gated linear attention (2412.06464)."""

    # Each key head serves value_heads / key_heads value heads.
    key_heads: int
    value_heads: int
    # The channels of a head.
    key_dim: int
    value_dim: int
    # How many tokens the convolution before it sees, the present one included.
    conv_width: int

    @property
    def mixed(self) -> int:
        """The channels of all queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The sizes of attention's keys and values."""

    # The number of key/value heads.
    count: int
    # The channels of a head, of queries too.
    dim: int
    # Whether the values are the keys before norm and rotation, so that there is no v_proj.
    keys_are_values: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerType:
    """In what the layers of one decoder may differ."""

    # None: the layer does not encode positions.
    rope: Rope | None
    # How many tokens a token sees, itself included. None: all tokens before it.
    window: int | None = None
    # What the layer has in place of attention. None: it has attention.
    linear: LinearAttention | None = None
    # Where the layer's keys and values differ from the config's. None: they do not.
    heads: Heads | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A sparse MLP (2101.03961)."""

    count: int
    # The number of experts for each token.
    top_k: int
    # Whether the weights of a token's experts are divided by their sum.
    renormalized: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedGate:
    """An MLP whose hidden activations are (up + 1) · gate · σ(α · gate)."""

    # The α of the sigmoid.
    alpha: float
    # Gates are at most this, and ups within plus and minus this.
    limit: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder, the choices of its family, and how to compute it."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    # One for each layer, or one for all.
    layer_types: tuple[LayerType, ...]
    # Whether the output head is the embedding table.
    tied: bool
    max_positions: int
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    # None: the MLP's hidden activations are act(gate) · up.
    clamped_gate: ClampedGate | None = None
    # Whether norms are at the input of attention and MLP, at their output, or at both.
    norms: Literal["before", "after", "around"] = "before"
    # Added to the scale of every norm.
    norm_offset: float = 0.0
    # Whether queries and keys are normalized, and if so each head by itself or all heads together.
    qk_norm: Literal["none", "head", "whole"] = "none"
    # Whether each value head is normalized, without a scale.
    value_norm: bool = False
    # Whether a learned number multiplies the output of each layer.
    layer_scalar: bool = False
    # The names of the projections that have a bias.
    biases: frozenset[str] = frozenset()
    # Whether q, k and v are one projection, and gate and up another.
    fused: bool = False
    # None: the MLP is dense.
    experts: Experts | None = None
    embedding_scale: float = 1.0
    # Whether q_proj also projects to a gate for each channel of attention's output.
    attention_gate: bool = False
    # Multiplies the product of queries and keys. None: 1 / √head_dim.
    attention_scale: float | None = None
    # The c of c · tanh(x / c), on attention scores before the mask.
    attention_softcap: float | None = None
    # The same on the logits.
    logit_softcap: float | None = None
    # Whether each head has a learned score without a value, which takes part in every softmax.
    sinks: bool = False
    # The dtype of the activations.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The implementation of attention.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    # How experts multiply: all of them every token (dense), or sorted tokens, in blocks of rows or
    # by XLA's ragged product.
    expert_products: Literal["auto", "dense", "blocks", "ragged"] = "auto"
    # What the backward pass recomputes: nothing (none), what needs no product with a kernel
    # (products), all but the MLP's gate and up (mlp), or everything (full).
    remat: Literal["none", "products", "mlp", "full"] = "full"

    @property
    def each_layer(self) -> tuple[LayerType, ...]:
        """The type of each layer."""
        if len(self.layer_types) == 1:
            return self.layer_types * self.layers
        return self.layer_types

    @property
    def attention_types(self) -> tuple[LayerType, ...]:
        """The distinct types of the layers that have attention."""
        attending = [layer_type for layer_type in self.each_layer if layer_type.linear is None]
        return tuple(dict.fromkeys(attending))

    def heads_of(self, layer_type: LayerType) -> Heads:
        """The sizes of a layer's keys and values."""
        return layer_type.heads or Heads(count=self.kv_heads, dim=self.head_dim)

    @property
    def period(self) -> int:
        """After how many layers the kinds of parameters that layers have repeat."""
        kinds = [(layer.linear, layer.heads) for layer in self.each_layer]
        for period in range(1, self.layers):
            if self.layers % period == 0 and kinds == kinds[:period] * (self.layers // period):
                return period
        return self.layers
