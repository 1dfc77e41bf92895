"""Linear attention: the chunked rule equals the recurrence, in training and in generation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import adapt, add_adapters, partition
from lorax_ft.config import AdapterConfig, MeshConfig
from lorax_ft.inference.generate import generate
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.delta_rule import CHUNK, gated_delta_rule
from lorax_ft.models.model import Model, abstract_params
from lorax_ft.sharding import DECODER_RULES, batch_sharding, make_mesh, param_shardings
from lorax_ft.tree import Tree, combine, flatten, unflatten

HF_CONFIG = {
    "model_type": "qwen3_5_text",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "max_position_embeddings": 512,
}
CONFIG = decoder_config(HF_CONFIG, source="these tests")
LENGTHS = [1, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 9]


def random_inputs(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 2, tokens, 3, 8))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    return {
        "q": q,
        "k": k,
        "v": rng.normal(size=(2, tokens, 3, 5)),
        "log_decay": -rng.gamma(0.3, size=(2, tokens, 3)),
        "beta": rng.uniform(size=(2, tokens, 3)),
        "state": rng.normal(size=(2, 3, 8, 5)),
    }


def recurrence(inputs: dict[str, np.ndarray], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rule token by token in float64; a text starts where `starts` `[T]` is true."""
    state = inputs["state"].copy()
    outputs = []
    for t, start in enumerate(starts):
        if start:
            state[:] = 0
        q, k, v = inputs["q"][:, t], inputs["k"][:, t], inputs["v"][:, t]
        state = state * np.exp(inputs["log_decay"][:, t])[..., None, None]
        delta = v - np.einsum("bhkv,bhk->bhv", state, k)
        write = inputs["beta"][:, t][..., None] * delta
        state = state + np.einsum("bhk,bhv->bhkv", k, write)
        outputs.append(np.einsum("bhkv,bhk->bhv", state, q))
    return np.stack(outputs, axis=1), state


