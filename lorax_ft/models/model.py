"""A loaded model: its functions, its parameters, its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.intercept import adapt
from lorax_ft.lowrank.layout import Layout, layout
from lorax_ft.lowrank.linear import Layer, column_norm, linear
from lorax_ft.lowrank.requantize import Original
from lorax_ft.lowrank.spec import LayerSpec
from lorax_ft.models.attention import Cache
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.decoder import Decoder
from lorax_ft.models.parts import rows_dot_general, softcap
from lorax_ft.quant.kernels import format_of
from lorax_ft.sharding import gathered
from lorax_ft.tree import Tree, flatten

WITHOUT_START = "start_taken_out"
"""The mark, in its config.json, of a base that is for one adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder with its parameters. Its functions see adapters in whatever parameters they are given.

    Letters: B batch, T tokens, D width, V vocabulary.
    """

    config: DecoderConfig
    params: Tree
    tokenizer: Any = None
    """The transformers tokenizer, or None for a model without one."""
    hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The checkpoint's own config.json."""
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The checkpoint's generation_config.json, where it has one."""
    source: str = ""
    """Where the checkpoint came from: a folder, a file or a hub id."""
    originals: Mapping[str, Original] = dataclasses.field(default_factory=dict)
    """By module path, what reads the matrices again that are quantized in `params`."""
    prequantized: bool = False
    """Whether the checkpoint itself is quantized, so that what quantizing lost is not known."""

    @property
    def base(self) -> str:
        """What the adapters stand on, in words: the source, and the format of its kernels where they are quantized."""
        formats = sorted(
            {str(format_of(leaf)) for leaf in flatten(self.params).values() if format_of(leaf)}
        )
        return self.source + (f" in {formats[0]}" if formats else "")

    @property
    def without_start(self) -> bool:
        """Whether the checkpoint is a base that a run left, out of which its adapter's start was taken."""
        return bool(self.hf_config.get(WITHOUT_START))

    @functools.cached_property
    def module(self) -> Decoder:
        """The linen module."""
        return Decoder(self.config)

    @functools.cached_property
    def layout(self) -> Layout:
        """The layers that can be adapted, by slash path (see `lorax_ft.layout`)."""
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        found = layout(lambda v, t: self.module.apply(v, t), self.params, tokens)
        found |= {
            p: dataclasses.replace(found[p], by_name=True) for p in found if p.endswith("mlp/gate")
        }  # routers
        return found | {
            "lm_head": LayerSpec(kind="dense", stack=(), ins=(0,), outs=(1,), by_name=True)
        }

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
    ) -> tuple[Array, Cache | None]:
        """Features `[B, T, D]` before the head, and the cache; arguments as `Decoder.__call__` has them."""
        apply = adapt(self.module.apply, gather=gathered)
        return apply(
            {"params": params},
            tokens,
            positions,
            segment_ids,
            noise=noise,
            cache=cache,
            length=length,
        )

    def head(self, params: Tree) -> Layer:
        """The output head as a layer for `linear`: its kernel `[D, V]` in the activations' dtype, and its adapter."""
        layer = dict(params.get("lm_head", {}))
        kernel = layer["kernel"] if "kernel" in layer else params["embed_tokens"]["embedding"].T
        if "magnitude" in layer and "norm" not in layer:
            layer["norm"] = column_norm(layer | {"kernel": kernel})
        return layer | {"kernel": kernel.astype(self.config.dtype)}

    def score(self, head: Layer, features: Array) -> Array:
        """Logits `[..., V]` of features `[..., D]`, by a head as `head` gives it."""
        logits = linear(head, features, lambda x, kernel: rows_dot_general(x, kernel, None))
        return softcap(logits, self.config.logit_softcap)

    def logits(self, params: Tree, features: Array) -> Array:
        """Logits `[..., V]` of features `[..., D]`."""
        return self.score(self.head(params), features)

    def apply(
        self, variables: Mapping[str, Any], tokens: Array, *args: Any, **kwargs: Any
    ) -> Array:
        """Logits `[B, T, V]` of tokens `[B, T]`; `variables` is `{"params": params}`, as in linen."""
        features, _ = self.features(variables["params"], tokens, *args, **kwargs)
        return self.logits(variables["params"], features)
