"""Every method in every model: it starts as the base, leaves it unchanged, and merges exactly."""

from __future__ import annotations

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import (
    CASES,
    EVERYWHERE,
    KEY,
    TABLE,
    Adapted,
    adapter_config,
    changes_base,
    distance,
)

from lorax_ft import (
    AdapterConfig,
    abstract_adapters,
    adapt,
    add_adapters,
    disable_adapters,
    layout,
    merge_adapters,
    merge_weighted,
    merged_kernel,
    unmerge_adapters,
)
from lorax_ft.config import QuantConfig
from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.pissa import pissa
from lorax_ft.lowrank.module_leaves import _subtracted_in_place
from lorax_ft.lowrank.quantize import quantize_base
from lorax_ft.schema import is_adapter, leaf_schema
from lorax_ft.tree import flatten, split, unflatten

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("model", "method"), CASES)
def test_starts_as_the_base(zoo: Any, adapted: Adapted, model: str, method: str) -> None:
    case = zoo(model)
    start, base = case.forward(adapted(model, method)), case.plain(case.params)
    if changes_base(method):
        assert distance(start, base) < 1e-5
    elif method.startswith("lora_one"):  # it starts one full fine-tuning step away
        assert distance(start, base) > 1e-3
    elif method.endswith("dora") or method.startswith(("orthogonal", "ia3", "hira", "shira")):
        # Their sums and factors are 0 and 1 only to rounding, or XLA fuses them into the product.
        assert distance(start, base) < 1e-6
    else:
        np.testing.assert_array_equal(start, base)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("model", "method"), CASES)
def test_merged_equals_forward_with_random_factors(
    zoo: Any, adapted: Adapted, randomize: Any, model: str, method: str
) -> None:
    case = zoo(model)
    params = randomize(adapted(model, method))
    merged = merge_adapters(params, layout=case.layout)
    forward, base = case.forward(params), case.plain(case.params)
    assert distance(case.plain(merged), forward) < 1e-5
    assert distance(base, forward) > 1e-2
    untied = {"lm_head/kernel"} if model == "decoder" else set()
    assert set(flatten(merged)) == set(flatten(nn.meta.unbox(case.params))) | untied


@pytest.mark.parametrize(
    "method",
    ["kaiming-standard", "pissa-rank_stabilized", "pissa_kept-rank_stabilized", "olora-standard"],
)
def test_unmerging_restores_the_base(
    zoo: Any, adapted: Adapted, randomize: Any, method: str
) -> None:
    case = zoo("einsums")
    params = randomize(adapted("einsums", method))
    merged = merge_adapters(params, layout=case.layout)
    back = flatten(unmerge_adapters(merged, params, layout=case.layout))
    for path, leaf in flatten(params).items():
        if path in back:
            assert distance(back[path], leaf) < 1e-5, path
    assert any(distance(leaf, back[path]) > 1e-3 for path, leaf in flatten(merged).items())
    with pytest.raises(ValueError, match="the base cannot be recovered"):
        unmerge_adapters(merged, adapted("einsums", "gaussian-standard-dora"), layout=case.layout)


def test_several_adapters_merge_with_weights(zoo: Any, adapted: Adapted, randomize: Any) -> None:
    """The weight change of the sum is the sum of the changes, also for DoRA and embeddings."""
    case = zoo("decoder")
    methods = ("kaiming-standard", "pissa_kept-rank_stabilized-dora")
    targets = ("all-linear", "embed_tokens")
    parts = [
        randomize(adapted("decoder", method, targets=targets), seed=i)
        for i, method in enumerate(methods)
    ]
    got = flatten(merge_weighted(case.params, parts, [0.7, -0.4], layout=case.layout))
    alone = [flatten(merge_adapters(part, layout=case.layout)) for part in parts]
    base = flatten(case.params)
    base["lm_head/kernel"] = base["embed_tokens/embedding"].T
    assert set(got) == set(base)
    for path, leaf in got.items():
        want = (
            base[path] + 0.7 * (alone[0][path] - base[path]) - 0.4 * (alone[1][path] - base[path])
        )
        assert distance(leaf, want) < 1e-6, path
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        merge_weighted(case.params, parts, [1.0], layout=case.layout)


