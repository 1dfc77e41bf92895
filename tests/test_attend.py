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

import lorax_ft as lft
from lorax_ft.config import EMBEDDED_MODEL, Config, MeshConfig, ModelConfig
from lorax_ft.interop.load import load_model
from lorax_ft.models import attend, attend_in_blocks, splash
from lorax_ft.models.config import LayerType
from lorax_ft.models.decoder import Decoder, saved_per_token
from lorax_ft.models.parts import rows_dot_general, softcap
from lorax_ft.run import remat
from lorax_ft.run.model_args import ModelArgs, load_with_adapter
from lorax_ft.sharding import make_mesh

B, K, G, C = 2, 2, 3, 16


def plain(
    scores: attend_in_blocks.Scores, q: Any, k: Any, v: Any, mask: Any, sinks: Any
) -> jax.Array:
    """The same by the definition, without blocks, differentiated by JAX."""
    z = softcap(scores.scale * jnp.einsum("bkgtc,bksc->bkgts", q, k), scores.cap)
    if mask is None:
        visible = attend_in_blocks.causal(jnp.arange(q.shape[3]), k.shape[2])
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


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("tokens", "keys", "cap", "packed", "sinks"),
    [
        *itertools.product([128], [128], [None, 3.0], *[[0, 1]] * 2),  # with blocks
        *itertools.product([37], [37], [None, 3.0], *[[0, 1]] * 2),  # without
        (128, 192, 3.0, 1, 1),  # the last queries of rows
    ],
)
def test_values_and_gradients_are_those_of_the_definition(
    tokens: int, keys: int, cap: float | None, packed: int, sinks: int
) -> None:
    rng = np.random.default_rng(0)
    q, weights = normal(rng, B, K, G, tokens, C), normal(rng, B, K, G, tokens, C)
    k, v = normal(rng, B, K, keys, C), normal(rng, B, K, keys, C)
    mask = None
    if packed:
        segments = np.sort(rng.integers(0, 3, (B, keys)))
        places = np.arange(keys - tokens, keys)
        window = attend_in_blocks.causal(jnp.asarray(places), keys, 20)
        mask = (window & (segments[:, places, None] == segments[:, None]))[:, None]
    scores = attend_in_blocks.Scores(0.4, cap)
    sink = normal(rng, K, G, 1) if sinks else None

    def results(values: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, sink: Any) -> jax.Array:
            return jnp.sum(weights * values(scores, q, k, v, mask, sink))

        given = (0, 1, 2, 3) if sinks else (0, 1, 2)
        return jax.value_and_grad(loss, argnums=given)(q, k, v, sink)

    with jax.default_matmul_precision("highest"):
        ours, theirs = results(attend_in_blocks._weighted_values), results(plain)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(
            found, expected, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-6
        )


