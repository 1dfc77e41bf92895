"""One table of cases that every method joins with a line: start, merge and gradients, in every kind of model."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lorax_ft import (
    AdapterConfig,
    adapt,
    add_adapters,
    combine,
    label,
    layout,
    linear,
    merge_adapters,
    merge_weighted,
    merged_kernel,
    partition,
    switched_off,
    unmerge_adapters,
    with_dropout,
    with_norms,
)
from lorax_ft.lowrank import linear as linear_module
from lorax_ft.lowrank.adapters import kernel_shapes
from lorax_ft.lowrank.layout import logical_paths
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, column_norm
from lorax_ft.lowrank.statistics import needed_statistics
from lorax_ft.lowrank.svd import exact, randomised, svd
from lorax_ft.tree import Tree, flatten, modules, unflatten

INITS: dict[str, dict[str, Any]] = {
    "kaiming": {"init": "kaiming"},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "pissa_randomised": {"init": "pissa", "svd_iterations": 2},
    "pissa_kept": {"init": "pissa", "keep_base": True},
    "olora": {"init": "olora"},
    "milora": {"init": "milora"},
    "orthogonal": {"init": "orthogonal", "rank": 4},
    "eva": {"init": "eva"},
    "corda": {"init": "corda"},
    "corda_first_kept": {"init": "corda", "corda_mode": "ipm", "keep_base": True},
    "lora_ga": {"init": "lora_ga", "rank": 2},  # which takes 2 r singular vectors of a matrix with 5
    "lora_one": {"init": "lora_one", "lora_one_gamma": 1.0},
}
TABLE: dict[str, dict[str, Any]] = {
    f"{init}-{scaling}{'-dora' if dora else ''}": {**fields, "scaling": scaling, "dora": dora}
    for (init, fields), scaling, dora in itertools.product(
        INITS.items(), ("standard", "rank_stabilized"), (False, True)
    )
}
EVERYWHERE = ("kaiming-standard", "gaussian-standard-dora", "pissa-rank_stabilized", "pissa_kept-rank_stabilized-dora")
MODELS = ("vit_scanned", "convolutions", "einsums", "boxed")
VARIANTS = ("decoder_untied", "vit_unrolled", "vit_rematted")
CASES = [
    *(("decoder", method) for method in TABLE),
    *itertools.product(MODELS, EVERYWHERE),
    *((model, EVERYWHERE[-1]) for model in VARIANTS),
    *itertools.product(("convolutions", "einsums"), ("eva-standard", "corda-standard", "lora_one-standard-dora")),
]
TARGETS = {"decoder": ("all-linear", "lm_head"), "decoder_untied": ("all-linear", "lm_head", "embed_tokens")}
KEY = jax.random.key(7)

pytestmark = pytest.mark.usefixtures("strict")
Adapted = Callable[..., Tree]


@pytest.fixture(scope="session")
def adapted(zoo: Any) -> Adapted:
    """The parameters of a model of the zoo with a method of the table: `adapted(model, method, rank=4)`."""

    @functools.cache
    def build(model: str, method: str, **fields: Any) -> Tree:
        case = zoo(model)
        known = {"rank": 3, "alpha": 6.0, "targets": TARGETS.get(model, ("all-linear",))}
        config = AdapterConfig(**(known | TABLE[method] | fields))
        return add_adapters(
            case.params, config, layout=case.layout, key=KEY, statistics=random_statistics(case, config)
        )

    return build


def random_statistics(case: Any, config: AdapterConfig) -> dict[str, np.ndarray]:
    """Of the shapes that the init needs, the same for a matrix stacked or not; covariances are positive definite."""
    shapes = kernel_shapes(case.params, case.layout)
    found = {}
    for path, needed in needed_statistics(config, layout=case.layout, shapes=shapes).items():
        names = enumerate(logical_paths(path, case.layout[path], shapes[path]))
        seeds = [zlib.crc32(name.encode()) + (i if name == path else 0) for i, name in names]
        drawn = np.stack([np.random.default_rng(seed).normal(size=needed.shape[-2:]) for seed in seeds])
        g = drawn.reshape(needed.shape).astype(np.float32)
        found[path] = g if config.init.startswith("lora") else g @ g.swapaxes(-1, -2)
    return found


def changes_base(method: str) -> bool:
    return method.startswith(("pissa", "milora", "olora", "loftq", "corda", "lora_ga"))


def distance(got: Array, want: Array) -> float:
    """The largest difference, relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize(("model", "method"), CASES)
def test_starts_as_the_base(zoo: Any, adapted: Adapted, model: str, method: str) -> None:
    case = zoo(model)
    start, base = case.forward(adapted(model, method)), case.plain(case.params)
    if changes_base(method):
        assert distance(start, base) < 1e-5
    elif method.startswith("lora_one"):  # a step of full fine-tuning away from it
        assert distance(start, base) > 1e-3
    elif method.endswith("dora") or method.startswith("orthogonal"):
        assert distance(start, base) < 1e-6
    else:
        np.testing.assert_array_equal(start, base)


@pytest.mark.parametrize(("model", "method"), CASES)
def test_merged_equals_forward_with_random_factors(
    zoo: Any, adapted: Adapted, randomise: Any, model: str, method: str
) -> None:
    case = zoo(model)
    params = randomise(adapted(model, method))
    merged = merge_adapters(params, layout=case.layout)
    forward, base = case.forward(params), case.plain(case.params)
    assert distance(case.plain(merged), forward) < 1e-5
    assert distance(base, forward) > 1e-2
    untied = {"lm_head/kernel"} if model == "decoder" else set()
    assert set(flatten(merged)) == set(flatten(nn.meta.unbox(case.params))) | untied


@pytest.mark.parametrize(
    "method", ["kaiming-standard", "pissa-rank_stabilized", "pissa_kept-rank_stabilized", "olora-standard"]
)
def test_unmerging_restores_the_base(zoo: Any, adapted: Adapted, randomise: Any, method: str) -> None:
    case = zoo("einsums")
    params = randomise(adapted("einsums", method))
    merged = merge_adapters(params, layout=case.layout)
    back = flatten(unmerge_adapters(merged, params, layout=case.layout))
    for path, leaf in flatten(params).items():
        if path in back:
            assert distance(back[path], leaf) < 1e-5, path
    assert any(distance(leaf, back[path]) > 1e-3 for path, leaf in flatten(merged).items())
    with pytest.raises(ValueError, match="do not tell the base"):
        unmerge_adapters(merged, adapted("einsums", "gaussian-standard-dora"), layout=case.layout)


