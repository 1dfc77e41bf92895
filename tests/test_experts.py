"""Sparse layers: sorted tokens give what all experts on all tokens give, at the cost of the chosen.

The dense form, which computes every expert for every token, is the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from zoo import TINY

from lorax_ft import AdapterConfig, add_adapters, combine, partition
from lorax_ft.config import MeshConfig, QuantConfig
from lorax_ft.lowrank.experts import Rows
from lorax_ft.lowrank.quantize import quantize_base
from lorax_ft.models import expert_products, grouped
from lorax_ft.models.config import ClampedGate, Experts
from lorax_ft.models.mlp import Usage, router_loss
from lorax_ft.models.model import CausalLM, abstract_params
from lorax_ft.plan.flops import count_flops
from lorax_ft.quant.kernels import dense, quantize
from lorax_ft.sharding import (
    DECODER_RULES,
    batch_sharding,
    make_mesh,
    param_shardings,
    place_batch,
)
from lorax_ft.training.losses import supervised_loss
from lorax_ft.training.step import TrainState, make_train_step
from lorax_ft.tree import Tree, flatten, unflatten

SPARSE = dataclasses.replace(
    TINY,
    experts=Experts(count=8, top_k=2, renormalized=True),
    biases=frozenset({"gate_proj", "down_proj"}),
)
KINDS = ("blocks", "ragged")

pytestmark = pytest.mark.usefixtures("strict")


@functools.cache
def model_of(kind: str, *, clamped: bool = False) -> CausalLM:
    changed: dict[str, Any] = {"expert_products": kind}
    if clamped:
        changed["clamped_gate"] = ClampedGate(alpha=1.7, limit=7.0)
    return CausalLM(config=dataclasses.replace(SPARSE, **changed))


def random_params(seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in flatten(abstract_params(SPARSE)).items():
        scale = 0.5 if path.endswith("gate/kernel") else 0.2
        leaves[path] = jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)
    return unflatten(leaves)


def adapted(params: Tree, **values: Any) -> Tree:
    """Parameters with random adapters on all linear layers, experts included."""
    if values.get("method", "lora") == "lora":
        values |= {"rank": 3, "alpha": 6}
    config = AdapterConfig(**values)
    layout = model_of("blocks").layout
    with_adapters = add_adapters(params, config, layout=layout, key=jax.random.key(1))
    rng = np.random.default_rng(2)
    trained, frozen = partition(with_adapters)

    def moved(leaf: Array) -> Array:
        return leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)

    return combine(jax.tree.map(moved, trained), frozen)


TOKENS = jnp.asarray(np.random.default_rng(3).integers(97, size=(3, 21)), jnp.int32)


def value_and_gradient(model: CausalLM, params: Tree, tokens: Array = TOKENS) -> Any:
    """A number that all features take part in, and its gradient to the trained leaves."""
    trained, frozen = partition(params)
    if not trained:
        trained, frozen = params, {}

    @jax.jit
    def run(trained: Tree, frozen: Tree, tokens: Array) -> Any:
        def loss(trained: Tree) -> Array:
            features, _ = model.features(combine(trained, frozen), tokens)
            return jnp.mean(jnp.sin(features.astype(jnp.float32)))

        return jax.value_and_grad(loss)(trained)

    return run(trained, frozen, tokens)


def close(got: Any, expected: Any, *, atol: float = 2e-6) -> None:
    paths = flatten(expected[1])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for path, leaf in flatten(got[1]).items():
        np.testing.assert_allclose(leaf, paths[path], rtol=1e-4, atol=atol, err_msg=path)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "pissa_kept": {"init": "pissa", "keep_base": True},
    "ia3": {"method": "ia3", "feedforward": ("q_proj",)},
    "miss": {"method": "miss", "rank": 3},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("blocks", method) for method in [*METHODS, "full"]),
        ("ragged", "dora"),
        ("ragged", "full"),
    ],
)
def test_sorted_tokens_give_what_all_experts_give(kind: str, method: str) -> None:
    """The value, and the gradient of every trained leaf; of a full base too."""
    params = random_params()
    if method != "full":
        params = adapted(params, **METHODS[method])
    close(
        value_and_gradient(model_of(kind), params),
        value_and_gradient(model_of("dense"), params),
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "format", "batch"), [("blocks", "nf4", 8), ("ragged", "int8", 8), ("ragged", "nf4", 2)]
)
def test_quantized_experts(
    kind: str, format: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By XLA's product, so many of the 8 experts are dense at a time."""
    monkeypatch.setattr(expert_products, "DENSE_BYTES", batch * 4 * SPARSE.width * SPARSE.mlp_width)
    model = model_of("blocks")
    base, _ = quantize_base(random_params(), QuantConfig(format=format), layout=model.layout)
    params = adapted(base)
    close(
        value_and_gradient(model_of(kind), params),
        value_and_gradient(model_of("dense"), params),
    )


