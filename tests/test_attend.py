"""Attention's blocks, and what each kind of rematerialization saves."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import TINY

from lorax_ft.config import EMBEDDED_MODEL, Config, MeshConfig, ModelConfig
from lorax_ft.interop.load import load_model
from lorax_ft.models import attend, splash
from lorax_ft.models.config import LayerType
from lorax_ft.models.decoder import Decoder, saved_per_token
from lorax_ft.models.parts import rows_dot_general, softcap
from lorax_ft.run import remat
from lorax_ft.run.model_args import ModelArgs, load_with_adapter
from lorax_ft.sharding import make_mesh

B, K, G, C = 2, 2, 3, 16


def plain(scores: attend.Scores, q: Any, k: Any, v: Any, mask: Any, sinks: Any) -> jax.Array:
    """The same by the definition, without blocks, differentiated by JAX."""
    z = softcap(scores.scale * jnp.einsum("bkgtc,bksc->bkgts", q, k), scores.cap)
    if mask is None:
        visible = attend.causal(jnp.arange(q.shape[3]), k.shape[2])
    else:
        visible = mask[:, :, None]
    z = jnp.where(visible, z, jnp.finfo(z.dtype).min)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[..., None], (*z.shape[:4], 1))
        z = jnp.concatenate([z, sink], axis=-1)
    p = jax.nn.softmax(z, axis=-1)[..., : k.shape[2]]
    return jnp.einsum("bkgts,bksc->bkgtc", p, v)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("tokens", [128, 37])  # with blocks, and without
@pytest.mark.parametrize(("cap", "packed", "sinks"), itertools.product([None, 3.0], *[[0, 1]] * 2))
def test_values_and_gradients_are_those_of_the_definition(
    cap: float | None, packed: int, sinks: int, tokens: int
) -> None:
    rng = np.random.default_rng(0)
    q, weights = normal(rng, B, K, G, tokens, C), normal(rng, B, K, G, tokens, C)
    k, v = normal(rng, B, K, tokens, C), normal(rng, B, K, tokens, C)
    mask = None
    if packed:
        segments = np.sort(rng.integers(0, 3, (B, tokens)))
        window = attend.causal(jnp.arange(tokens), tokens, 20)
        mask = (window & (segments[:, :, None] == segments[:, None]))[:, None]
    scores = attend.Scores(0.4, cap)
    sink = normal(rng, K, G, 1) if sinks else None

    def results(values: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, sink: Any) -> jax.Array:
            return jnp.sum(weights * values(scores, q, k, v, mask, sink))

        given = (0, 1, 2, 3) if sinks else (0, 1, 2)
        return jax.value_and_grad(loss, argnums=given)(q, k, v, sink)

    with jax.default_matmul_precision("highest"):
        ours, theirs = results(attend._weighted_values), results(plain)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(
            found, expected, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-6
        )


@pytest.mark.parametrize("kind", ["full", "mlp", "products"])
def test_each_kind_saves_what_it_says(kind: str) -> None:
    """As many numbers a token as `saved_per_token` counts, beside the input of each layer."""
    config = dataclasses.replace(TINY, remat=kind)
    decoder, tokens = Decoder(config), jnp.zeros((2, 64), jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"]

    def loss(params: Any) -> jax.Array:
        return jnp.sum(decoder.apply({"params": params}, tokens)[0])

    # What the backward pass holds; of the parameters' shape are the parameters.
    held = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    found = 0
    for leaf in jax.tree.leaves(held):
        if leaf.shape not in shapes and leaf.ndim > 2 and leaf.shape[0] == config.layers:
            found += leaf.size
    expected = saved_per_token(config, kind) + config.layers * config.width
    statistics = 2 * config.layers * config.heads if kind == "products" else 0
    assert found == 2 * 64 * (expected + statistics)


def test_auto_takes_the_fastest_that_fits() -> None:
    decoder = TINY
    tokens = 4096

    def needed(kind: str) -> float:
        return remat.saved_bytes(decoder, kind, tokens) / remat.SHARE

    def chosen(memory: float) -> str:
        return remat.choose(decoder, tokens, memory=memory, on_cpu=True)

    assert needed("products") > needed("mlp") > needed("full") == 0
    assert chosen(needed("products")) == "products"
    assert chosen(needed("products") - 1) == "mlp"
    assert chosen(needed("mlp") - 1) == "full"
    assert chosen(-1) == "full"
    half = dataclasses.replace(decoder, dtype="bfloat16")
    assert remat.choose(half, tokens, memory=1e12, on_cpu=True) == "full"
    assert remat.choose(half, tokens, memory=1e12, on_cpu=False) == "products"
    assert Config().model.remat == "auto"


def test_bfloat16_products_are_summed_in_float32() -> None:
    """On a CPU by a product of its own, with the gradients of an ordinary one."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, 2, 8, 512), normal(rng, 512, 32)
    half = (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))

    def loss(x: Any, w: Any) -> jax.Array:
        return jnp.sum(rows_dot_general(x, w, None).astype(jnp.float32) ** 2)

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(*half)
    exact = [leaf.astype(jnp.float32) for leaf in half]
    expected, theirs = jax.value_and_grad(loss, argnums=(0, 1))(*exact)
    assert rows_dot_general(*half, None).dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    for found, right in zip(grads, theirs, strict=True):
        assert found.dtype == jnp.bfloat16
        scale = float(jnp.abs(right).max())
        np.testing.assert_allclose(found.astype(jnp.float32), right, atol=0.01 * scale)


