"""The papers' claims about adapters and their initialization, one test per claim."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import distance

from lorax_ft import (
    AdapterConfig,
    add_adapters,
    combine,
    linear,
    merge_adapters,
    merged_kernel,
    partition,
)
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.lowrank.terms.magnitude import column_norm
from lorax_ft.models.decoder import Decoder
from lorax_ft.models.model import LoadedModel
from lorax_ft.tree import flatten, modules

KEY = jax.random.key(11)

pytestmark = pytest.mark.usefixtures("strict")


def test_claim_1_a_fresh_adapter_is_the_base(zoo: Any) -> None:
    """LoRA (2106.09685), rsLoRA (2312.03732): bitwise; DoRA (2402.09353): to 1e-6."""
    case = zoo("decoder")
    base = case.plain(case.params)
    for fields in ({}, {"scaling": "rank_stabilized"}, {"dora": True}):
        config = AdapterConfig(rank=4, **fields)
        fresh = case.forward(add_adapters(case.params, config, layout=case.layout, key=KEY))
        if "dora" in fields:
            np.testing.assert_allclose(fresh, base, atol=1e-6)
        else:
            np.testing.assert_array_equal(fresh, base)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 64.0])
@pytest.mark.parametrize("iterations", [None, 4])
def test_claim_2_pissas_residual_and_factors_make_up_the_base(
    zoo: Any, alpha: float, iterations: int | None
) -> None:
    """W' + s A B = W for any alpha, to 5e-7 in float32 (2404.02948)."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, alpha=alpha, init="pissa", svd_iterations=iterations)
    params = add_adapters(case.params, config, layout=case.layout, key=KEY)
    base = modules(case.params)
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            s, a, b = (np.float64(layer[name]) for name in ("lora_scale", "lora_a", "lora_b"))
            error = (
                np.float64(layer["kernel"])
                + s[:, None, None] * (a @ b)
                - np.float64(base[path]["kernel"])
            )
            assert np.abs(error).max() < 5e-7
            assert distance(layer["kernel"], base[path]["kernel"]) > 0.05


@pytest.mark.parametrize("alpha", [1.0, 4.0, 64.0])
def test_claim_2_miloras_adapter_is_orthogonal_to_what_stays(zoo: Any, alpha: float) -> None:
    """W' + s A B = W for any alpha (relative error 5e-7); A and B avoid W's principal subspace.

    MiLoRA (2406.09044).
    """
    case = zoo("decoder")
    params = add_adapters(
        case.params, AdapterConfig(rank=4, alpha=alpha, init="milora"), layout=case.layout, key=KEY
    )
    base = modules(case.params)
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            s, a, b, left = (
                np.float64(layer[name]) for name in ("lora_scale", "lora_a", "lora_b", "kernel")
            )
            w = np.float64(base[path]["kernel"])
            assert np.abs(left + s[:, None, None] * (a @ b) - w).max() < 5e-7 * np.abs(w).max()
            u, sizes, vt = np.linalg.svd(w, full_matrices=False)
            assert np.abs(u[..., :-4].swapaxes(1, 2) @ a).max() < 1e-6 * np.abs(a).max()
            assert np.abs(b @ vt[..., :-4, :].swapaxes(1, 2)).max() < 1e-6 * np.abs(b).max()
            kept = np.linalg.norm(
                np.concatenate([sizes[..., :-4], 0 * sizes[..., -4:]], -1), axis=-1
            )
            np.testing.assert_allclose(np.linalg.norm(left, axis=(1, 2)), kept, rtol=1e-6)


def test_mica_trains_a_over_the_directions_that_the_base_uses_least(zoo: Any) -> None:
    """B = V_mᵀ is frozen, A = 0, and B is orthogonal to W's other directions (2604.01694)."""
    case = zoo("decoder")
    targets = ("q_proj", "down_proj", "embed_tokens")
    config = AdapterConfig(rank=4, init="mica", freeze=("lora_b",), targets=targets)
    params = add_adapters(case.params, config, layout=case.layout, key=KEY)
    trained, _ = partition(params, freeze=config.freeze)
    assert {path.rpartition("/")[2] for path in flatten(trained)} == {"lora_a"}
    for layer in modules(params).values():
        if "lora_b" in layer:
            w = np.float64(layer["kernel"] if "kernel" in layer else layer["embedding"])
            b = np.float64(layer["lora_b"])
            assert not layer["lora_a"].any()
            product = b @ b.swapaxes(-1, -2)
            np.testing.assert_allclose(
                product, np.broadcast_to(np.eye(4), product.shape), atol=1e-6
            )
            _, _, vt = np.linalg.svd(w, full_matrices=False)
            assert np.abs(b @ vt[..., :-4, :].swapaxes(-1, -2)).max() < 1e-5
    with pytest.raises(
        ValueError, match=r"init mica .* frozen lora_b; give --adapter.freeze lora_b"
    ):
        AdapterConfig(init="mica")