@pytest.mark.parametrize("sizes", [[1, 5, 0, 9, 3, 2], [20, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 20]])
def test_batches_of_quantized_kernels(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of six experts at a time: the product and its gradient, at any load of the experts."""
    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.normal(size=(6, 64, 5)), jnp.float32)
    quantized = quantize(kernels, format="nf4", n_stack=1, n_in=1)
    x = jnp.asarray(rng.normal(size=(1, 24, 64)), jnp.float32)
    rows = Rows(expert=jnp.zeros((1, 24), jnp.int32), sizes=jnp.asarray([sizes], jnp.int32))
    monkeypatch.setattr(expert_products, "DENSE_BYTES", 2 * kernels[0].nbytes)
    product = grouped.product_of("ragged", block=1)

    def total(x: Array, kernels: Any) -> tuple[Array, Array]:
        y = product(x, kernels, rows)
        return jnp.sum(jnp.sin(y)), y

    both = jax.value_and_grad(total, has_aux=True)
    (_, got), d_got = both(x, quantized)
    (_, expected), d_expected = both(x, dense(quantized))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_got, d_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "whole"), [(2, False), (6, True)])
def test_quantized_kernels_are_dense_a_batch_at_a_time(
    batch: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of a gradient holds the dense kernels of so many of six experts, and no more."""
    kernels = jnp.ones((6, 64, 5))
    quantized = quantize(kernels, format="nf4", n_stack=1, n_in=1)
    rows = Rows(expert=jnp.zeros((1, 24), jnp.int32), sizes=jnp.full((1, 6), 4))
    monkeypatch.setattr(expert_products, "DENSE_BYTES", batch * kernels[0].nbytes)
    product = grouped.product_of("ragged", block=1)

    def total(x: Array, kernels: Any) -> Array:
        return jnp.sum(jnp.sin(product(x, kernels, rows)))

    program = str(jax.make_jaxpr(jax.grad(total))(jnp.ones((1, 24, 64)), quantized))
    assert f"f32[{batch},64,5]" in program
    assert ("f32[6,64,5]" in program) == whole


def test_routers_are_frozen_by_default() -> None:
    """ "all-linear" adapts the experts and not their router."""
    trained, frozen = partition(adapted(random_params()))
    modules = {path.rpartition("/")[0] for path in flatten(trained)}
    assert "layers/mlp/experts/gate_proj" in modules
    assert not [module for module in modules if module.endswith("mlp/gate")]
    assert "layers/mlp/gate/kernel" in flatten(frozen)


def test_clamped_gates() -> None:
    params = adapted(random_params())
    close(
        value_and_gradient(model_of("blocks", clamped=True), params),
        value_and_gradient(model_of("dense", clamped=True), params),
    )


MIXED = jnp.concatenate([TOKENS[:2, :20], TOKENS[:2, :20], jnp.full((4, 20), 5, jnp.int32)])
"""Four rows of random tokens, and four that all choose the same two experts."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "shape", "format"),
    [
        ("blocks", {"fsdp": 2, "tensor": 2}, None),
        ("ragged", {"fsdp": 2}, None),
        ("blocks", {"fsdp": 2, "context": 4}, None),
        ("ragged", {"expert": 8}, None),
        ("blocks", {"expert": 4}, "nf4"),
    ],
)
def test_on_a_mesh(kind: str, shape: dict[str, int], format: Any) -> None:
    """Each device sorts its own tokens, or computes its own experts: as on one device.

    Balanced or not: all tokens of half of the rows choose the same experts.
    """
    base = random_params()
    if format is not None:
        quant = QuantConfig(format=format)
        base, _ = quantize_base(base, quant, layout=model_of("blocks").layout)
    params = adapted(base, dora=True)
    expected = value_and_gradient(model_of("dense"), params, MIXED)
    mesh = make_mesh(MeshConfig(**shape))
    model = model_of(kind)
    places = param_shardings(params, DECODER_RULES, layout=model.layout, mesh=mesh)
    placed = jax.device_put(params, places)
    rows = jax.device_put(MIXED, batch_sharding(mesh, microbatched=False))
    with jax.set_mesh(mesh):
        close(value_and_gradient(model, placed, rows), expected)


def test_rows_that_do_not_divide_over_the_mesh() -> None:
    """Every group of devices computes all rows then, as in generation from one prompt."""
    params = random_params()
    expected = value_and_gradient(model_of("dense"), params)
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    places = param_shardings(params, DECODER_RULES, layout=model_of("ragged").layout, mesh=mesh)
    with jax.set_mesh(mesh):
        close(value_and_gradient(model_of("ragged"), jax.device_put(params, places)), expected)


def test_experts_that_do_not_divide_over_the_mesh() -> None:
    sparse = model_of("blocks").config
    grouped.check_expert_axis(sparse, 4, source="it")
    with pytest.raises(ValueError, match=r"does not divide the 8 experts of it; 1, 2, 4 or 8 w"):
        grouped.check_expert_axis(sparse, 3, source="it")
    mesh = make_mesh(MeshConfig(expert=3), devices=jax.devices()[:3])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"mesh.expert is 3, which does not"):
        jax.eval_shape(model_of("blocks").features, random_params(), TOKENS)


BATCH = {
    "tokens": MIXED,
    "targets": jnp.roll(MIXED, -1, axis=1),
    "weights": jnp.ones(MIXED.shape, jnp.float32),
    "positions": jnp.broadcast_to(jnp.arange(MIXED.shape[1], dtype=jnp.int32), MIXED.shape),
    # The last four tokens of each row are padding.
    "segment_ids": jnp.where(jnp.arange(MIXED.shape[1]) < 17, 1, 0) * jnp.ones_like(MIXED),
}


def test_router_loss_by_hand() -> None:
    """Three experts, of which two are used: of 3 tokens in one layer, and 1 in the other."""
    usage = Usage(
        tokens=jnp.array([[3.0], [1.0]]),
        chosen=jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        probability=jnp.array([[2.0, 0.5, 0.5], [0.5, 0.5, 0.0]]),
    )
    # The shares are 3/4 and 1/4, the mean probabilities 2.5/4 and 1/4.
    expected = 3 * (0.75 * 0.625 + 0.25 * 0.25)
    np.testing.assert_allclose(router_loss([usage]), expected, rtol=1e-6)


def router_step(config: MeshConfig, microbatches: int, coef: float) -> tuple[Any, Tree]:
    """The metrics of a step, and the leaves that it trained: the routers' adapters."""
    model = model_of("blocks")
    adapter = AdapterConfig(rank=3, targets=("mlp/gate",))
    params = add_adapters(random_params(), adapter, layout=model.layout, key=jax.random.key(1))
    mesh = make_mesh(config, devices=jax.devices()[: config.data * config.expert])
    shardings = param_shardings(params, DECODER_RULES, layout=model.layout, mesh=mesh)
    trained, frozen = partition(jax.device_put(params, shardings))
    tx = optax.sgd(1.0)
    loss = supervised_loss(model, packed=False, router_aux_loss_coef=coef)
    step = jax.jit(make_train_step(loss, tx, layout=model.layout))
    state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    batch = place_batch(
        {name: np.asarray(rows) for name, rows in BATCH.items()}, mesh, microbatches=microbatches
    )
    with jax.set_mesh(mesh):
        state, metrics = step(state, frozen, batch, jax.random.key(2))
    return metrics, state.trained


def test_router_loss_in_a_step() -> None:
    """It is added to the loss with its weight, trains a router, and does not count padding."""
    metrics, trained = router_step(MeshConfig(data=1), 1, 0.5)
    plain, trained_without = router_step(MeshConfig(data=1), 1, 0.0)
    assert "router_loss" not in plain
    # top_k where all experts are used alike, and more here.
    assert 2 < metrics["router_loss"] < 8
    added = metrics["loss"] - plain["loss"]
    np.testing.assert_allclose(added, 0.5 * metrics["router_loss"], rtol=1e-5)
    for path, leaf in flatten(trained).items():
        if path.endswith("lora_b"):
            assert not np.allclose(leaf, flatten(trained_without)[path], rtol=1e-2), path
    # Columns that hold padding alone take no part.
    model = model_of("blocks")
    cut = {name: rows[:, :17] for name, rows in BATCH.items()}
    loss = supervised_loss(model, packed=True, router_aux_loss_coef=0.5)
    _, weight, sums = jax.jit(loss)(random_params(), cut, None)
    router = sums["router_loss"] / weight
    np.testing.assert_allclose(router, metrics["router_loss"], rtol=1e-5)


def test_router_loss_on_a_mesh() -> None:
    """As on one device; in two microbatches the mean of theirs."""
    (expected, trained), (got, trained_on_mesh) = [
        router_step(mesh, 2, 0.5) for mesh in (MeshConfig(data=1), MeshConfig(data=2, expert=2))
    ]
    np.testing.assert_allclose(got["router_loss"], expected["router_loss"], rtol=1e-5)
    close((got["loss"], trained_on_mesh), (expected["loss"], trained))


@pytest.mark.parametrize("block", [1, 4, 8])
def test_routes_by_hand(block: int) -> None:
    """Every copy of a token has a row of its expert, and every other row is padding."""
    rng = np.random.default_rng(4)
    # Expert 3 is chosen by nobody, and expert 0 by every token.
    chosen = np.stack([np.zeros(10, int), rng.choice([1, 2, 4], size=10)], axis=1)
    routed = grouped.route(jnp.asarray(chosen)[None], experts=5, block=block)
    place, token = np.asarray(routed.place[0]), np.asarray(routed.token[0])
    expert, sizes = np.asarray(routed.rows.expert[0]), np.asarray(routed.rows.sizes[0])
    assert len(set(place.flatten())) == 20
    np.testing.assert_array_equal(expert[place], chosen)
    np.testing.assert_array_equal(token[place], np.arange(10)[:, None].repeat(2, axis=1))
    assert sorted(set(range(len(token))) - set(place.flatten())) == list(
        np.flatnonzero(token == 10)
    )
    counts = np.bincount(chosen.flatten(), minlength=5)
    np.testing.assert_array_equal(sizes, -(-counts // block) * block)
    assert (expert.reshape(-1, block) == expert.reshape(-1, block)[:, :1]).all()
    assert sizes.sum() <= len(token)


def test_an_expert_may_take_all_tokens() -> None:
    """The worst case for blocks: the rows still have room."""
    chosen = jnp.zeros((1, 64, 1), jnp.int32)
    routed = grouped.route(chosen, experts=8, block=8)
    assert routed.rows.sizes[0].tolist() == [64, *[0] * 7]
    assert len(set(routed.place.flatten().tolist())) == 64


def test_frozen_kernels_cost_no_gradient() -> None:
    """The loop that adds up the gradient of the kernels is compiled only where it is needed."""
    routed = grouped.route(jnp.asarray([[[0, 3]] * 16]), experts=4, block=8)
    product = grouped.product_of("blocks", block=8)

    def loss(x: Array, kernels: Array) -> Array:
        return jnp.sum(product(x, kernels, routed.rows) ** 2)

    x = jnp.ones((1, routed.token.shape[1], 5))
    loops = {}
    for arguments in ((0,), (0, 1)):
        gradient = jax.jit(jax.grad(loss, argnums=arguments))
        compiled = gradient.lower(x, jnp.ones((4, 5, 6))).compile()
        loops[arguments] = compiled.as_text().count(" while(")
    assert loops[0,] == loops[0, 1] - 1


def test_few_tokens_need_few_blocks() -> None:
    """One token that is generated: as many blocks as it has experts."""
    routed = grouped.route(jnp.asarray([[[5, 120]]]), experts=128, block=8)
    assert routed.token.shape == (1, 2 * 8)
    assert routed.rows.expert[0, routed.place[0, 0]].tolist() == [5, 120]


def test_the_cost_is_that_of_the_chosen_experts() -> None:
    """At 2 of 8 experts within 1.3 times of a third of the dense form's operations."""
    tokens = jnp.zeros((8, 64), jnp.int32)
    counts = {}
    for kind in ("dense", *KINDS):
        # As wide as the experts of real models are, beside attention.
        config = dataclasses.replace(SPARSE, mlp_width=256, expert_products=kind)
        model = CausalLM(config=config)
        params = add_adapters(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config)),
            AdapterConfig(rank=3),
            layout=model.layout,
            key=jax.random.key(0),
        )
        trained, frozen = partition(params)

        def loss(trained: Tree, model: CausalLM = model, frozen: Tree = frozen) -> Array:
            features, _ = model.features(combine(trained, frozen), tokens)
            return jnp.mean(features)

        counts[kind] = count_flops(jax.make_jaxpr(jax.grad(loss))(trained).jaxpr)
    for kind in KINDS:
        assert counts[kind] < 1.3 * counts["dense"] / 3
