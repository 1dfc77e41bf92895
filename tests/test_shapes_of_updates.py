"""The methods whose ΔW is not A B: gradients against float64, the papers' claims, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import KEY, distance

import lorax_ft as lft
from lorax_ft import sharding
from lorax_ft.config import MeshConfig
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.models.config import Experts
from lorax_ft.models.decoder import Decoder
from lorax_ft.models.model import LoadedModel
from lorax_ft.tree import Tree, flatten

LoadedShapes = Callable[[], LoadedModel]


def vera(layer: Tree) -> jax.Array:
    return (
        layer["vera_a"]
        @ jnp.diag(layer["vera_lambda_d"])
        @ layer["vera_b"]
        @ jnp.diag(layer["vera_lambda_b"])
    )


def loha(layer: Tree) -> jax.Array:
    first = layer["loha_a1"] @ layer["loha_b1"]
    second = layer["loha_a2"] @ layer["loha_b2"]
    return layer["loha_scale"] * first * second


def lokr(layer: Tree) -> jax.Array:
    right = layer["lokr_right_a"] @ layer["lokr_right_b"]
    return layer["lokr_scale"] * jnp.kron(layer["lokr_left"], right)


def shira(layer: Tree) -> jax.Array:
    zeros = jnp.zeros_like(layer["kernel"])
    return zeros.at[layer["shira_row"], layer["shira_column"]].set(layer["shira_value"])


def hira(layer: Tree) -> jax.Array:
    return layer["kernel"] * (layer["hira_a"] @ layer["hira_b"])


def oft(layer: Tree) -> jax.Array:
    """R W − W, with R = (I + Q)(I + Q + Q² + Q³) of the two blocks of 4 inputs."""
    blocks = []
    for pairs in layer["oft_pairs"]:
        q = jnp.zeros((4, 4)).at[np.triu_indices(4, 1)].set(pairs)
        q = q - q.T
        one = jnp.eye(4)
        blocks.append((one + q) @ (one + q + q @ q + q @ q @ q))
    return jax.scipy.linalg.block_diag(*blocks) @ layer["kernel"] - layer["kernel"]


UPDATES: dict[str, tuple[dict[str, Any], Callable[[Tree], jax.Array]]] = {
    "vera": ({"rank": 5}, vera),
    "loha": ({"rank": 3}, loha),
    "lokr": ({"rank": 1}, lokr),
    "shira": ({"rank": 3}, shira),
    "hira": ({"rank": 3}, hira),
    "oft": ({"oft_block_size": 4}, oft),
}
"""By method: options, and ΔW `[in, out]` written out as in its paper."""


@pytest.mark.parametrize("method", UPDATES)
def test_gradients_equal_a_float64_reference(randomize: Any, method: str) -> None:
    options, update = UPDATES[method]
    dense = nn.Dense(12)
    x = jax.random.normal(KEY, (4, 8))
    params = dense.init(KEY, x)["params"]
    config = lft.AdapterConfig(method=method, **options)  # type: ignore[arg-type]
    layout = lft.layout(dense.apply, params, x)
    params = randomize(lft.add_adapters(params, config, layout=layout, key=KEY))
    trained, frozen = lft.partition(params)

    def loss(trained: Tree, x: jax.Array) -> jax.Array:
        y = lft.adapt(dense.apply)({"params": lft.combine(trained, frozen)}, x)
        return jnp.sum(jnp.sin(y))

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, x)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        trained64, frozen64, x64 = jax.tree.map(as_float64, (trained, frozen, x))

        def loss64(trained: Tree, x: jax.Array) -> jax.Array:
            layer = trained | frozen64
            y = x @ (layer["kernel"] + update(layer)) + layer["bias"]
            return jnp.sum(jnp.sin(y))

        want = jax.jit(jax.grad(loss64, argnums=(0, 1)))(trained64, x64)
    for path, leaf in flatten(got[0]).items():
        assert distance(leaf, want[0][path]) < 5e-6, path
        assert np.abs(leaf).max() > 0, path
    assert distance(got[1], want[1]) < 5e-6


def call(module: nn.Module, params: Tree, x: jax.Array, **options: Any) -> Any:
    """Adapters on a module, and a function of its parameters."""
    config = lft.AdapterConfig(**options)
    layout = lft.layout(module.apply, params, x)
    params = lft.add_adapters(params, config, layout=layout, key=KEY)
    return params, lambda params: lft.adapt(module.apply)({"params": params}, x)


@pytest.mark.parametrize(("method", "products"), [("hira", 2), ("shira", 1)])
def test_whole_updates_are_added_to_the_weight_before_the_one_product(
    randomize: Any, method: str, products: int
) -> None:
    """HiRA has a second one, A B, which no token is in."""
    dense = nn.Dense(12)
    x = jax.random.normal(KEY, (4, 8))
    params, apply = call(dense, dense.init(KEY, x)["params"], x, method=method, rank=2)
    program = str(jax.make_jaxpr(apply)(params))
    assert program.count("dot_general[") == products

    # Dropout acts on the input of ΔW alone, which takes a product of its own.
    params = randomize(params)
    base = x @ params["kernel"] + params["bias"]
    all_dropped = lft.with_dropout(params, KEY, rate=1 - 1e-6)
    assert distance(apply(all_dropped), base) < 1e-6
    assert distance(apply(params), base) > 1e-3


def test_bfloat16_keeps_changes_that_it_would_lose_in_the_sum_with_the_weight() -> None:
    """1 + 2⁻¹⁰ is 1 in bfloat16, so W + ΔW would be W."""
    dense = nn.Dense(1, use_bias=False, dtype=jnp.bfloat16)
    x = jnp.asarray([[1, -1]], jnp.bfloat16)
    weight = {"kernel": jnp.ones((2, 1), jnp.bfloat16)}
    params, apply = call(dense, weight, x, method="hira", rank=1)
    change = {"hira_a": jnp.asarray([[2**-10], [0]]), "hira_b": jnp.ones((1, 1))}
    y = apply(params | change)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0]) == 2**-10


@pytest.mark.parametrize("method", ["hira", "shira"])
def test_whole_updates_of_an_einsum_with_two_axes_of_outputs(randomize: Any, method: str) -> None:
    module = nn.Einsum((8, 3, 4), "bi,iho->bho", use_bias=False)
    x = jax.random.normal(KEY, (5, 8))
    params, apply = call(module, module.init(KEY, x)["params"], x, method=method, rank=2)
    params = randomize(params)
    merged = lft.merge_adapters(params, layout=lft.layout(module.apply, params, x))
    assert distance(apply(params), module.apply({"params": merged}, x)) < 1e-5
    assert distance(merged["kernel"], params["kernel"]) > 1e-3


def as_float64(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    """The shapes of SmolLM2-135M."""
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    hf_config = {"model_type": "llama", "tie_word_embeddings": True} | sizes | heads
    config = decoder_config(hf_config, source="SmolLM2-135M")
    params = jax.eval_shape(Decoder(config).init, KEY, jnp.zeros((1, 2), jnp.int32))["params"]
    return LoadedModel(config=config, params=params)


def trained_count(model: LoadedModel, config: lft.AdapterConfig) -> int:
    found = lft.abstract_adapters(config, model.params, layout=model.layout)
    trained, _ = lft.partition(found)
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def test_vera_trains_two_vectors_a_layer_over_one_random_pair(
    smollm2: LoadedModel, zoo: Any, adapted: Any
) -> None:
    """O + R parameters a matrix, so R may be large; LoRA has (I + O) R (2310.11454, table 1)."""
    targets = ("q_proj", "v_proj")
    vera = lft.AdapterConfig(method="vera", rank=256, targets=targets)
    assert trained_count(smollm2, vera) == 30 * (576 + 256 + 192 + 256)
    lora = lft.AdapterConfig(rank=16, targets=targets)
    assert trained_count(smollm2, lora) == 30 * 16 * (576 + 576 + 576 + 192)
    found = lft.abstract_adapters(vera, smollm2.params, layout=smollm2.layout)
    assert found["vera_a"].shape == (576, 256)
    assert found["vera_b"].shape == (256, 576)
    # All layers are computed with the same two matrices: without them no update is left.
    case = zoo("decoder")
    params = adapted("decoder", "vera-standard")
    moved = jax.tree.map(lambda leaf: leaf + 1, params["layers"])
    changed = params | {"layers": moved}
    off = changed | {"vera_a": 0 * params["vera_a"]}
    base = lft.disable_adapters(changed, changed, layout=case.layout)
    np.testing.assert_array_equal(case.forward(off), case.forward(base))
    assert distance(case.forward(changed), case.forward(off)) > 1e-3


def test_lohas_update_has_the_rank_of_its_factors_squared(randomize: Any) -> None:
    """r² in place of r, with 2 r (I + O) parameters (2108.06098, proposition 1)."""
    dense = nn.Dense(20)
    x = jnp.ones((1, 16))
    params = {"kernel": jnp.zeros((16, 20)), "bias": jnp.zeros(20)}
    layout = lft.layout(dense.apply, params, x)
    for method, rank, reached in (("loha", 3, 9), ("loha", 4, 16), ("lora", 6, 6)):
        config = lft.AdapterConfig(method=method, rank=rank)  # type: ignore[arg-type]
        tuned = randomize(lft.add_adapters(params, config, layout=layout, key=KEY))
        update = lft.merge_adapters(tuned, layout=layout)["kernel"]
        assert np.linalg.matrix_rank(np.float64(update), tol=1e-7) == reached
    loha = lft.AdapterConfig(method="loha", rank=3)
    found, _ = lft.partition(lft.abstract_adapters(loha, params, layout=layout))
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == 2 * 3 * (16 + 20)


def dense_layer(columns: int = 20) -> tuple[nn.Dense, Tree, Any]:
    """A dense layer of 16 inputs, its parameters and layout."""
    dense = nn.Dense(columns)
    x = jnp.ones((1, 16))
    params = dense.init(KEY, x)["params"]
    return dense, params, lft.layout(dense.apply, params, x)


def update_of(method: str, randomize: Any, **options: Any) -> tuple[np.ndarray, Tree, Tree]:
    """ΔW of a dense layer with random leaves, those leaves, and its own parameters."""
    _, params, layout = dense_layer()
    config = lft.AdapterConfig(method=method, **options)  # type: ignore[arg-type]
    tuned = randomize(lft.add_adapters(params, config, layout=layout, key=KEY))
    merged = lft.merge_adapters(tuned, layout=layout)["kernel"]
    return np.float64(merged) - np.float64(params["kernel"]), tuned, params


def test_lokrs_update_is_a_kronecker_product_of_any_rank(randomize: Any) -> None:
    """rank(K₁ ⊗ K₂) = rank(K₁) rank(K₂), with i₁ o₁ + r (i₂ + o₂) parameters (2212.10650)."""
    update, tuned, _ = update_of("lokr", randomize, rank=1, lokr_factor=4)
    assert np.linalg.matrix_rank(update, tol=1e-5) == 4
    trained, _ = lft.partition(tuned)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 4 * 4 + 1 * (4 + 5)
    update, tuned, _ = update_of("lokr", randomize, rank=3, lokr_factor=4)
    assert "lokr_right" in tuned  # as in PEFT, where the rank is at least half of its larger side
    assert np.linalg.matrix_rank(update, tol=1e-5) == 16


def test_shira_changes_few_elements_and_has_a_high_rank(randomize: Any) -> None:
    """r (I + O) elements of W change, and no others (2406.13175)."""
    update, tuned, params = update_of("shira", randomize, rank=1)
    assert np.count_nonzero(update) == 16 + 20
    assert np.linalg.matrix_rank(update, tol=1e-6) > 8
    with pytest.raises(ValueError, match=r"rank 9 trains 324 elements, .* 16 × 20 has 320"):
        update_of("shira", randomize, rank=9)
    # Two seeds change other elements, so that two adapters hardly meet.
    _, _, layout = dense_layer()
    config = lft.AdapterConfig(method="shira", rank=1)
    other = lft.add_adapters(params, config, layout=layout, key=jax.random.key(1))
    mine = set(zip(tuned["shira_row"].tolist(), tuned["shira_column"].tolist(), strict=True))
    theirs = set(zip(other["shira_row"].tolist(), other["shira_column"].tolist(), strict=True))
    assert len(mine) == len(theirs) == 36
    assert len(mine & theirs) < 18


def test_hiras_update_may_have_the_rank_of_the_weight(randomize: Any) -> None:
    """rank(W ∘ A B) reaches rank(W) with LoRA's parameters (HiRA, ICLR 2025)."""
    update, tuned, _ = update_of("hira", randomize, rank=2)
    assert np.linalg.matrix_rank(update, tol=1e-6) == 16
    trained, _ = lft.partition(tuned)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 2 * (16 + 20)