def test_long_rows_have_more_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that neither scores behind a block nor all those of a long row are in memory."""
    for tokens, count in ((1024, 4), (2048, 8), (4096, 16)):
        blocks = attend_in_blocks._blocks(tokens, tokens)
        assert [block.stop for block in blocks] == [256 * (i + 1) for i in range(count)]
        assert all(block.keys == block.stop for block in blocks)
    rng = np.random.default_rng(0)
    q = normal(rng, B, K, G, 128, C)
    k, v = normal(rng, B, K, 128, C), normal(rng, B, K, 128, C)
    scores = attend_in_blocks.Scores(0.4, None)
    expected = plain(scores, q, k, v, None, None)
    monkeypatch.setattr(attend_in_blocks, "LARGEST_BLOCK", 16)
    found = attend_in_blocks._weighted_values(scores, q, k, v, None, None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


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


@pytest.mark.parametrize("kind", ["full", "mlp", "products"])
def test_what_magnitudes_need_is_counted(kind: str) -> None:
    """The outputs that DoRA scales, as many numbers a token as `saved_per_token` counts."""
    config = dataclasses.replace(TINY, remat=kind)
    decoder, tokens = Decoder(config), jnp.zeros((2, 64), jnp.int32)
    params = decoder.init(jax.random.key(0), tokens)["params"]
    layout = lft.layout(decoder.apply, params, tokens)
    of_tokens = {(config.layers, 2, 64), (config.layers, 128)}

    def saved(*, dora: bool) -> int:
        adapter = lft.AdapterConfig(rank=2, dora=dora)
        adapted = lft.add_adapters(params, adapter, layout=layout, key=jax.random.key(1))
        adapted = lft.with_norms(adapted, layout=layout)
        trained, frozen = lft.partition(adapted)

        def loss(trained: Any) -> jax.Array:
            all_params = {"params": lft.combine(trained, frozen)}
            return jnp.sum(lft.adapt(decoder.apply)(all_params, tokens)[0])

        held = jax.eval_shape(lambda trained: jax.vjp(loss, trained)[1], trained)
        leaves = jax.tree.leaves(held)
        return sum(leaf.size for leaf in leaves if leaf.shape[:-1] in of_tokens)

    more = saved_per_token(config, kind, scaled=True) - saved_per_token(config, kind)
    assert saved(dora=True) - saved(dora=False) == 2 * 64 * more
    assert (more > 0) == (kind == "products")


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
    memory = needed("products")
    assert remat.choose(decoder, tokens, memory=memory, on_cpu=True, scaled=True) == "mlp"
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


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("cap", "mesh", "length"),
    [
        (None, MeshConfig(data=1), 256),
        (5.0, MeshConfig(data=2, fsdp=2, tensor=2), 256),
        (None, MeshConfig(data=1, context=4, tensor=2), 512),
    ],
    ids=["one device", "mesh", "context"],
)
def test_splash_attention_is_attention(
    monkeypatch: pytest.MonkeyPatch, cap: float | None, mesh: MeshConfig, length: int
) -> None:
    """Packed rows, layers with and without a window, on one device and on meshes."""
    monkeypatch.setattr(splash, "INTERPRET", True)
    rope = TINY.layer_types[0].rope
    types = (LayerType(rope=rope), LayerType(rope=rope, window=100), LayerType(rope=rope))
    plain_config = dataclasses.replace(
        TINY, layer_types=types, max_positions=length, attention="xla", attention_softcap=cap
    )
    segments = np.sort(np.random.default_rng(0).integers(1, 4, (4, length)))
    tokens = jnp.arange(4 * length).reshape(4, length) % TINY.vocab_size
    decoder = Decoder(plain_config)
    params = decoder.init(jax.random.key(0), tokens)["params"]
    count = mesh.data * mesh.fsdp * mesh.context * mesh.tensor
    devices = make_mesh(mesh, devices=jax.devices()[:count])

    def results(attention: str) -> Any:
        decoder = Decoder(dataclasses.replace(plain_config, attention=attention))

        def loss(params: Any, tokens: Any, segments: Any) -> jax.Array:
            y, _ = decoder.apply({"params": params}, tokens, None, segments)
            return jnp.sum(y**3)

        with jax.set_mesh(devices):
            return jax.jit(jax.value_and_grad(loss))(params, tokens, segments)

    ours, theirs = results("splash"), results("xla")
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-4 * size)


def test_balanced_devices_see_as_many_keys() -> None:
    places = splash._balanced_places(48, 4).reshape(4, 12)
    assert sorted(places.flatten()) == list(range(48))
    assert np.all((places + 1).sum(axis=1) == 48 * 49 / 2 / 4)


def test_splash_attention_says_what_it_needs() -> None:
    config = dataclasses.replace(TINY, attention="splash")
    assert "multiple of 128" in str(splash.missing(config, tokens=100, cached=False))
    assert "tensor 4" in str(splash.missing(config, tokens=128, cached=False, sizes={"tensor": 4}))
    assert splash.missing(config, tokens=128, cached=False, sizes={"tensor": 2}) is None
    split = {"context": 4}
    assert "multiple of 512 (384 is" in str(
        splash.missing(config, tokens=384, cached=False, sizes=split)
    )
    with pytest.raises(ValueError, match="needs a TPU"):
        load_model(EMBEDDED_MODEL, attention="splash")
    # Rows of another length take XLA's attention.
    assert attend.needs_no_mask(config, tokens=128, cached=False)
    assert not attend.needs_no_mask(config, tokens=100, cached=False)
    assert not attend.needs_no_mask(config, tokens=128, cached=True)
    assert not attend.needs_no_mask(TINY, tokens=128, cached=False)  # this is no TPU


def test_one_query_is_not_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_missing_for_cudnn", lambda *args, **kwargs: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = [
        attend._implementation(TINY, dim=64, queries=queries, keys=64, masked=True)
        for queries in (64, 8, 1)
    ]
    assert chosen == ["cudnn", "cudnn", "xla"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_a_run_is_used_on_another_machine(tmp_path: Path, attention: Any) -> None:
    """What it was trained with on a TPU or a GPU does not run here."""
    config = Config(model=ModelConfig(attention=attention))
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "model").symlink_to(EMBEDDED_MODEL)
    model, params = load_with_adapter(ModelArgs(run=str(tmp_path)))
    logits = model.apply({"params": params}, jnp.zeros((1, 128), jnp.int32))
    assert np.isfinite(logits).all()
