"""NNX models that are not ours: bonsai's and Tunix's Qwen3, read by their own loaders.

CONTRIBUTING.md says how to install the two.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from method_cases import KEY, distance

import lorax_ft as lft
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.models.model import LoadedModel, abstract_params
from lorax_ft.tree import Tree, flatten

HF_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
TOKENS = jax.random.randint(KEY, (2, 8), 1, HF_CONFIG["vocab_size"])
LAYERS = [f"attn/{name}_proj" for name in "qkvo"] + [
    f"mlp/{x}_proj" for x in ("gate", "up", "down")
]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4, "dora": True},
    "pissa": {"rank": 4, "init": "pissa"},
    "miss": {"method": "miss", "rank": 4},
    "ia3": {"method": "ia3"},
    "qlora": {"rank": 4},
}

Theirs = tuple[Any, Callable[..., Array], dict[Any, Any]]
"""The model, a function of it and tokens, and what its own layers compute."""


def imported(name: str) -> Any:
    """A module, or a skip where its package is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def bonsai(folder: Path) -> Theirs:
    modeling = imported("bonsai.models.qwen3.modeling")
    loader = importlib.import_module("bonsai.models.qwen3.params")
    config = modeling.ModelConfig(
        num_layers=2,
        vocab_size=97,
        emb_dim=32,
        mlp_dim=48,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=1_000_000,
        rope_scaling_factor=8.0,
        local_rope_theta=1e4,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    )

    def call(model: Any, tokens: Array) -> Array:
        cache = modeling.init_cache(config, *tokens.shape, 0, jnp.float32)
        return model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))

    return loader.create_model_from_safe_tensors(str(folder), config), call, {}


def tunix(folder: Path) -> Theirs:
    modeling = imported("tunix.models.qwen3.model")
    loader = importlib.import_module("tunix.models.qwen3.params")
    config = modeling.ModelConfig(
        num_layers=2,
        vocab_size=97,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        remat_config=modeling.RematConfig.DECODER,
    )

    def call(model: Any, tokens: Array) -> Array:
        places = jnp.arange(tokens.shape[1])
        mask = places[:, None] >= places
        logits, _ = model(tokens, jnp.broadcast_to(places, tokens.shape), None, mask[None])
        return logits

    model = loader.create_model_from_safe_tensors(str(folder), config)
    return model, call, {modeling.Einsum: ("einsum", "w")}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """The folder of a model with random weights, and our logits."""
    config = decoder_config(HF_CONFIG, source="these tests")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_params(config)
    )
    model = LoadedModel(config=config, params=params, hf_config=HF_CONFIG)
    folder = tmp_path_factory.mktemp("nnx") / "model"
    lft.save_model(folder, params, model)
    return folder, model.apply({"params": params}, TOKENS)


@pytest.fixture(scope="module", params=[bonsai, tunix], ids=["bonsai", "tunix"])
def theirs(request: pytest.FixtureRequest, ours: tuple[Path, Array]) -> Theirs:
    return request.param(ours[0])


def test_its_layers_are_seen_and_its_logits_are_ours(
    theirs: Theirs, ours: tuple[Path, Array]
) -> None:
    model, call, layers = theirs
    apply, params = lft.from_nnx(model, call, layers=layers)
    assert distance(apply({"params": params}, TOKENS), ours[1]) < 1e-5
    layout = lft.layout(apply, params, TOKENS)
    expected = {f"layers/{i}/{name}" for i in range(2) for name in LAYERS} | {"lm_head"}
    assert set(layout) == expected
    (table,) = layout.unseen
    assert table.startswith("embedder/")
    config = lft.AdapterConfig(rank=4, targets=("embedder",))
    with pytest.raises(ValueError, match=r"'embedder' matches embedder/.*cannot be adapted"):
        lft.add_adapters(params, config, layout=layout, key=KEY)


@pytest.mark.parametrize("method", METHODS)
def test_our_step_trains_it(theirs: Theirs, method: str) -> None:
    model, call, layers = theirs
    apply, base = lft.from_nnx(model, call, layers=layers)
    layout = lft.layout(apply, base, TOKENS)
    if method == "qlora":
        base, _ = lft.quantize_base(base, lft.QuantConfig(format="nf4"), layout=layout)
    config = lft.AdapterConfig(targets=("all-linear",), exclude=("lm_head",), **METHODS[method])
    params = lft.add_adapters(base, config, layout=layout, key=KEY)
    trained, frozen = lft.partition(params)
    before = jax.tree.map(np.asarray, frozen)
    adapted = lft.adapt(apply)

    def loss(params: Tree, batch: Tree, key: Array | None) -> tuple[Array, Array, Tree]:
        logits = adapted({"params": params}, batch["tokens"])[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        return losses.sum(), jnp.float32(losses.size), {}

    tx = lft.make_optimizer(lft.OptimConfig(learning_rate=3e-2), steps=20)
    step = jax.jit(lft.make_train_step(loss, tx, layout=layout))
    state = lft.TrainState(jnp.int32(0), trained, tx.init(trained))
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, {"tokens": TOKENS[None]}, KEY)
        losses.append(float(metrics["loss"]))
    print(f"{method}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    for path, leaf in flatten(state.trained).items():
        assert not np.array_equal(leaf, flatten(trained)[path]), path
    params = lft.combine(state.trained, frozen)
    merged = apply.model(lft.merge_adapters(params, layout=layout))
    # Their own class and code, without us.
    assert type(merged) is type(model)
    assert distance(call(merged, TOKENS), adapted({"params": params}, TOKENS)) < 1e-5