@pytest.mark.parametrize("pattern", [(), ("layers/1/.*=2",)])
def test_an_orthogonal_start_is_the_base_and_both_factors_learn_at_once(
    zoo: Any, pattern: tuple[str, ...]
) -> None:
    """A B = 0 for every matrix of a stack at its rank; A and B are not 0 (PEFT: orthogonal)."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, init="orthogonal", rank_pattern=pattern)
    params = add_adapters(case.params, config, layout=case.layout, key=KEY)
    trained, frozen = partition(params)
    for layer in modules(params).values():
        if "lora_a" in layer:
            a, b = np.float64(layer["lora_a"]), np.float64(layer["lora_b"])
            assert np.abs(a @ b).max() < 1e-6 * np.abs(a).max() * np.abs(b).max()
            for i in range(3):
                rank = 2 if pattern and i == 1 else 4
                assert (
                    np.linalg.matrix_rank(a[i], tol=1e-5)
                    == np.linalg.matrix_rank(b[i], tol=1e-5)
                    == rank // 2
                )
                assert [np.count_nonzero(a[i].any(0)), np.count_nonzero(b[i].any(1))] == [
                    rank,
                    rank,
                ]
            assert np.std(a) == pytest.approx(
                0.1 * np.sqrt(np.mean([4, 2 if pattern else 4, 4]) / 8), rel=0.2
            )
    g = jax.jit(
        jax.grad(
            lambda t: jnp.sum(jnp.sin(case.apply({"params": combine(t, frozen)}, *case.example)))
        )
    )(trained)
    for path, leaf in flatten(g).items():
        assert all(np.abs(matrix).max() > 0 for matrix in leaf), path
    with pytest.raises(
        ValueError,
        match=r"adapter.init orthogonal splits the rank in two halves, and the rank is 3",
    ):
        AdapterConfig(rank=3, init="orthogonal")


def test_claim_3_merged_equals_unmerged(zoo: Any, randomize: Any) -> None:
    """Equal to 1e-5; merging does not modify the adapted parameters, so no unmerge is needed."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, init="pissa", dora=True, scaling="rank_stabilized")
    params = randomize(add_adapters(case.params, config, layout=case.layout, key=KEY))
    before = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    merged = merge_adapters(params, layout=case.layout)
    assert distance(case.plain(merged), case.forward(params)) < 1e-5
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_claim_4_pissa_is_plain_lora_of_twice_the_rank(zoo: Any, randomize: Any) -> None:
    """W' + s A B = W + s [A, A₀] [B; −B₀], to 1e-6."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, alpha=6.0, init="pissa")
    params = randomize(add_adapters(case.params, config, layout=case.layout, key=KEY), size=0.05)
    plain = modules(case.params)
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            plain[path] = plain[path] | {
                "lora_a": jnp.concatenate([layer["lora_a"], layer["lora_a0"]], axis=-1),
                "lora_b": jnp.concatenate([layer["lora_b"], -layer["lora_b0"]], axis=-2),
                "lora_scale": jnp.full(3, 2 * config.alpha / (2 * config.rank)),
            }
            want = np.asarray(merged_kernel(layer))
            np.testing.assert_allclose(
                merged_kernel(plain[path]), want, atol=1e-6 * np.abs(want).max()
            )


@pytest.mark.parametrize(
    ("removed", "tolerance"), [(0.0, 1e-6), (0.9, 2e-6), (0.99, 2e-5), (0.999, 2e-4)]
)
def test_claim_7_the_norm_where_the_adapter_nearly_cancels_the_kernel(
    removed: float, tolerance: float
) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(64, 4)).astype(np.float32), rng.normal(size=(4, 48)).astype(np.float32)
    kernel = (np.float64(a) @ np.float64(b) + (1 - removed) * rng.normal(size=(64, 48))).astype(
        np.float32
    )
    layer = {
        "kernel": kernel,
        "lora_a": a,
        "lora_b": b,
        "lora_scale": np.float32(-1 if removed else 1),
    }
    dense = np.float64(kernel) + np.float64(layer["lora_scale"]) * (np.float64(a) @ np.float64(b))
    got = column_norm({name: jnp.asarray(leaf) for name, leaf in layer.items()})
    assert np.abs(got / np.linalg.norm(dense, axis=0) - 1).max() < tolerance


@pytest.mark.parametrize("dropout", [False, True])
def test_claim_7_a_gain_near_one_is_not_erased_in_bfloat16(dropout: bool) -> None:
    """m / n − 1 = 1e-3, the size of the magnitude's first updates, would round to 0 in bfloat16.

    The spacing of bfloat16 at 1 is 8e-3.
    """
    x = 1000 * jnp.ones((1, 4), jnp.bfloat16)
    layer = {
        "kernel": jnp.eye(4, dtype=jnp.bfloat16),
        "lora_a": jnp.zeros((4, 2)),
        "lora_b": jnp.zeros((2, 4)),
    }
    layer |= {"lora_scale": jnp.float32(1), "magnitude": jnp.full(4, 1 + 4e-3), "norm": jnp.ones(4)}
    layer |= {"dropout_key": KEY, "dropout_rate": jnp.float32(1e-6)} if dropout else {}
    # The spacing of bfloat16 at 1000 is 4.
    assert np.float32(linear(layer, x, jnp.matmul)).max() == 1004


def test_claim_8_counts_of_smollm2() -> None:
    """All linear layers have 305,280 · r adapter parameters; DoRA adds 155,520."""
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
    }
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = decoder_config({"model_type": "llama"} | sizes | heads, source="SmolLM2-135M")
    params = jax.eval_shape(Decoder(config).init, KEY, jnp.zeros((1, 2), jnp.int32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    model = LoadedModel(config=config, params=params)
    for rank in (1, 8):
        adapter = AdapterConfig(rank=rank, dora=True)
        found = jax.eval_shape(
            lambda p, c=adapter: add_adapters(p, c, layout=model.layout, key=KEY), params
        )
        sizes: dict[str, int] = {}
        for path, leaf in flatten(partition(found)[0]).items():
            name = path.rpartition("/")[2]
            sizes[name] = sizes.get(name, 0) + leaf.size
        assert sizes["lora_a"] + sizes["lora_b"] == 305_280 * rank
        assert sizes["magnitude"] == 155_520