def in_float32(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in inputs.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunks_equal_the_recurrence(tokens: int) -> None:
    inputs = random_inputs(tokens)
    o, state = gated_delta_rule(**in_float32(inputs))
    expected, last = recurrence(inputs, np.zeros(tokens, bool))
    np.testing.assert_allclose(o, expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(state, last, atol=1e-5, rtol=1e-4)


def test_all_products_are_in_full_precision() -> None:
    """Also on accelerators, and in the backward pass."""

    def total(**values: jax.Array) -> jax.Array:
        o, state = gated_delta_rule(**values)
        return jnp.sum(o**2) + jnp.sum(state)

    inputs = in_float32(random_inputs(CHUNK))
    program = jax.jit(jax.grad(lambda values: total(**values))).lower(inputs).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


BORDERS = {
    "inside": [5, 70],
    "at_chunks": [CHUNK, 2 * CHUNK],
    "before_chunks": [CHUNK - 1, 2 * CHUNK - 1],
    "single_tokens": [3, 4, 5, 63, 64, 65],
    "one_long": [1],
}


@pytest.mark.parametrize("borders", BORDERS)
def test_texts_start_anew_at_their_borders(borders: str) -> None:
    inputs = random_inputs(2 * CHUNK + 9)
    starts = np.zeros(2 * CHUNK + 9, bool)
    starts[BORDERS[borders]] = True
    runs = jnp.asarray(np.broadcast_to(np.cumsum(starts), (2, len(starts))))
    o, state = gated_delta_rule(**in_float32(inputs), runs=runs)
    expected, last = recurrence(inputs, starts)
    np.testing.assert_allclose(o, expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(state, last, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_strong_decay_and_repeated_keys_stay_finite() -> None:
    """Keys that repeat make powers of the system huge; strong decays underflow."""
    inputs = random_inputs(2 * CHUNK)
    inputs["k"][:] = inputs["k"][:, :1]
    inputs["beta"][:] = 0.999
    for rate in (0.0, -50.0):
        inputs["log_decay"][:] = rate

        def loss(values: dict[str, jax.Array]) -> jax.Array:
            o, state = gated_delta_rule(**values)
            return jnp.sum(o**2) + jnp.sum(state)

        gradients = jax.grad(loss)(in_float32(inputs))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradients.values())
        o, _ = gated_delta_rule(**in_float32(inputs))
        expected, _ = recurrence(inputs, np.zeros(2 * CHUNK, bool))
        np.testing.assert_allclose(o, expected, atol=1e-4, rtol=1e-4)


def test_gradients_equal_differences() -> None:
    inputs = random_inputs(CHUNK + 3)
    runs = jnp.asarray(np.broadcast_to(np.arange(CHUNK + 3) // 50, (2, CHUNK + 3)))
    weights = np.random.default_rng(1).normal(size=(2, CHUNK + 3, 3, 5))

    def loss(values: dict[str, jax.Array]) -> jax.Array:
        o, _ = gated_delta_rule(**values, runs=runs)
        return jnp.sum(o * weights.astype(np.float32))

    def exact(values: dict[str, np.ndarray]) -> float:
        starts = np.arange(CHUNK + 3) == 50
        return float(np.sum(recurrence(values, starts)[0] * weights))

    gradients = jax.grad(loss)(in_float32(inputs))
    rng = np.random.default_rng(2)
    for name, value in inputs.items():
        direction = rng.normal(size=value.shape)
        step = 1e-6 * direction
        difference = exact(inputs | {name: value + step}) - exact(inputs | {name: value - step})
        along = float(np.sum(np.asarray(gradients[name], np.float64) * direction))
        np.testing.assert_allclose(along, difference / 2e-6, rtol=1e-3, err_msg=name)


def random_params(config: DecoderConfig) -> Tree:
    rng = np.random.default_rng(3)
    flat = flatten(abstract_params(config))
    for path, leaf in flat.items():
        flat[path] = jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)
    return unflatten(flat)


@pytest.fixture(scope="module")
def model() -> tuple[Model, Tree]:
    return Model(config=CONFIG, hf_config=HF_CONFIG), random_params(CONFIG)


def test_layers_are_stacked_by_their_place_in_the_period() -> None:
    assert CONFIG.period == 4
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(CONFIG)).items()}
    assert shapes["layers/0_of_4/linear_attn/in_proj_qkv/kernel"] == (2, 32, 80)
    assert shapes["layers/2_of_4/linear_attn/conv1d/kernel"] == (2, 4, 1, 80)
    assert shapes["layers/3_of_4/self_attn/q_proj/kernel"] == (2, 32, 128)
    assert not any(path.startswith("layers/3_of_4/linear_attn") for path in shapes)
    one_of_a_kind = dataclasses.replace(CONFIG, layers=3, layer_types=CONFIG.layer_types[1:4])
    assert one_of_a_kind.period == 3


def test_adapters_are_counted_by_layer(model: tuple[Model, Tree]) -> None:
    decoder, params = model
    config = AdapterConfig(rank=2, layers=(4, 7), rank_pattern=("layers/7/.*=3",))
    adapted = flatten(add_adapters(params, config, layout=decoder.layout, key=jax.random.key(0)))
    scales = {path: leaf for path, leaf in adapted.items() if path.endswith("lora_scale")}
    used = {path: np.flatnonzero(np.asarray(leaf)).tolist() for path, leaf in scales.items()}
    assert used["layers/0_of_4/linear_attn/out_proj/lora_scale"] == [1]
    assert used["layers/3_of_4/self_attn/q_proj/lora_scale"] == [1]
    assert not any("/1_of_4/" in path or "/2_of_4/" in path for path in used)
    assert adapted["layers/3_of_4/mlp/up_proj/lora_a"].shape == (2, 32, 3)


def test_packed_rows_equal_separate_ones(model: tuple[Model, Tree]) -> None:
    decoder, params = model
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 61, (2, 150)))
    lengths = [64, 3, 1, 82]
    segments = np.repeat(np.arange(1, 5), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    separate = jax.jit(lambda padded: decoder.apply({"params": params}, padded))
    packed = jax.jit(decoder.apply)(
        {"params": params},
        tokens,
        jnp.broadcast_to(positions, tokens.shape),
        jnp.broadcast_to(segments, tokens.shape),
    )
    for segment in range(1, 5):
        places = np.flatnonzero(segments == segment)
        # Padded at the end, so that one program serves all.
        padded = np.zeros((2, 150), int)
        padded[:, : len(places)] = tokens[:, places]
        alone = separate(padded)[:, : len(places)]
        np.testing.assert_allclose(packed[:, places], alone, atol=2e-4, rtol=1e-4)


def test_generation_equals_the_whole_text(model: tuple[Model, Tree]) -> None:
    """Prompts of several lengths in one batch, some longer than a chunk."""
    decoder, params = model
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 61, size).tolist() for size in (70, 2, 1, 64)]
    rows = generate(decoder, params, prompts, max_new_tokens=8, stop_ids=())
    apply = jax.jit(decoder.apply)
    for prompt, row in zip(prompts, rows, strict=True):
        text = np.zeros((1, 80), int)
        text[0, : len(prompt + row)] = prompt + row
        chosen = np.argmax(apply({"params": params}, text)[0], axis=-1)
        expected = chosen[len(prompt) - 1 : len(prompt + row) - 1]
        assert row == expected.tolist()