def test_several_adapters_merge_with_weights(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    """The change of the sum is the sum of the changes, DoRA's and embeddings' too."""
    case = zoo("decoder")
    methods = ("kaiming-standard", "pissa_kept-rank_stabilized-dora")
    targets = ("all-linear", "embed_tokens")
    parts = [randomise(adapted("decoder", method, targets=targets), seed=i) for i, method in enumerate(methods)]
    got = flatten(merge_weighted(case.params, parts, [0.7, -0.4], layout=case.layout))
    alone = [flatten(merge_adapters(part, layout=case.layout)) for part in parts]
    base = flatten(case.params)
    base["lm_head/kernel"] = base["embed_tokens/embedding"].T
    assert set(got) == set(base)
    for path, leaf in got.items():
        want = base[path] + 0.7 * (alone[0][path] - base[path]) - 0.4 * (alone[1][path] - base[path])
        assert distance(leaf, want) < 1e-6, path
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        merge_weighted(case.params, parts, [1.0])


def test_a_tied_table_that_changed_changes_the_head_of_the_sum(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    """One tree has another table, still tied; the other an adapter on the head."""
    case = zoo("decoder")
    table = {"embed_tokens": {"embedding": case.params["embed_tokens"]["embedding"] + 0.1}}
    whole, head = case.params | table, randomise(adapted("decoder", "kaiming-standard", targets=("lm_head",)))
    base = case.params["embed_tokens"]["embedding"].T
    for known in (case.layout, None):
        alone = merge_adapters(head, layout=known)["lm_head"]["kernel"]
        merged = merge_weighted(case.params, [whole, head], [1.0, 1.0], layout=known)
        assert distance(merged["lm_head"]["kernel"], alone + 0.1) < 1e-6
        assert distance(merged["embed_tokens"]["embedding"], (base + 0.1).T) < 1e-6
        assert "lm_head" not in merge_weighted(case.params, [whole], [1.0], layout=known)


def test_a_weighted_merge_rounds_once(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    """Over a bfloat16 base a small change times a large weight is not lost to the rounding before it."""
    case = zoo("decoder")
    params = randomise(adapted("decoder", "kaiming-standard", targets=("up_proj",)))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    small = unflatten(
        {p: leaf.astype(jnp.bfloat16) if p in flatten(half) else leaf / (30 if p.endswith("lora_b") else 1)
         for p, leaf in flatten(params).items()}
    )  # fmt: skip
    got = merge_weighted(half, [small], [8.0], layout=case.layout)["layers"]["mlp"]["up_proj"]["kernel"]
    exact = merged_kernel(
        {name: leaf.astype(jnp.float32) * (8 if name == "lora_scale" else 1) for name, leaf in
         small["layers"]["mlp"]["up_proj"].items()}
    )  # fmt: skip
    error = np.abs(np.asarray(got, np.float64) - np.asarray(exact, np.float64))
    assert np.all(error <= (2**-8 + 1e-5) * np.abs(exact))  # half a step of bfloat16


def test_switched_off_is_the_base_in_the_same_structure(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    case = zoo("decoder")
    plain = case.plain(case.params)
    for method in ("kaiming-standard-dora", "pissa-rank_stabilized", "pissa-standard-dora", "pissa_kept-standard-dora"):
        params = randomise(adapted("decoder", method))
        off = switched_off(params, case.params, layout=case.layout)
        assert jax.tree.map(jnp.shape, off) == jax.tree.map(jnp.shape, params)
        assert distance(case.forward(off), plain) < 2e-5, method
        assert distance(case.forward(params), plain) > 1e-2, method
    whole = params | {"norm": {"scale": 2 * params["norm"]["scale"]}, "lm_head": {"kernel": jnp.ones((32, 97))}}
    assert distance(case.forward(switched_off(whole, case.params, layout=case.layout)), plain) < 2e-5


@pytest.mark.parametrize(("model", "method"), CASES)
def test_adding_leaves_the_base_as_it_was(zoo: Any, adapted: Adapted, model: str, method: str) -> None:
    """Nothing but the adapter's leaves is new, and only PiSSA without `keep_base` moves kernels."""
    base, params = flatten(nn.meta.unbox(zoo(model).params)), flatten(adapted(model, method))
    new = {path.rpartition("/")[2] for path in params.keys() - base.keys()}
    assert new <= ADAPTER_LEAVES
    assert ("magnitude" in new) == method.endswith("dora")
    assert ("lora_a0" in new) == changes_base(method)
    moved = {path for path, leaf in base.items() if not np.array_equal(leaf, params[path])}
    if not changes_base(method) or "kept" in method:
        assert moved == set()
    else:
        assert moved == {p for p in base if p.endswith("kernel") and f"{p.rpartition('/')[0]}/lora_a0" in params}
    adapter = {path: leaf for path, leaf in params.items() if path not in base}
    assert {str(leaf.dtype) for leaf in adapter.values()} == {"float32"}


@pytest.mark.parametrize("dtype", ["params", "activations"])
@pytest.mark.parametrize("jit", [False, True])
def test_a_zero_adapter_is_bitwise_the_base_in_bfloat16(decoder: Any, dtype: str, jit: bool) -> None:
    model = decoder(dtype="bfloat16", layers=2)
    params = model.params
    if dtype == "params":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    config = AdapterConfig(rank=4, targets=("all-linear", "lm_head", "embed_tokens"))
    fresh = add_adapters(params, config, layout=model.layout, key=KEY)
    tokens = jnp.arange(18).reshape(2, 9)
    run = jax.jit(model.apply) if jit else model.apply
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention promotes
        np.testing.assert_array_equal(run({"params": fresh}, tokens), run({"params": params}, tokens))


def test_a_zero_adapter_keeps_the_type_that_the_layer_promotes_to() -> None:
    with jax.numpy_dtype_promotion("standard"):
        layer = nn.Dense(8)
        x = jax.random.normal(KEY, (3, 6), jnp.bfloat16)
        params = layer.init(KEY, x)["params"]
        params = {"kernel": params["kernel"].astype(jnp.bfloat16), "bias": params["bias"] + 0.1}
        fresh = add_adapters(params, AdapterConfig(rank=2), layout=layout(layer.apply, params, x), key=KEY)
        got, want = adapt(layer.apply)({"params": fresh}, x), layer.apply({"params": params}, x)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


# -------------------- gradients


def reference(layer: dict[str, Array], x: Array, *, x_dropped: Array | None = None) -> Array:
    """METHODS.md in float64: y of a layer of matrices, with the whole weight written out."""
    w, s = layer["kernel"], layer.get("lora_scale", 0.0)
    if "start_scale" in layer:
        w = w - layer["start_scale"] * layer["lora_a0"] @ layer["lora_b0"]
    change = s * layer["lora_a"] @ layer["lora_b"]
    dropped = x if x_dropped is None else x_dropped
    if "magnitude" not in layer:
        y = x @ w + dropped @ change
    else:
        g = layer["magnitude"] / jax.lax.stop_gradient(jnp.sqrt(jnp.sum((w + change) ** 2, axis=0)))
        y = x @ w + (g - 1) * (dropped @ w) + g * (dropped @ change)
    return y + layer["bias"]


def random_layer(rng: np.random.Generator, *, dora: bool, kept: bool, rows: int = 6, columns: int = 5) -> Tree:
    shapes = {"kernel": (rows, columns), "bias": (columns,), "lora_a": (rows, 3), "lora_b": (3, columns)}
    if kept:
        shapes |= {"lora_a0": (rows, 3), "lora_b0": (3, columns)}
    if dora:
        shapes |= {"magnitude": (columns,)}
    layer = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"lora_scale": np.asarray(0.7)}
    return layer | ({"start_scale": np.asarray(0.7)} if kept else {})


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_gradients_of_a_layer_equal_a_float64_reference(dora: bool, kept: bool, dropout: bool) -> None:
    rng = np.random.default_rng(0)
    full, x64, weights = random_layer(rng, dora=dora, kept=kept), rng.normal(size=(4, 6)), rng.normal(size=(4, 5))
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), full)
    x, drop, x_dropped = jnp.asarray(x64, jnp.float32), {}, None
    if dropout:
        drop = {"dropout_key": KEY, "dropout_rate": jnp.float32(0.4)}
        x_dropped = np.asarray(dropped_input(drop, jnp.ones_like(x)), np.float64) * x64

    def loss(layer: Tree, x: Array) -> Array:
        layer = layer | drop
        if dora:
            layer["norm"] = column_norm(layer)
        return jnp.sum(jnp.asarray(weights, jnp.float32) * linear(layer, x, jnp.matmul))

    got, got_x = jax.grad(loss, argnums=(0, 1))(single, x)
    with jax.enable_x64(True):

        def loss64(layer: Tree, x: Array) -> Array:
            d = x if x_dropped is None else jnp.asarray(x_dropped / np.where(x64 == 0, 1, x64)) * x
            return jnp.sum(jnp.asarray(weights) * reference(layer, x, x_dropped=d))

        want, want_x = jax.grad(loss64, argnums=(0, 1))(jax.tree.map(jnp.asarray, full), jnp.asarray(x64))
    assert distance(got_x, want_x) < 2e-6
    for name in ("lora_a", "lora_b", "bias", *(["magnitude"] if dora else [])):
        assert distance(got[name], want[name]) < 2e-6, name


def dropped_input(drop: Tree, x: Array) -> Array:
    """x̃, read through a layer whose branch is the identity."""
    eye = jnp.eye(x.shape[-1])
    layer = {"kernel": 0 * eye, "lora_a": eye, "lora_b": eye, "lora_scale": jnp.float32(1)}
    return linear(layer | drop, x, jnp.matmul)


@pytest.mark.parametrize("model", ["decoder", "vit_rematted", "convolutions", "einsums"])
def test_gradients_of_a_model_equal_those_through_merging_in_float64(
    zoo: Any, adapted: Adapted, randomise: Any, model: str
) -> None:
    """The derivative of model(merge(params)) by every trained leaf, with merging in float64 on NumPy's side of XLA."""
    case = zoo(model)
    params = randomise(adapted(model, "pissa_kept-rank_stabilized-dora"))
    trained, frozen = partition(params)

    def loss(trained: Tree) -> Array:
        y = adapt(case.apply)({"params": combine(trained, frozen)}, *case.example)
        return jnp.sum(jnp.sin(y))

    got = flatten(jax.jit(jax.grad(loss))(trained))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        trained64, frozen64 = (jax.tree.map(lambda leaf: leaf.astype(jnp.float64), t) for t in (trained, frozen))
        example = tuple(x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in case.example)

        def loss64(trained: Tree) -> Array:
            merged = merged_reference(combine(trained, frozen64), case.layout)
            return jnp.sum(jnp.sin(case.apply({"params": merged}, *example)))

        want = flatten(jax.jit(jax.grad(loss64))(trained64))
    assert set(got) == set(want)
    worst = {path: distance(got[path], want[path]) for path in got}
    assert max(worst.values()) < 2e-5, max(worst, key=worst.__getitem__)


def merged_reference(params: Tree, layout: Any) -> Tree:
    """Every adapted kernel written out by einsums over its layout's axes; a tied head gets a kernel of its own."""
    layers = modules(params)
    if "lm_head" in layers and "kernel" not in layers["lm_head"]:
        layers["lm_head"]["kernel"] = layers["embed_tokens"]["embedding"].T
    result = {}
    for path, layer in layers.items():
        result[path] = {name: leaf for name, leaf in layer.items() if name not in ADAPTER_LEAVES}
        if "lora_a" in layer:
            name = "embedding" if "embedding" in layer else "kernel"
            result[path][name] = _merged(layer, layer[name], layout[path])
    return unflatten({f"{path}/{name}": leaf for path, layer in result.items() for name, leaf in layer.items()})


def _merged(layer: Tree, w: Array, spec: Any) -> Array:
    letters = "abcdefghij"
    stack, ins, outs = ("".join(letters[i] for i in axes) for axes in (spec.stack, spec.ins, spec.outs))

    def in_order(used: str, r: str) -> str:
        """The leaf's axes in the kernel's order, with r where the first axis it replaces stood."""
        return "".join(sorted(used, key=lambda c: letters.index(r) if c == "r" else letters.index(c)))

    a_axes, b_axes = in_order(stack + ins + "r", outs[0]), in_order(stack + outs + "r", ins[0])
    order = letters[: w.ndim]

    def product(a: str, b: str, scale: str) -> Array:
        return jnp.einsum(f"{stack},{a_axes},{b_axes}->{order}", layer[scale], layer[a], layer[b])

    w = w - product("lora_a0", "lora_b0", "start_scale") if "start_scale" in layer else w
    merged = w + product("lora_a", "lora_b", "lora_scale")
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.einsum(f"{order},{order}->{stack}{outs}", merged, merged)))
    return jnp.einsum(f"{order},{stack}{outs}->{order}", merged, layer["magnitude"] / norm)