def test_oft_keeps_the_norms_and_angles_of_the_columns(randomize: Any) -> None:
    """R is nearly orthogonal for small Q, so WᵀW stays (2506.19847); the error falls as Q⁴."""
    errors = []
    for size in (0.05, 0.025):
        _, params, layout = dense_layer()
        config = lft.AdapterConfig(method="oft", oft_block_size=8)
        fresh = lft.add_adapters(params, config, layout=layout, key=KEY)
        tuned = randomize(fresh, size=size)
        merged = np.float64(lft.merge_adapters(tuned, layout=layout)["kernel"])
        w = np.float64(params["kernel"])
        assert distance(merged, w) > size / 2
        errors.append(np.abs(merged.T @ merged - w.T @ w).max() / np.abs(w.T @ w).max())
    assert errors[0] < 5e-3
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("lokr", "is of the type experts, and lokr is for dense layers only; exclude it"),
        ("oft", "is of the type experts, and oft is for dense layers only; exclude it"),
        ("shira", "shira would form a whole matrix for each expert at once; exclude"),
        ("hira", "hira would form a whole matrix for each expert at once; exclude"),
    ],
)
def test_experts_are_refused_where_they_make_no_sense(decoder: Any, method: str, said: str) -> None:
    model = decoder(experts=Experts(count=4, top_k=2, renormalized=True))
    config = lft.AdapterConfig(method=method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        lft.abstract_adapters(config, model.params, layout=model.layout)


def test_a_layer_of_vera_alone_lacks_what_all_layers_share(adapted: Any) -> None:
    layer = adapted("vit_unrolled", "vera-standard")["layers"]["0"]["up"]
    for compute in (lft.merged_kernel, lambda layer: lft.linear(layer, jnp.ones((1, 16)), jnp.dot)):
        with pytest.raises(ValueError, match="vera_lambda_d but no vera_a and vera_b, which lie"):
            compute(layer)


def test_a_mesh_does_not_change_what_layers_use_of_a_shared_matrix(
    decoder: Any, randomize: Any
) -> None:
    """q_proj uses some rows of A, and down_proj all: XLA took other rows on such a mesh."""
    model = decoder()
    config = lft.AdapterConfig(method="vera", rank=16, targets=("q_proj", "down_proj"))
    params = randomize(lft.add_adapters(model.params, config, layout=model.layout, key=KEY))
    tokens = jnp.arange(64).reshape(8, 8)

    @jax.jit
    def features(params: Tree) -> jax.Array:
        return model.apply({"params": params}, tokens)

    want = features(params)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = sharding.DECODER_RULES
    places = sharding.param_shardings(params, rules, layout=model.layout, mesh=mesh)
    with jax.set_mesh(mesh):
        got = features(jax.device_put(params, places))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("method", UPDATES)
def test_embeddings_are_refused(decoder: Any, method: str) -> None:
    model = decoder()
    config = lft.AdapterConfig(method=method, targets=("embed_tokens",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"embed_tokens: {method} is not for embeddings; exclude"):
        lft.add_adapters(model.params, config, layout=model.layout, key=KEY)


def test_oft_refuses_blocks_that_cannot_rotate() -> None:
    """97 inputs divide into blocks of 1 or of 97, and a block of 1 has no angle."""
    dense = nn.Dense(3)
    x = jnp.ones((1, 97))
    params = dense.init(KEY, x)["params"]
    with pytest.raises(ValueError, match="OFT would have blocks of one of its 97 inputs"):
        call(dense, params, x, method="oft", oft_block_size=32)