@pytest.mark.slow
def test_gradients_do_not_depend_on_what_is_recomputed(model: tuple[Model, Tree]) -> None:
    decoder, params = model
    adapted = add_adapters(
        params, AdapterConfig(rank=2), layout=decoder.layout, key=jax.random.key(0)
    )
    tokens = jnp.arange(80)[None] % 61

    def gradients(how: str) -> dict[str, jax.Array]:
        config = dataclasses.replace(CONFIG, remat=how)
        apply = adapt(Model(config=config).apply)
        loss = jax.jit(jax.grad(lambda p: jnp.sum(apply({"params": p}, tokens) ** 2)))
        return flatten(loss(adapted))

    theirs = gradients("none")
    for path, leaf in gradients("full").items():
        size = float(jnp.abs(theirs[path]).max())
        np.testing.assert_allclose(leaf, theirs[path], atol=1e-4 * size + 1e-6, err_msg=path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=2), MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=2, context=2)],
    ids=["rows", "tensor", "context"],
)
def test_a_sharded_loss_and_its_gradients_do_not_depend_on_the_mesh(mesh: MeshConfig) -> None:
    config = dataclasses.replace(CONFIG, remat="full")
    model = Model(config=config, hf_config=HF_CONFIG)
    params = add_adapters(
        random_params(config), AdapterConfig(rank=2), layout=model.layout, key=jax.random.key(0)
    )
    tokens = np.random.default_rng(0).integers(0, 61, (8, 70))
    segments = np.broadcast_to(np.arange(70) // 33, (8, 70))

    def loss(trained: Tree, frozen: Tree, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        params = combine(trained, frozen)
        y = adapt(model.apply)({"params": params}, tokens, None, segments)
        return jnp.mean(y**2)

    alone = jax.jit(jax.value_and_grad(loss))(*partition(params), tokens, segments)
    devices = make_mesh(mesh)
    shardings = param_shardings(params, DECODER_RULES, layout=model.layout, mesh=devices)
    parts = partition(jax.device_put(params, shardings))
    batch = jax.device_put((tokens, segments), batch_sharding(devices, microbatched=False))
    with jax.set_mesh(devices):
        together = jax.jit(jax.value_and_grad(loss))(*parts, *batch)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-6)
    # A random model is sensitive to rounding: the mean of gradients of two rows each, on one
    # device, is off by 6e-5 with jaxlib 0.10 and by 1.4e-4 with 0.12.
    for path, expected in flatten(alone[1]).items():
        size = float(jnp.abs(expected).max()) + 1e-9
        found = flatten(together[1])[path]
        np.testing.assert_allclose(found, expected, atol=3e-4 * size, err_msg=path)