# -------------------- stacks, patterns, randomness


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        *((method, {}) for method in TABLE if "standard" in method),
        ("kaiming-standard-dora", {"layers": (1,)}),
        ("gaussian-standard", {"rank_pattern": ("layers/1/.*=2",)}),
        ("kaiming-rank_stabilized", {"rank_pattern": ("layers/[02]/up=5",), "alpha_pattern": ("layers/2/up=9",)}),
        ("pissa-rank_stabilized-dora", {"rank_pattern": ("layers/1/.*=2",), "exclude": ("layers/0/attention/.*",)}),
        ("pissa_kept-standard-dora", {"exclude": ("layers/2/.*",)}),
        ("milora-rank_stabilized-dora", {"rank_pattern": ("layers/1/.*=2",)}),
        ("orthogonal-standard", {"rank_pattern": ("layers/1/.*=2",), "exclude": ("layers/2/.*",)}),
    ],
)
def test_scanned_equals_unscanned(
    zoo: Any, adapted: Adapted, randomise: Any, method: str, fields: dict[str, Any]
) -> None:
    stacked, single = adapted("vit_scanned", method, **fields), flatten(adapted("vit_unrolled", method, **fields))
    flat = flatten(stacked)
    for path, leaf in single.items():
        parts = path.split("/")
        if parts[0] != "layers":
            np.testing.assert_array_equal(leaf, flat[path])
            continue
        mine = flat["/".join([parts[0], *parts[2:]])][int(parts[1])]
        if mine.shape != leaf.shape:  # zero padding up to the largest rank
            cut = tuple(slice(n) for n in leaf.shape)
            assert np.count_nonzero(mine) == np.count_nonzero(mine[cut])
            mine = mine[cut]
        np.testing.assert_allclose(mine, leaf, atol=2e-6, rtol=1e-5, err_msg=path)
    assert not any(np.abs(flat[path]).max() == 0 for path in flat if path.endswith("lora_a"))
    y = zoo("vit_scanned").forward(stacked)
    assert distance(zoo("vit_unrolled").forward(adapted("vit_unrolled", method, **fields)), y) < 1e-5
    assert distance(zoo("vit_rematted").forward(stacked), y) < 1e-6


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("kaiming-standard", {"layers": (1,)}),
        ("kaiming-standard-dora", {"exclude": ("layers/[02]/.*",)}),
        ("pissa_kept-standard-dora", {"layers": (1,)}),
    ],
)
def test_layers_without_an_adapter_are_a_fixed_point(
    zoo: Any, adapted: Adapted, randomise: Any, method: str, fields: dict[str, Any]
) -> None:
    """No gradient reaches the padding of a stack's other layers, and merging leaves their kernels bitwise alone."""
    case = zoo("vit_scanned")
    params = adapted("vit_scanned", method, targets=("up", "attention/query"), **fields)
    active = params["layers"]["up"]["lora_b"][1]
    params["layers"]["up"]["lora_b"] = params["layers"]["up"]["lora_b"].at[1].set(jnp.ones_like(active))
    trained, frozen = partition(params)

    def loss(trained: Tree) -> Array:
        return jnp.sum(adapt(case.apply)({"params": combine(trained, frozen)}, *case.example) ** 2)

    gradients = flatten(jax.jit(jax.grad(loss))(trained)["layers"])
    assert any(np.abs(gradients["up/lora_a"][1]).reshape(-1) > 0)
    for path, leaf in gradients.items():
        for index in (0, 2):
            assert np.abs(leaf[index]).max() == 0, f"{path} of layer {index}"
    merged = merge_adapters(params, layout=case.layout)["layers"]
    for index, same in enumerate((True, False, True)):
        assert np.array_equal(merged["up"]["kernel"][index], case.params["layers"]["up"]["kernel"][index]) == same


