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
import pytest
from jax import Array
from zoo import TINY

from lorax_ft import AdapterConfig, add_adapters, combine, partition
from lorax_ft.config import MeshConfig, QuantConfig
from lorax_ft.lowrank.quantize import quantize_base
from lorax_ft.models import grouped
from lorax_ft.models.config import ClampedGate, Experts
from lorax_ft.models.model import CausalLM, abstract_params
from lorax_ft.plan.flops import count_flops
from lorax_ft.sharding import DECODER_RULES, batch_sharding, make_mesh, param_shardings
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


@pytest.mark.parametrize(("kind", "format"), [("blocks", "nf4"), ("ragged", "int8")])
def test_quantized_experts(kind: str, format: Any) -> None:
    model = model_of("blocks")
    base, _ = quantize_base(random_params(), QuantConfig(format=format), layout=model.layout)
    params = adapted(base)
    close(
        value_and_gradient(model_of(kind), params),
        value_and_gradient(model_of("dense"), params),
    )


def test_clamped_gates() -> None:
    params = adapted(random_params())
    close(
        value_and_gradient(model_of("blocks", clamped=True), params),
        value_and_gradient(model_of("dense", clamped=True), params),
    )


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("blocks", MeshConfig(data=2, fsdp=2, tensor=2)),
        ("ragged", MeshConfig(data=4, fsdp=2)),
        ("blocks", MeshConfig(fsdp=2, context=4)),
    ],
    ids=["tensor", "ragged", "context"],
)
def test_on_a_mesh(kind: str, mesh: MeshConfig) -> None:
    """Each device sorts its own tokens: as on one device, balanced or not."""
    params = adapted(random_params(), dora=True)
    tokens = jnp.concatenate([TOKENS[:2, :20], TOKENS[:2, :20], jnp.full((4, 20), 5, jnp.int32)])
    expected = value_and_gradient(model_of("dense"), params, tokens)
    devices = make_mesh(mesh)
    model = model_of(kind)
    places = param_shardings(params, DECODER_RULES, layout=model.layout, mesh=devices)
    placed = jax.device_put(params, places)
    rows = jax.device_put(tokens, batch_sharding(devices, microbatched=False))
    with jax.set_mesh(devices):
        close(value_and_gradient(model, placed, rows), expected)


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
