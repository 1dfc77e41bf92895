"""A zoo of small linen models; the library has no code for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft import adapt, layout
from lorax_ft.lowrank.layout import Layout
from lorax_ft.models.config import DecoderConfig, LayerType
from lorax_ft.models.decoder import Decoder
from lorax_ft.models.model import LoadedModel, Model
from lorax_ft.models.rope import Rope
from lorax_ft.tree import Tree, flatten, unflatten

TINY = DecoderConfig(
    vocab_size=97,
    width=32,
    mlp_width=48,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    layer_types=(LayerType(rope=Rope(dims=8, theta=1e4)),),
    tied=True,
    max_positions=64,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model with parameters, its layout, and an input."""

    apply: Callable[..., Array]
    params: Tree
    layout: Layout
    example: tuple[Array, ...]

    @functools.cached_property
    def _forward(self) -> Callable[..., Array]:
        return jax.jit(adapt(self.apply))

    @functools.cached_property
    def _plain(self) -> Callable[..., Array]:
        return jax.jit(self.apply)

    def forward(self, params: Tree) -> Array:
        """The output with the adapters in the parameters, if any."""
        return self._forward({"params": params}, *self.example)

    def plain(self, params: Tree) -> Array:
        """The output of the unmodified model."""
        return self._plain({"params": params}, *self.example)


class VitBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, name="attention")(
            nn.LayerNorm()(x)
        )
        return x + nn.Dense(16, name="down")(
            nn.gelu(nn.Dense(24, name="up")(nn.LayerNorm()(x)))
        ), None


class Unrolled(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        for i in range(self.depth):
            x, _ = VitBlock(name=str(i))(x, None)
        return x, None


class VisionTransformer(nn.Module):
    style: Literal["scanned", "unrolled", "rematted"]
    depth: int = 3

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, 16)
        if self.style == "unrolled":
            layers: Any = Unrolled(self.depth, name="layers")
        else:
            block = nn.remat(VitBlock, prevent_cse=False) if self.style == "rematted" else VitBlock
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
                in_axes=nn.broadcast,
            )(name="layers")
        x, _ = layers(x, None)
        return nn.Dense(5, name="classes")(x.mean(1))


class ConvolutionalNetwork(nn.Module):
    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, padding="SAME", name="first")(images))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(
            nn.Conv(
                6, (3, 2), padding="VALID", kernel_dilation=(1, 2), use_bias=False, name="second"
            )(x)
        )
        x = nn.relu(nn.Conv(7, 3, padding="CIRCULAR", name="line")(x.reshape(x.shape[0], -1, 6)))
        return nn.Dense(5, name="classes")(x.mean(1))


class Einsums(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        q = nn.Einsum((2, 12, 8), "BTD,NDH->BTNH", use_bias=False, name="query")(x)
        x = x + nn.Einsum((2, 8, 12), "BTNH,NHD->BTD", use_bias=False, name="attention_out")(
            nn.tanh(q)
        )
        x = x + nn.Einsum((12, 12), "...D,FD->...F", name="square")(x)
        e = nn.Einsum((3, 12, 10), "BED,EDF->BEF", name="experts_up")(x)
        x = x + nn.Einsum((3, 10, 12), "BEF,EFD->BED", use_bias=False, name="experts_down")(
            nn.silu(e)
        )
        return nn.Einsum((12, 5), name="classes")(x, "... D, D C -> ... C")


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        initial = nn.initializers.lecun_normal()
        x = nn.tanh(
            nn.Dense(16, kernel_init=nn.with_partitioning(initial, ("data", None)), name="first")(x)
        )
        return nn.DenseGeneral(
            (2, 4), kernel_init=nn.with_partitioning(initial, (None, "data", None)), name="second"
        )(x)


def built_case(name: str) -> Case:
    """Build a model by name, with its parameters and an input."""
    if name.startswith("decoder"):
        model = built_decoder(tied=name != "decoder_untied")
        tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, model.config.vocab_size)
        return Case(apply=model.apply, params=model.params, layout=model.layout, example=(tokens,))
    module, shape = {
        "vit_scanned": (VisionTransformer("scanned"), (2, 8, 8, 3)),
        "vit_unrolled": (VisionTransformer("unrolled"), (2, 8, 8, 3)),
        "vit_rematted": (VisionTransformer("rematted"), (2, 8, 8, 3)),
        "convolutions": (ConvolutionalNetwork(), (2, 9, 9, 3)),
        "einsums": (Einsums(), (2, 3, 12)),
        "boxed": (Boxed(), (3, 12)),
    }[name]
    x = jax.random.normal(jax.random.key(3), shape)
    if name == "vit_unrolled":  # the scanned model's parameters, unstacked
        flat = flatten(built_case("vit_scanned").params)
        stacked = {path: leaf for path, leaf in flat.items() if path.startswith("layers/")}
        params = {path: leaf for path, leaf in flat.items() if path not in stacked}
        for path, leaf in stacked.items():
            params |= {
                path.replace("layers/", f"layers/{i}/", 1): leaf[i] for i in range(leaf.shape[0])
            }
        params = unflatten(params)
    else:
        params = module.init(jax.random.key(4), x)["params"]
        params = params if name == "boxed" else _moved(params)
    return Case(
        apply=module.apply, params=params, layout=layout(module.apply, params, x), example=(x,)
    )


def built_decoder(**fields: Any) -> Model:
    """A `Model` with the sizes of TINY, with fields of its config replaced."""
    config = dataclasses.replace(TINY, **fields)
    tokens = jnp.zeros((1, 8), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention promotes
        params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    if not config.tied:
        kernel = (
            jax.random.normal(jax.random.key(1), (config.width, config.vocab_size))
            / config.width**0.5
        )
        params = params | {"lm_head": {"kernel": kernel}}
    model = LoadedModel(config=config, params=_moved(params))
    with jax.numpy_dtype_promotion("standard"):
        assert model.layout  # traced and cached
    return model


def _moved(params: Tree) -> Tree:
    """The parameters with random biases and norm scales, so that they are not all equal."""

    def move(path: str, leaf: Array) -> Array:
        if leaf.ndim == 0 or not path.endswith(("bias", "scale")):
            return leaf
        return leaf + 0.1 * jnp.asarray(
            np.random.default_rng(len(path)).normal(size=leaf.shape), leaf.dtype
        )

    return unflatten({path: move(path, leaf) for path, leaf in flatten(params).items()})