def test_a_smaller_rank_is_a_prefix_of_a_larger_one(adapted: Adapted) -> None:
    small, large = (flatten(adapted("decoder", "kaiming-standard", rank=rank)) for rank in (3, 8))
    gaussian = [flatten(adapted("decoder", "gaussian-standard", rank=rank)) for rank in (3, 8)]
    for path in small:
        if path.endswith("lora_a"):
            np.testing.assert_array_equal(small[path], large[path][..., :3])
            np.testing.assert_allclose(3 * gaussian[0][path], 8 * gaussian[1][path][..., :3], rtol=1e-6)


@pytest.mark.parametrize(
    "method", ["kaiming-standard", "gaussian-standard", "orthogonal-standard", "pissa_randomised-standard"]
)
def test_adding_a_target_never_changes_another_leafs_start(adapted: Adapted, method: str) -> None:
    few = flatten(adapted("decoder", method, targets=("q_proj",)))
    many = flatten(adapted("decoder", method, targets=("all-linear", "lm_head", "embed_tokens")))
    for path in few:
        if "q_proj" in path or path.endswith("scale"):
            np.testing.assert_array_equal(few[path], many[path])


def test_every_matrix_has_a_start_of_its_own(adapted: Adapted) -> None:
    flat = flatten(adapted("decoder", "kaiming-standard")) | flatten(adapted("einsums", "kaiming-standard"))
    starts = []
    for path, leaf in flat.items():
        if path.endswith("lora_a"):
            starts += list(leaf.reshape(-1, *leaf.shape[-2:])) if leaf.ndim == 3 else [leaf]
    firsts = [tuple(np.asarray(start).ravel()[:2].tolist()) for start in starts]
    assert len(set(firsts)) == len(firsts)


def test_kaiming_and_gaussian_have_pefts_spread(decoder: Any) -> None:
    model = decoder(width=256, mlp_width=512, head_dim=64, layers=1)
    kaiming, gaussian = (
        add_adapters(model.params, AdapterConfig(rank=32, init=init), layout=model.layout, key=KEY)["layers"]["mlp"]
        for init in ("kaiming", "gaussian")
    )
    for name, rows in (("up_proj", 256), ("down_proj", 512)):
        a = kaiming[name]["lora_a"]
        assert np.abs(a).max() == pytest.approx(rows**-0.5, rel=1e-2)
        assert a.std() == pytest.approx((3 * rows) ** -0.5, rel=3e-2)
        assert gaussian[name]["lora_a"].std() == pytest.approx(1 / 32, rel=3e-2)


# -------------------- embeddings, heads, whole modules