def test_a_tied_table_that_changed_changes_the_head_of_the_sum(
    zoo: Any, adapted: Adapted, randomize: Any
) -> None:
    """One tree has a changed table, still tied; the other has an adapter on the head."""
    case = zoo("decoder")
    table = {"embed_tokens": {"embedding": case.params["embed_tokens"]["embedding"] + 0.1}}
    whole, head = (
        case.params | table,
        randomize(adapted("decoder", "kaiming-standard", targets=("lm_head",))),
    )
    base = case.params["embed_tokens"]["embedding"].T
    alone = merge_adapters(head, layout=case.layout)["lm_head"]["kernel"]
    merged = merge_weighted(case.params, [whole, head], [1.0, 1.0], layout=case.layout)
    assert distance(merged["lm_head"]["kernel"], alone + 0.1) < 1e-6
    assert distance(merged["embed_tokens"]["embedding"], (base + 0.1).T) < 1e-6
    assert "lm_head" not in merge_weighted(case.params, [whole], [1.0], layout=case.layout)


def test_a_weighted_merge_rounds_once(zoo: Any, adapted: Adapted, randomize: Any) -> None:
    """On a bfloat16 base, a small change with a large merge weight is not rounded away."""
    case = zoo("decoder")
    params = randomize(adapted("decoder", "kaiming-standard", targets=("up_proj",)))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    small = unflatten(
        {
            p: leaf.astype(jnp.bfloat16)
            if p in flatten(half)
            else leaf / (30 if p.endswith("lora_b") else 1)
            for p, leaf in flatten(params).items()
        }
    )
    got = merge_weighted(half, [small], [8.0], layout=case.layout)["layers"]["mlp"]["up_proj"][
        "kernel"
    ]
    exact = merged_kernel(
        {
            name: leaf.astype(jnp.float32) * (8 if name == "lora_scale" else 1)
            for name, leaf in small["layers"]["mlp"]["up_proj"].items()
        }
    )
    error = np.abs(np.asarray(got, np.float64) - np.asarray(exact, np.float64))
    assert np.all(error <= (2**-8 + 1e-5) * np.abs(exact))  # half the spacing of bfloat16


def test_switched_off_is_the_base_in_the_same_structure(
    zoo: Any, adapted: Adapted, randomize: Any
) -> None:
    case = zoo("decoder")
    plain = case.plain(case.params)
    for method in (
        "kaiming-standard-dora",
        "pissa-rank_stabilized",
        "pissa-standard-dora",
        "pissa_kept-standard-dora",
    ):
        params = randomize(adapted("decoder", method))
        off = disable_adapters(params, case.params, layout=case.layout)
        assert jax.tree.map(jnp.shape, off) == jax.tree.map(jnp.shape, params)
        assert distance(case.forward(off), plain) < 2e-5, method
        assert distance(case.forward(params), plain) > 1e-2, method
    whole = params | {
        "norm": {"scale": 2 * params["norm"]["scale"]},
        "lm_head": {"kernel": jnp.ones((32, 97))},
    }
    assert (
        distance(case.forward(disable_adapters(whole, case.params, layout=case.layout)), plain)
        < 2e-5
    )


@pytest.mark.parametrize(("model", "method"), CASES)
def test_adding_leaves_the_base_as_it_was(
    zoo: Any, adapted: Adapted, model: str, method: str
) -> None:
    """Only the adapter's leaves are new, and only PiSSA without `keep_base` changes kernels."""
    base, params = flatten(nn.meta.unbox(zoo(model).params)), flatten(adapted(model, method))
    new = {path.rpartition("/")[2] for path in params.keys() - base.keys()}
    assert all(map(is_adapter, new))
    assert ("magnitude" in new) == method.endswith("dora")
    assert ("lora_a0" in new) == changes_base(method)
    moved = {path for path, leaf in base.items() if not np.array_equal(leaf, params[path])}
    if not changes_base(method) or "kept" in method:
        assert moved == set()
    else:
        assert moved == {
            p for p in base if p.endswith("kernel") and f"{p.rpartition('/')[0]}/lora_a0" in params
        }
    adapter = {path: leaf for path, leaf in params.items() if path not in base}
    for path, leaf in adapter.items():
        assert leaf.dtype == leaf_schema(path.rpartition("/")[2]).dtype, path


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["params", "activations"])
@pytest.mark.parametrize("jit", [False, True])
def test_a_zero_adapter_is_bitwise_the_base_in_bfloat16(
    decoder: Any, dtype: str, jit: bool
) -> None:
    model = decoder(dtype="bfloat16", layers=2)
    params = model.params
    if dtype == "params":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    config = AdapterConfig(rank=4, targets=("all-linear", "lm_head", "embed_tokens"))
    fresh = add_adapters(params, config, layout=model.layout, key=KEY)
    tokens = jnp.arange(18).reshape(2, 9)
    run = jax.jit(model.apply) if jit else model.apply
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention promotes
        np.testing.assert_array_equal(
            run({"params": fresh}, tokens), run({"params": params}, tokens)
        )


