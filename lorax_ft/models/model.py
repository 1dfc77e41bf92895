"""A decoder's functions, apart from any parameters; and a model as it was loaded, with them.

Letters: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.activation import INVOCATION, active_rows, with_rows
from lorax_ft.lowrank.intercept import adapt
from lorax_ft.lowrank.layout import TracedLayout, layout
from lorax_ft.lowrank.linear import linear
from lorax_ft.lowrank.requantize import Original
from lorax_ft.lowrank.shared import shared_leaves, with_shared
from lorax_ft.lowrank.spec import LayerSpec, with_kernel
from lorax_ft.lowrank.terms import check_layer, is_adapted, magnitude, tokens
from lorax_ft.models.cache import Cache
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.decoder import Carry, Decoder, Entry, scan_step
from lorax_ft.models.mlp import ROUTER, Usage
from lorax_ft.models.parts import rows_dot_general, softcap
from lorax_ft.quant.kernels import Format, Quantized
from lorax_ft.sharding import gathered
from lorax_ft.soft_prompts.encoder import encoded
from lorax_ft.tree import Layer, Tree, join

TABLE, LAYERS, HEAD = "embed_tokens", "layers", "lm_head"
WITHOUT_START = "start_taken_out"
"""The field of config.json that marks a base from which an adapter's start was subtracted."""
PART_OF = "text_part_of"
"""The field of `Model.hf_config` with the architecture of the checkpoint that holds more than the
decoder, such as a vision tower; it is in no file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM:
    """The functions of a decoder. They see adapters in whatever parameters they are given."""

    config: DecoderConfig

    @functools.cached_property
    def module(self) -> Decoder:
        """The linen module."""
        return Decoder(self.config)

    @property
    def layout(self) -> TracedLayout:
        """The layers that can be adapted, by slash path (see `lorax_ft.layout`)."""
        return decoder_layout(self.config)

    def features(
        self,
        params: Tree,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        noise: Array | None = None,
        cache: Cache | None = None,
        length: Array | None = None,
        counts: Array | None = None,
        active: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Features `[B, T, D]` before the head, and the cache.

        The other arguments are those of `Decoder.__call__`. `active` are the tokens `[B, T]` in
        which an activated LoRA acts; None: those that `active_tokens` finds.
        """
        if active is None:
            active = self.active_tokens(params, tokens, segment_ids)
        apply = adapt(self.module.apply, gather=gathered)
        variables = {"params": _of_batch(params, active)}
        return apply(
            variables,
            tokens,
            positions,
            segment_ids,
            noise=noise,
            cache=cache,
            length=length,
            counts=counts,
        )

    def features_and_usage(
        self,
        params: Tree,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        noise: Array | None = None,
        counted: Array,
        active: Array | None = None,
    ) -> tuple[Array, list[Usage]]:
        """Features `[B, T, D]`, and how the tokens `counted` use the experts of the layers.

        The arguments are those of `features`. Layers that are scanned share a `Usage`.
        """
        if active is None:
            active = self.active_tokens(params, tokens, segment_ids)
        apply = functools.partial(self.module.apply, mutable=[ROUTER])
        (features, _), sown = adapt(apply, gather=gathered)(
            {"params": _of_batch(params, active)},
            tokens,
            positions,
            segment_ids,
            noise=noise,
            counted=counted,
        )
        return features, jax.tree.leaves(sown, is_leaf=lambda node: isinstance(node, Usage))

    def active_tokens(self, params: Tree, tokens: Array, segment_ids: Array | None) -> Array | None:
        """Whether an activated LoRA acts in each token, `[B, T]`; None: LoRA acts in all."""
        if INVOCATION not in params:
            return None
        return active_rows(tokens, params[INVOCATION], segment_ids)

    def enter(self, params: Tree, *args: Any) -> Entry:
        """What the first layer is given. The arguments are those of `Decoder.enter`.

        With `step` and `leave` it computes `features` one step of the scan at a time, for what must
        not be held of all layers at once.
        """
        apply = adapt(self.module.apply, gather=gathered)
        return apply({"params": encoded(params)}, *args, method="enter")

    def step(self, params: Tree, i: Array, entry: Entry) -> Array:
        """`[B, T, D]` behind step `i` of the scan, with `entry.x` before it.

        Its modules have the paths of the decoder's without "layers/".
        """
        module, fields = scan_step(self.config)

        def own(leaf: Array) -> Array:
            return lax.dynamic_index_in_dim(leaf, i, keepdims=False)

        def gather(path: str, kernel: Quantized) -> Quantized:
            return gathered(join(LAYERS, path), kernel)

        apply = adapt(module(*fields).apply, gather=gather)
        of_step = jax.tree.map(own, params[LAYERS])
        variables = {"params": of_step | shared_leaves(params)}
        steps = jax.tree.map(own, entry.steps)
        (x, _), _ = apply(variables, Carry(entry.x, None), entry.shared, steps)
        return x

    def leave(self, params: Tree, x: Array) -> Array:
        """Features `[B, T, D]` of what the last layer gives."""
        apply = adapt(self.module.apply, gather=gathered)
        return apply({"params": params}, x, method="leave")

    def head(self, params: Tree) -> Layer:
        """The output head as a layer for `linear`, with its adapter.

        Its kernel `[D, V]`, which may be the embedding's, has the dtype of the activations.

        Raises:
          ValueError: it has an adapter, and the embedding that it is tied to has trainable tokens.
        """
        layers = {path: params.get(path, {}) for path in (TABLE, HEAD)}
        check_layer(layers[HEAD], HEAD)
        spec = self.layout[HEAD]
        layer = magnitude.with_norm(with_kernel(layers, HEAD, spec))
        if spec.tied_to is not None and spec.weight not in layers[HEAD]:
            of_table = tokens.tied_leaves(layers[TABLE])
            if of_table and is_adapted(layers[HEAD]):
                raise ValueError(
                    f"{HEAD} has an adapter, and the embedding that it is tied to has trainable "
                    "tokens; leave out one of the two"
                )
            layer = layer | of_table
        layer = with_shared(layer, shared_leaves(params), spec, layer["kernel"].shape)
        return layer | {"kernel": layer["kernel"].astype(self.config.dtype)}

    def score(self, head: Layer, features: Array) -> Array:
        """Logits `[..., V]` of features `[..., D]`, by a head as `head` gives it."""
        logits = linear(head, features, lambda x, kernel: rows_dot_general(x, kernel, None))
        return softcap(logits, self.config.logit_softcap)

    def logits(self, params: Tree, features: Array) -> Array:
        """Logits `[..., V]` of features `[..., D]`."""
        return self.score(self.head(params), features)

    def apply(
        self,
        variables: Mapping[str, Any],
        tokens: Array,
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """Logits `[B, T, V]` of tokens `[B, T]`.

        As in linen, `variables` is `{"params": params}`.
        """
        params = variables["params"]
        features, _ = self.features(params, tokens, *args, **kwargs)
        return self.logits(params, features)


def _of_batch(params: Tree, active: Array | None) -> Tree:
    """The parameters as the module takes them: prompts encoded, and with LoRA's active tokens."""
    params = encoded(params)
    return params if active is None else with_rows(params, active)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(CausalLM):
    """A decoder's functions, with what else its checkpoint holds: tokenizer and configs."""

    tokenizer: Any = None
    """The transformers tokenizer, or None for a model without one."""
    hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The checkpoint's own config.json."""
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The checkpoint's generation_config.json, where it has one."""
    source: str = ""
    """Where the checkpoint came from: a folder, a file or a hub id."""
    format: Format | None = None
    """The format of the quantized kernels; None: nothing is quantized."""

    @property
    def base(self) -> str:
        """What adapters are trained on, in words: the source, and the format of its kernels."""
        if self.format is None:
            return self.source
        return f"{self.source} in {self.format}"

    @property
    def text_part_of(self) -> str | None:
        """The architecture of the checkpoint whose text part this is; None: it is all of it."""
        return self.hf_config.get(PART_OF)

    @property
    def without_start(self) -> bool:
        """Whether the checkpoint is the base that a run left for its adapter, without the start."""
        return bool(self.hf_config.get(WITHOUT_START))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(Model):
    """A model with the parameters that its checkpoint holds."""

    params: Tree
    originals: Mapping[str, Original] = dataclasses.field(default_factory=dict)
    """By module path, reads the matrices that are quantized in `params` in full precision."""
    prequantized: bool = False
    """Whether the checkpoint itself is quantized, so that the error of quantization is unknown."""

    def without_params(self) -> Model:
        """The same model, without its parameters."""
        names = [field.name for field in dataclasses.fields(Model)]
        return Model(**{name: getattr(self, name) for name in names})


@functools.cache
def decoder_layout(config: DecoderConfig) -> TracedLayout:
    """The layers of a decoder, traced once, and its output head, which is applied outside of it."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    found = layout(Decoder(config).apply, abstract_params(config), tokens)
    for path, spec in found.items():
        if path.endswith("mlp/gate"):  # a router, which "all-linear" leaves out
            found[path] = dataclasses.replace(spec, by_name=True)
    for path in list(found.blocks):
        if not path.endswith("mlp"):
            del found.blocks[path]
            found.refused[path] = "is not the MLP of a layer"
    tied_to = TABLE if config.tied else None
    found[HEAD] = LayerSpec(
        module="dense",
        stack=(),
        ins=(0,),
        outs=(1,),
        by_name=True,
        tied_to=tied_to,
    )
    return found


def abstract_params(config: DecoderConfig, *, tied: bool | None = None) -> Tree:
    """The shapes of a decoder's parameters, as `jax.ShapeDtypeStruct` in float32.

    Args:
      config: the decoder's.
      tied: whether the head is the embedding's table; None: as the config says.
    """
    if tied is None:
        tied = config.tied
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    # Parameters are float32 unless a caller casts them; the config's dtype is the activations'.
    decoder = Decoder(dataclasses.replace(config, dtype="float32"))
    variables = jax.eval_shape(decoder.init, jax.random.key(0), tokens)
    params: Tree = variables["params"]
    if tied:
        return params
    kernel = jax.ShapeDtypeStruct((config.width, config.vocab_size), jnp.float32)
    return params | {HEAD: {"kernel": kernel}}