def test_an_adapted_embedding_changes_the_lookup_alone(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    """In a tied model the head keeps the table; merging unties the two, and says so in the tree."""
    case = zoo("decoder")
    params = adapted("decoder", "kaiming-standard", targets=("embed_tokens",))
    assert not params["embed_tokens"]["lora_a"].any()
    assert params["embed_tokens"]["lora_b"].std() == pytest.approx(1, rel=0.2)
    params = randomise(params)
    merged = merge_adapters(params, layout=case.layout)
    np.testing.assert_array_equal(merged["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T)
    assert distance(case.plain(merged), case.forward(params)) < 1e-5


def test_an_adapted_tied_head_leaves_the_lookup_alone(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    case = zoo("decoder")
    params = randomise(adapted("decoder", "pissa-standard-dora", targets=("lm_head",)))
    assert "kernel" not in params["lm_head"]
    merged = merge_adapters(params, layout=case.layout)
    np.testing.assert_array_equal(merged["embed_tokens"]["embedding"], case.params["embed_tokens"]["embedding"])
    assert distance(case.plain(merged), case.forward(params)) < 1e-5
    normed = with_norms(params, layout=case.layout)
    assert distance(case.forward(normed), case.forward(params)) < 1e-6


def test_merging_without_adapters_on_the_head_keeps_it_tied(zoo: Any, adapted: Adapted) -> None:
    assert "lm_head" not in merge_adapters(adapted("decoder", "kaiming-standard", targets=("all-linear",)))


def test_all_linear_leaves_out_heads_and_embeddings(adapted: Adapted) -> None:
    flat = flatten(adapted("decoder_untied", "kaiming-standard", targets=("all-linear",)))
    assert not any(path.startswith(("lm_head/lora", "embed_tokens/lora")) for path in flat)
    assert sum(path.endswith("lora_a") for path in flat) == 7


def test_foreign_models_with_an_embedding_get_no_head() -> None:
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, tokens: Array) -> Array:
            return nn.Dense(3, name="classes")(nn.Embed(11, 8, name="embed_tokens")(tokens).mean(1))

    tokens = jnp.arange(4)[None]
    params = Encoder().init(KEY, tokens)["params"]
    found = layout(Encoder().apply, params, tokens)
    config = AdapterConfig(rank=2, targets=("embed_tokens", "classes"))
    adapted = add_adapters(params, config, layout=found, key=KEY)
    assert set(flatten(merge_adapters(adapted, layout=found))) == set(flatten(params))


def test_labels_name_the_optimisers_groups(zoo: Any, adapted: Adapted) -> None:
    params = adapted("convolutions", "pissa_kept-standard-dora", targets=("second",))
    assert label(params, whole=("first",)) == {
        "first": {"kernel": "weight", "bias": "vector"},
        "depthwise": {"kernel": "frozen", "bias": "frozen"},
        "second": {
            "kernel": "frozen",
            "lora_a": "lora_a",
            "lora_b": "lora_b",
            "lora_scale": "frozen",
            "lora_a0": "frozen",
            "lora_b0": "frozen",
            "start_scale": "frozen",
            "magnitude": "magnitude",
        },
        "line": {"kernel": "frozen", "bias": "frozen"},
        "classes": {"kernel": "frozen", "bias": "frozen"},
    }


def test_a_frozen_factor_is_labelled_so(adapted: Adapted) -> None:
    params = adapted("decoder", "kaiming-standard-dora", targets=("up_proj",))
    names = label(params, freeze=("lora_a",))["layers"]["mlp"]["up_proj"]
    frozen = dict.fromkeys(("kernel", "lora_a", "lora_scale"), "frozen")
    assert names == frozen | {"lora_b": "lora_b", "magnitude": "magnitude"}


def test_full_fine_tuning_trains_every_leaf_of_the_base(zoo: Any) -> None:
    params = zoo("vit_scanned").params
    assert set(flatten(label(params, whole=("all",))).values()) == {"weight", "vector"}
    trained, frozen = partition(params, whole=("all",))
    assert set(flatten(trained)) == set(flatten(params))
    assert frozen == {}


def test_a_module_trained_whole_takes_what_stands_in_it(zoo: Any) -> None:
    trained, _ = partition(zoo("vit_scanned").params, whole=("attention",))
    assert {path.split("/")[1] for path in flatten(trained)} == {"attention"}
    assert len(flatten(trained)) == 8


def test_unknown_whole_modules_raise_with_the_nearest_name(zoo: Any) -> None:
    with pytest.raises(ValueError, match=r"train_whole: 'clases' matches no module.*'classes'"):
        label(zoo("vit_scanned").params, whole=("clases",))


@pytest.mark.parametrize("by", ["training", "ownership"])
def test_combine_inverts_partition(adapted: Adapted, by: Any) -> None:
    params = adapted("decoder", "pissa_kept-standard-dora")
    mine, rest = partition(params, by=by, whole=("norm",))
    names = {path.rpartition("/")[2] for path in flatten(mine)}
    frozen = {"lora_scale", "lora_a0", "lora_b0", "start_scale"}
    assert names == {"lora_a", "lora_b", "magnitude", "scale"} | (frozen if by == "ownership" else set())
    assert jax.tree.structure(combine(mine, rest)) == jax.tree.structure(params)
    assert flatten(combine(rest, mine)).keys() == flatten(params).keys()
    with pytest.raises(ValueError, match="two of the trees hold the leaf"):
        combine(mine, rest, mine)


def test_what_depends_on_a_step_belongs_to_no_adapter(adapted: Adapted) -> None:
    params = with_norms(with_dropout(adapted("decoder", "kaiming-standard-dora"), KEY, rate=0.5))
    owned, _ = partition(params, by="ownership")
    assert {path.rpartition("/")[2] for path in flatten(owned)} == {"lora_a", "lora_b", "lora_scale", "magnitude"}
    assert not {"norm", "dropout_key", "dropout_rate"} & {p.rpartition("/")[2] for p in flatten(merge_adapters(params))}


@pytest.mark.parametrize("method", TABLE)
def test_trained_leaves_share_no_buffer_with_frozen_ones(adapted: Adapted, method: str) -> None:
    """The step donates what trains; a frozen leaf in the same buffer would be deleted with it."""
    trained, frozen = partition(adapted("decoder", method))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(frozen)]
    assert not {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(trained)} & set(pointers)


# -------------------- dropout


def test_dropout_of_rate_zero_is_no_dropout(adapted: Adapted) -> None:
    params = adapted("decoder", "kaiming-standard")
    assert with_dropout(params, KEY, rate=0.0) is params


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize(("model", "target"), [("vit_scanned", "up"), ("einsums", "experts_up")])
def test_dropout_takes_keys_of_both_styles(
    zoo: Any, adapted: Adapted, randomise: Any, model: str, target: str, make_key: Any
) -> None:
    case = zoo(model)
    params = randomise(adapted(model, "kaiming-standard", targets=(target,)))
    y = case.forward(with_dropout(params, make_key(0), rate=0.5))
    assert distance(y, case.forward(params)) > 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_keeps_the_expectation(dora: bool) -> None:
    layer = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), random_layer(np.random.default_rng(1), dora=dora, kept=False)
    )
    layer |= {"norm": column_norm(layer)} if dora else {}
    x = jax.random.normal(KEY, (2, 6))

    def sample(key: Array) -> Array:
        return linear(layer | {"dropout_key": key, "dropout_rate": jnp.float32(0.3)}, x, jnp.matmul)

    samples = jax.vmap(sample)(jax.random.split(KEY, 4096))
    error = np.abs(samples.mean(0) - linear(layer, x, jnp.matmul)) / (samples.std(0) / 4096**0.5)
    assert error.max() < 4.5
    assert samples.std(0).min() > 0.1


def test_dropout_drops_the_share_it_says_and_scales_the_rest() -> None:
    dropped = np.asarray(
        dropped_input({"dropout_key": KEY, "dropout_rate": jnp.float32(0.2)}, 3 * jnp.ones((4000, 10)))
    )
    assert set(np.unique(dropped).round(4).tolist()) == {0, 3.75}
    assert (dropped == 0).mean() == pytest.approx(0.2, abs=0.01)


def test_dropout_acts_on_the_adapter_branch_only(zoo: Any, adapted: Adapted) -> None:
    """With B = 0 nothing changes; with PiSSA the kept start is subtracted in full."""
    case = zoo("decoder")
    start = with_dropout(adapted("decoder", "kaiming-standard", targets=("up_proj",)), KEY, rate=0.5)
    np.testing.assert_array_equal(case.forward(start), case.plain(case.params))
    kept, moved = (
        with_dropout(adapted("decoder", f"{name}-standard", targets=("up_proj",)), KEY, rate=0.5)
        for name in ("pissa_kept", "pissa")
    )
    assert distance(case.forward(kept), case.forward(moved)) < 1e-5
    assert distance(case.forward(kept), case.plain(case.params)) > 1e-3