@pytest.mark.parametrize(("cap", "devices"), [(None, 1), (5.0, 8)])
def test_splash_attention_is_attention(
    monkeypatch: pytest.MonkeyPatch, cap: float | None, devices: int
) -> None:
    """Packed rows, layers with and without a window, on one device and on a mesh."""
    monkeypatch.setattr(splash, "INTERPRET", True)
    rope = TINY.layer_types[0].rope
    types = (LayerType(rope=rope), LayerType(rope=rope, window=100), LayerType(rope=rope))
    plain_config = dataclasses.replace(
        TINY, layer_types=types, max_positions=256, attention="xla", attention_softcap=cap
    )
    segments = np.sort(np.random.default_rng(0).integers(1, 4, (4, 256)))
    tokens = jnp.arange(4 * 256).reshape(4, 256) % TINY.vocab_size
    decoder = Decoder(plain_config)
    params = decoder.init(jax.random.key(0), tokens)["params"]
    shape = MeshConfig(data=1) if devices == 1 else MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(shape, devices=jax.devices()[:devices])

    def results(attention: str) -> Any:
        decoder = Decoder(dataclasses.replace(plain_config, attention=attention))

        def loss(params: Any, tokens: Any, segments: Any) -> jax.Array:
            y, _ = decoder.apply({"params": params}, tokens, None, segments)
            return jnp.sum(y**3)

        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss))(params, tokens, segments)

    ours, theirs = results("splash"), results("xla")
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-4 * size)


def test_splash_attention_says_what_it_needs() -> None:
    config = dataclasses.replace(TINY, attention="splash")
    assert "multiple of 128" in str(splash.missing(config, tokens=100, cached=False))
    assert "tensor 4" in str(splash.missing(config, tokens=128, cached=False, split=4))
    assert splash.missing(config, tokens=128, cached=False, split=2) is None
    with pytest.raises(ValueError, match="needs a TPU"):
        load_model(EMBEDDED_MODEL, attention="splash")
    # Rows of another length take XLA's attention.
    assert attend.needs_no_mask(config, tokens=128, cached=False)
    assert not attend.needs_no_mask(config, tokens=100, cached=False)
    assert not attend.needs_no_mask(config, tokens=128, cached=True)
    assert not attend.needs_no_mask(TINY, tokens=128, cached=False)  # this is no TPU


@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_a_run_is_used_on_another_machine(tmp_path: Path, attention: Any) -> None:
    """What it was trained with on a TPU or a GPU does not run here."""
    config = Config(model=ModelConfig(attention=attention))
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "model").symlink_to(EMBEDDED_MODEL)
    model, params = load_with_adapter(ModelArgs(run=str(tmp_path)))
    logits = model.apply({"params": params}, jnp.zeros((1, 128), jnp.int32))
    assert np.isfinite(logits).all()