def test_a_zero_adapter_keeps_the_type_that_the_layer_promotes_to() -> None:
    with jax.numpy_dtype_promotion("standard"):
        layer = nn.Dense(8)
        x = jax.random.normal(KEY, (3, 6), jnp.bfloat16)
        params = layer.init(KEY, x)["params"]
        params = {"kernel": params["kernel"].astype(jnp.bfloat16), "bias": params["bias"] + 0.1}
        fresh = add_adapters(
            params, AdapterConfig(rank=2), layout=layout(layer.apply, params, x), key=KEY
        )
        got, want = adapt(layer.apply)({"params": fresh}, x), layer.apply({"params": params}, x)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("method", TABLE)
def test_shapes_are_known_without_arrays(zoo: Any, adapted: Adapted, method: str) -> None:
    for model in ("decoder", "einsums", "convolutions"):
        case = zoo(model)
        if method not in EVERYWHERE and model != "decoder":
            continue
        config = adapter_config(model, method)
        shapes = jax.eval_shape(lambda params: params, nn.meta.unbox(case.params))
        abstract = abstract_adapters(config, shapes, layout=case.layout)
        added, _ = split(adapted(model, method), is_adapter)
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, added)


def test_an_init_on_the_host_cannot_be_traced(zoo: Any) -> None:
    case = zoo("decoder")
    for init in ("pissa", "milora"):
        config = AdapterConfig(rank=3, init=init)
        with pytest.raises(ValueError, match=r"exact SVD on the host.*abstract_adapters"):
            jax.eval_shape(
                lambda p, c=config: add_adapters(p, c, layout=case.layout, key=KEY), case.params
            )


# -------------------- memory


def test_an_init_sees_as_many_matrices_as_fit(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, where no two fit into `CHUNK_BYTES`; and each starts as it does among others."""
    case = zoo("decoder")
    config = AdapterConfig(rank=3, init="pissa", targets=("down_proj",))
    want = add_adapters(case.params, config, layout=case.layout, key=KEY)
    seen = []

    def counted(context: InitContext) -> InitResult:
        seen.append(context.shape)
        return pissa(context)

    monkeypatch.setattr("lorax_ft.lowrank.inits.svd.CHUNK_BYTES", 8 * 48 * 32)
    got = add_adapters(case.params, config, layout=case.layout, key=KEY, init=counted)
    assert seen == [(1, 48, 32)] * 3
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("format", [None, "nf4"])
def test_a_donated_base_is_not_held_beside_the_new_one(zoo: Any, format: Any) -> None:
    case = zoo("decoder")
    # Copies, since other tests use the zoo's own arrays.
    params = jax.tree.map(jnp.copy, case.params)
    originals: Any = {}
    if format is not None:
        quantization = QuantConfig(format=format)
        params, originals = quantize_base(params, quantization, layout=case.layout)
    config = AdapterConfig(rank=3, init="pissa", svd_iterations=1, targets=("down_proj",))
    start = functools.partial(
        add_adapters, params, config, layout=case.layout, key=KEY, originals=originals
    )
    want = start()
    got = start(donate=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for path, leaf in flatten(params).items():
        parts = jax.tree.leaves(leaf)
        assert all(part.is_deleted() == ("down_proj" in path) for part in parts), path


def test_a_start_is_subtracted_in_place() -> None:
    """Beside the stack itself there are a few matrices in float32, not another stack."""
    count, size, rank = 16, 64, 2
    shapes = ((count, size, size), (count, size, rank), (count, rank, size), (count,))
    w, a, b, scale = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    start = {"lora_a0": a, "lora_b0": b, "lora_scale": scale}
    compiled = _subtracted_in_place.lower(w, start).compile()
    memory = compiled.memory_analysis()
    stack, matrix = 4 * count * size**2, 4 * size**2
    assert memory.alias_size_in_bytes == stack
    assert memory.temp_size_in_bytes < 4 * matrix