@pytest.mark.parametrize("kept", [False, True])
def test_dora_with_dropout_is_pefts_formula(kept: bool) -> None:
    rng = np.random.default_rng(2)
    layer = random_layer(rng, dora=True, kept=kept)
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    drop = {"dropout_key": KEY, "dropout_rate": jnp.float32(0.5)}
    x_dropped = np.asarray(dropped_input(drop, x), np.float64)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layer) | drop
    got = linear(single | {"norm": column_norm(single)}, x, jnp.matmul)
    with jax.enable_x64(True):
        want = reference(jax.tree.map(jnp.asarray, layer), jnp.asarray(np.float64(x)), x_dropped=jnp.asarray(x_dropped))
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize(
    ("model", "target"),
    [("decoder", "lm_head"), ("vit_rematted", "query"), ("convolutions", "second"), ("einsums", "experts_up")],
)
def test_every_model_takes_dropout(zoo: Any, adapted: Adapted, randomise: Any, model: str, target: str) -> None:
    case = zoo(model)
    params = randomise(adapted(model, "pissa_kept-rank_stabilized-dora", targets=(target,)))
    trained, frozen = partition(params)

    @jax.jit
    def loss(trained: Tree, key: Array) -> Array:
        whole = with_dropout(combine(trained, frozen), key, rate=0.3)
        return jnp.sum(adapt(case.apply)({"params": whole}, *case.example))

    value = jax.value_and_grad(loss)
    (one, g), (same, _), (other, _) = (value(trained, jax.random.key(i)) for i in (0, 0, 1))
    assert one == same != other
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g))


def test_every_layer_of_a_stack_drops_differently(adapted: Adapted) -> None:
    layer = with_dropout(adapted("decoder", "kaiming-standard"), KEY, rate=0.5)["layers"]["mlp"]
    keys = np.concatenate([jax.random.key_data(layer[name]["dropout_key"]) for name in ("up_proj", "gate_proj")])
    assert len({tuple(key) for key in keys.tolist()}) == 6
    assert layer["up_proj"]["dropout_rate"].shape == (3,)


# -------------------- the norm


def test_a_magnitude_without_its_norm_raises() -> None:
    layer = {"kernel": jnp.ones((3, 2)), "magnitude": jnp.ones(2)}
    with pytest.raises(ValueError, match="with_norms"):
        linear(layer, jnp.ones((1, 3)), jnp.matmul)


@pytest.mark.parametrize("model", ["decoder", "vit_scanned", "convolutions", "einsums"])
def test_norms_computed_beforehand_equal_those_inside_the_layer(
    zoo: Any, adapted: Adapted, randomise: Any, model: str
) -> None:
    case = zoo(model)
    params = randomise(adapted(model, "pissa-rank_stabilized-dora"))
    normed = with_norms(params, layout=case.layout)
    for path, layer in modules(normed).items():
        assert ("magnitude" in layer) == ("norm" in layer), path
        assert "norm" not in layer or layer["norm"].shape == layer["magnitude"].shape
    assert distance(case.forward(normed), case.forward(params)) < 1e-6


def test_the_norm_of_a_pissa_start_is_that_of_the_original_kernel(zoo: Any, adapted: Adapted) -> None:
    kernel = zoo("decoder").params["layers"]["mlp"]["up_proj"]["kernel"]
    for method in ("kaiming", "pissa", "pissa_kept", "pissa_randomised"):
        magnitude = adapted("decoder", f"{method}-rank_stabilized-dora")["layers"]["mlp"]["up_proj"]["magnitude"]
        assert distance(magnitude, np.linalg.norm(np.float64(kernel), axis=1)) < 1e-6


def test_a_column_of_zeros_has_gain_zero() -> None:
    layer = {"kernel": jnp.zeros((4, 3)).at[:, 1].set(1), "lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}
    layer |= {"lora_scale": jnp.float32(1), "magnitude": jnp.array([0.0, 2.0, 1.0])}
    layer["norm"] = column_norm(layer)
    np.testing.assert_array_equal(layer["norm"], [0, 2, 0])
    np.testing.assert_array_equal(linear(layer, jnp.ones((1, 4)), jnp.matmul), [[0, 4, 0]])
    np.testing.assert_array_equal(merged_kernel(layer)[:, 1], 1)
    g = jax.grad(lambda la: jnp.sum(linear(la, jnp.ones((1, 4)), jnp.matmul)))(layer)
    assert all(np.isfinite(leaf).all() for leaf in g.values())


@pytest.mark.parametrize("stack", [(), (3,), (1,)])
@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("rows", [12, 13])
def test_the_norm_by_blocks_equals_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, stack: tuple[int, ...], block: int, rows: int
) -> None:
    monkeypatch.setattr(linear_module, "NORM_BLOCK", block)
    rng = np.random.default_rng(3)
    full = {
        "kernel": rng.normal(size=(*stack, rows, 2, 5)),
        "lora_a": rng.normal(size=(*stack, rows, 3)),
        "lora_b": rng.normal(size=(*stack, 3, 2, 5)),
        "lora_a0": rng.normal(size=(*stack, rows, 3)),
        "lora_b0": rng.normal(size=(*stack, 3, 2, 5)),
        "lora_scale": rng.normal(size=stack),
        "start_scale": rng.normal(size=stack),
    }
    a, b = (
        np.einsum("...,...ir,...rjk->...ijk", full["lora_scale"], full["lora_a"], full["lora_b"]),
        full["start_scale"],
    )
    dense = full["kernel"] + a - np.einsum("...,...ir,...rjk->...ijk", b, full["lora_a0"], full["lora_b0"])
    want = np.linalg.norm(dense, axis=len(stack))
    got = column_norm(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), full))
    assert got.shape == want.shape
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize(("stack", "matrices"), [((), 0.25), ((8,), 1.1)])
def test_the_norm_makes_no_full_size_temporary(
    monkeypatch: pytest.MonkeyPatch, stack: tuple[int, ...], matrices: float
) -> None:
    monkeypatch.setattr(linear_module, "NORM_BLOCK", 2**14)
    shapes = {"kernel": (512, 1024), "lora_a": (512, 4), "lora_b": (4, 1024), "lora_scale": ()}
    layer = {name: jax.ShapeDtypeStruct((*stack, *shape), jnp.float32) for name, shape in shapes.items()}
    compiled = jax.jit(column_norm).lower(layer).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < matrices * 4 * 512 * 1024


# -------------------- PiSSA's SVD


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_exact_triples_equal_numpys_svd(shape: tuple[int, int], last: bool) -> None:
    w = np.random.default_rng(4).normal(size=(2, *shape)).astype(np.float32)
    a, b = exact(w, rank=5, last=last)
    u, s, vt = np.linalg.svd(np.float64(w), full_matrices=False)
    some = slice(None, -6, -1) if last else slice(5)
    want = np.einsum("lir,lr,lro->lio", u[..., some], s[:, some], vt[:, some])
    assert distance(a @ b, want) < 1e-6
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.sqrt(s[:, some]), rtol=1e-6)  # both take half of S
    np.testing.assert_allclose(np.linalg.norm(b, axis=2), np.sqrt(s[:, some]), rtol=1e-6)


def test_the_last_triples_of_a_badly_conditioned_matrix() -> None:
    """The Gram matrix alone would give an S of 1e-6 of the largest to 1e-4."""
    rng = np.random.default_rng(5)
    u, v = (np.linalg.qr(rng.normal(size=(n, 32)))[0] for n in (32, 48))
    w = ((u * np.logspace(0, -6, 32)) @ v.T).astype(np.float32)[None]
    a, b = exact(w, rank=4, last=True)
    s = np.linalg.svd(np.float64(w[0]), compute_uv=False)[:-5:-1]
    np.testing.assert_allclose(np.linalg.norm(a[0], axis=0) ** 2, s, rtol=1e-6)
    assert np.abs(np.float64(a[0] @ b[0])).max() < 2 * s[-1]


def test_a_start_that_cannot_be_traced_says_so(zoo: Any) -> None:
    case = zoo("decoder")
    config = AdapterConfig(rank=3, init="milora")
    with pytest.raises(ValueError, match="outside jit and eval_shape; call it there"):
        jax.eval_shape(lambda p: add_adapters(p, config, layout=case.layout, key=KEY), case.params)


@pytest.mark.parametrize("iterations", [None, 4])
def test_pissa_of_a_matrix_of_lower_rank_is_finite(iterations: int | None) -> None:
    rng = np.random.default_rng(5)
    low = (rng.normal(size=(2, 20, 3)) @ rng.normal(size=(2, 3, 16))).astype(np.float32)
    for w in (low, np.zeros_like(low)):
        a, b = svd(jnp.asarray(w), rank=6, iterations=iterations, keys=jax.random.split(KEY, 2))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a @ b, w, atol=1e-5 * max(1, np.abs(w).max()))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_randomised_pissas_residual_is_within_a_percent(power: float) -> None:
    rng = np.random.default_rng(6)
    u, v = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in (96, 64))
    w = ((u * np.arange(1.0, 65) ** -power) @ v.T).astype(np.float32)[None]
    a, b = exact(w, rank=8)
    ra, rb = randomised(jnp.asarray(w), KEY[None], rank=8, iterations=4)
    assert np.linalg.norm(w - ra @ rb) <= 1.01 * np.linalg.norm(w - a @ b)


def test_pissa_of_bfloat16_keeps_the_bases_type(decoder: Any) -> None:
    model = decoder(dtype="bfloat16", layers=1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    config = AdapterConfig(rank=4, init="pissa", dora=True)
    layer = add_adapters(params, config, layout=model.layout, key=KEY)["layers"]["mlp"]["up_proj"]
    assert layer["kernel"].dtype == jnp.bfloat16
    assert {str(layer[name].dtype) for name in ("lora_a", "lora_b0", "magnitude")} == {"float32"}
    assert distance(merged_kernel(layer), params["layers"]["mlp"]["up_proj"]["kernel"]) < 1e-2


def test_starts_can_be_planned_without_arrays(zoo: Any) -> None:
    case = zoo("decoder")
    for fields in ({}, {"init": "pissa", "svd_iterations": 1}, {"init": "orthogonal"}):
        config = AdapterConfig(rank=4, dora=True, **fields)
        abstract = jax.eval_shape(lambda p, c=config: add_adapters(p, c, layout=case.layout, key=KEY), case.params)
        real = add_adapters(case.params, config, layout=case.layout, key=KEY)
        assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, real)
    config = AdapterConfig(rank=3, init="pissa")
    with pytest.raises(ValueError, match="svd_iterations"):
        jax.eval_shape(lambda p: add_adapters(p, config, layout=case.layout, key=KEY), case.params)


# -------------------- interception


def test_adapting_twice_is_adapting_once(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    case = zoo("convolutions")
    variables = {"params": randomise(adapted("convolutions", "kaiming-standard-dora"))}
    once, twice = adapt(case.apply), adapt(adapt(case.apply))
    np.testing.assert_array_equal(jax.jit(once)(variables, *case.example), jax.jit(twice)(variables, *case.example))


def test_without_adapters_adapt_computes_what_apply_does(zoo: Any) -> None:
    case = zoo("vit_rematted")
    np.testing.assert_array_equal(case.forward(case.params), case.plain(case.params))


def test_two_adapters_of_one_base_do_not_share_a_trace(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    """Scanned and recomputed bodies are cached by their function: other parameters must be seen all the same."""
    case = zoo("vit_rematted")
    first = randomise(adapted("vit_rematted", "kaiming-standard"), 1)
    second = randomise(adapted("vit_rematted", "kaiming-standard", targets=("up",)), 2)
    apply = adapt(case.apply)
    for params in (case.params, first, second, first):
        y = apply({"params": params}, *case.example)
        want = case.plain(merge_adapters(params, layout=case.layout))
        assert distance(y, want) < 1e-5


def test_adapters_in_a_jitted_method_of_the_model_are_seen() -> None:
    class Jitted(nn.Module):
        def setup(self) -> None:
            self.parts = [nn.Dense(6) for _ in range(2)]

        @nn.jit
        def __call__(self, x: Array) -> Array:
            for part in self.parts:
                x = nn.tanh(part(x))
            return x

    x = jax.random.normal(KEY, (2, 6))
    params = Jitted().init(KEY, x)["params"]
    found = layout(Jitted().apply, params, x)
    base = Jitted().apply({"params": params}, x)
    changed = add_adapters(params, AdapterConfig(rank=2), layout=found, key=KEY)
    changed = {name: layer | {"lora_b": jnp.ones_like(layer["lora_b"])} for name, layer in changed.items()}
    y = adapt(Jitted().apply)({"params": changed}, x)
    assert distance(y, base) > 1e-2
    assert distance(y, Jitted().apply({"params": merge_adapters(changed, layout=found)}, x)) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "general", "einsum", "conv"])
def test_an_adapted_layer_honours_its_precision(kind: str) -> None:
    module: Any = {
        "dense": nn.Dense(6, precision="highest"),
        "general": nn.DenseGeneral((2, 3), precision="highest"),
        "einsum": nn.Einsum((6, 2, 3), "bti,inh->btnh", precision="highest"),
        "conv": nn.Conv(6, 3, precision="highest"),
    }[kind]
    x = jnp.ones((2, 5, 6))
    params = module.init(KEY, x)["params"]
    config = AdapterConfig(rank=2, init="pissa", keep_base=True, dora=True)
    changed = add_adapters(params, config, layout=layout(module.apply, params, x), key=KEY)
    assert_highest(jax.make_jaxpr(adapt(module.apply))({"params": changed}, x), at_least=5)


@pytest.mark.parametrize("name", ["merged_kernel", "column_norm", "randomised"])
def test_what_is_computed_from_weights_has_highest_precision(name: str) -> None:
    """Accelerators multiply float32 in fewer bits unless they are told not to."""
    layer = {name: leaf for name, leaf in random_layer(np.random.default_rng(7), dora=True, kept=True).items()}
    layer = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layer)
    if name == "randomised":
        w = jnp.ones((2, 30, 20))
        jaxpr = jax.make_jaxpr(lambda w, k: randomised(w, k, rank=3, iterations=1))(w, jax.random.split(KEY, 2))
    else:
        jaxpr = jax.make_jaxpr(getattr(linear_module, name))(layer)
    assert_highest(jaxpr, at_least=2)


def assert_highest(jaxpr: Any, *, at_least: int) -> None:
    text = str(jaxpr)
    products = text.count("dot_general[") + text.count("conv_general_dilated[")
    assert products >= at_least
    highest = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + text.count("precision=Precision.HIGHEST")
    assert highest == products


def test_a_layer_of_another_dot_general_uses_it_for_a_too() -> None:
    seen = []

    def dot_general(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        seen.append(kernel.shape)
        return jax.lax.dot_general(x, kernel, *args, **kwargs)

    module = nn.Dense(6, dot_general=dot_general)
    x = jnp.ones((2, 5))
    params = module.init(KEY, x)["params"]
    changed = add_adapters(params, AdapterConfig(rank=2), layout=layout(module.apply, params, x), key=KEY)
    seen.clear()
    adapt(module.apply)({"params": changed}, x)
    assert seen == [(5, 6), (5, 2)]


def test_a_layer_called_twice_is_adapted_twice() -> None:
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            layer = nn.Dense(6, name="shared")
            return layer(nn.tanh(layer(x)))

    x = jax.random.normal(KEY, (2, 6))
    params = Shared().init(KEY, x)["params"]
    found = layout(Shared().apply, params, x)
    changed = add_adapters(params, AdapterConfig(rank=2, init="pissa", keep_base=True), layout=found, key=KEY)
    changed["shared"]["lora_b"] = -changed["shared"]["lora_b"]
    y = adapt(Shared().apply)({"params": changed}, x)
    assert distance(y, Shared().apply({"params": merge_adapters(changed, layout=found)}, x)) < 1e-5


def test_a_layer_of_many_modules_in_a_vmap_is_a_stack() -> None:
    class Many(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            stack = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4
            )
            return stack(5, name="many")(x)

    x = jax.random.normal(KEY, (2, 6))
    params = Many().init(KEY, x)["params"]
    found = layout(Many().apply, params, x)
    changed = add_adapters(params, AdapterConfig(rank=2, init="pissa", dora=True), layout=found, key=KEY)
    changed["many"]["magnitude"] = changed["many"]["magnitude"] * 1.5
    y = adapt(Many().apply)({"params": changed}, x)
    assert distance(y, Many().apply({"params": merge_adapters(changed, layout=found)}, x)) < 1e-5


def test_several_adapters_over_one_base_by_vmap(zoo: Any, adapted: Adapted, randomise: Any) -> None:
    """A leading axis over the adapters' tree: the base is not copied, each answer is the adapter's own."""
    case = zoo("vit_scanned")
    start = adapted("vit_scanned", "kaiming-standard-dora", targets=("up", "query", "classes"))
    trees = [randomise(start, seed) for seed in (1, 2)]
    owned, base = zip(*(partition(tree, by="ownership") for tree in trees), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owned)
    many = jax.vmap(lambda mine: adapt(case.apply)({"params": combine(mine, base[0])}, *case.example))(stacked)
    for y, tree in zip(many, trees, strict=True):
        assert distance(y, case.forward(tree)) < 1e-5


# -------------------- mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": ("q_porj",)},
            r"adapter\.targets: 'q_porj' matches no module.*'q_proj'.*layers/\*/self_attn/q_proj",
        ),
        ({"targets": ("zzz",)}, r"adapter\.targets: 'zzz' matches no module; there are .*lm_head"),
        ({"exclude": ("upproj",)}, r"adapter\.exclude: 'upproj' matches no module.*'up_proj'"),
        ({"rank_pattern": ("q_prj=4",)}, r"adapter\.rank_pattern: 'q_prj' matches no module.*'q_proj'"),
        ({"rank_pattern": ("all-linear=4",)}, r"adapter\.rank_pattern: 'all-linear' matches no module"),
        ({"alpha_pattern": ("layers/7/.*=4",)}, r"adapter\.alpha_pattern: 'layers/7/\.\*' matches no module"),
        ({"layers": (0, 3)}, r"adapter\.layers: there is no layer 3; the model has layers 0 to 2"),
        ({"targets": ("q_proj",), "exclude": ("self_attn/.*", "q_proj")}, "adapter.exclude"),
        ({"rank": 17, "targets": ("k_proj",)}, r"layers/self_attn/k_proj: rank 17 is above .* 32 × 16"),
        ({"rank_pattern": ("layers/1/.*k_proj=17",)}, r"layers/self_attn/k_proj: rank 17 is above"),
    ],
)
def test_a_mistake_is_one_clear_line(adapted: Adapted, fields: dict[str, Any], message: str) -> None:
    if fields.get("exclude") == ("self_attn/.*", "q_proj"):
        fields = fields | {"exclude": ("q_proj",)}
    with pytest.raises(ValueError, match=message) as error:
        adapted("decoder", "kaiming-standard", **fields)
    assert "\n" not in str(error.value)


def test_adding_twice_raises(zoo: Any, adapted: Adapted) -> None:
    case = zoo("decoder")
    once = adapted("decoder", "kaiming-standard", targets=("q_proj",))
    with pytest.raises(ValueError, match="self_attn/q_proj has an adapter already; merge it first"):
        add_adapters(once, AdapterConfig(rank=2), layout=case.layout, key=KEY)
    add_adapters(once, AdapterConfig(rank=2, targets=("k_proj",)), layout=case.layout, key=KEY)


def test_factors_that_do_not_fit_raise() -> None:
    layer = {"kernel": jnp.ones((4, 3)), "lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"\(5, 2\).*\(4, 3\)"):
        merged_kernel(layer | {"lora_scale": jnp.float32(1)})


def test_merging_a_transposed_kernel_without_its_layout_raises(zoo: Any, adapted: Adapted) -> None:
    """The square `...D,FD->...F` is the one whose shape alone says nothing."""
    for target in ("square", "query"):
        with pytest.raises(ValueError, match="layout"):
            merge_adapters(adapted("einsums", "kaiming-standard", targets=(target,)))


def test_an_adapter_on_a_layer_that_takes_none_raises() -> None:
    module = nn.Conv(4, 3, feature_group_count=2)
    x = jnp.ones((1, 5, 4))
    params = module.init(KEY, x)["params"] | {"lora_a": jnp.ones((3, 2, 2))}
    with pytest.raises(ValueError, match="takes none"):
        adapt(module.apply)({"params": params}, x)
