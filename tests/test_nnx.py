"""NNX models: their linen twins in the zoo say what is right."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_cases import assert_trees_equal
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from method_cases import EVERYWHERE, KEY, TABLE, Adapted, adapter_config, distance
from nnx_models import TWINS

import lorax_ft as lft
from lorax_ft.lowrank.layout import logical_paths
from lorax_ft.tree import Tree, flatten, unflatten

pytestmark = pytest.mark.usefixtures("strict")

CASES = [
    *((name, method) for name in TWINS for method in (*EVERYWHERE, "vera-standard")),
    *(("vit_rematted", name) for name in TABLE if "standard" in name and name not in EVERYWHERE),
]
RNGS = functools.partial(nnx.Rngs, 0)


@functools.cache
def twin(name: str) -> Any:
    """The function of a linen model's twin, which takes the linen model's parameters."""
    apply, _ = lft.from_nnx(TWINS[name](RNGS()))
    return apply


def leaves(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


@pytest.mark.parametrize("name", TWINS)
def test_a_models_parameters_layers_and_output(zoo: Any, name: str) -> None:
    case = zoo(name)
    apply, params = lft.from_nnx(TWINS[name](RNGS()))
    assert leaves(params) == leaves(case.params)
    assert lft.layout(apply, params, *case.example) == case.layout
    y = apply({"params": case.params}, *case.example)
    assert distance(y, case.plain(case.params)) < 1e-6
    model = apply.model(case.params)
    np.testing.assert_array_equal(model(*case.example), y)


@pytest.mark.sampled(36)
@pytest.mark.parametrize(("name", "method"), CASES)
def test_an_adapter_computes_what_it_does_in_linen(
    zoo: Any, adapted: Adapted, randomize: Any, name: str, method: str
) -> None:
    case = zoo(name)
    params = randomize(adapted(name, method))
    y = jax.jit(lft.adapt(twin(name)))({"params": params}, *case.example)
    want = case.forward(params)
    assert distance(y, want) < 1e-6
    assert distance(case.plain(case.params), want) > 1e-3
    merged = lft.merge_adapters(params, layout=case.layout)
    assert distance(twin(name)({"params": merged}, *case.example), y) < 1e-5


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("einsums", "none"),
        pytest.param("vit_rematted", "nf4", marks=pytest.mark.slow),
        pytest.param("vit_rematted", "int8", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_linen_also_on_a_quantized_base(
    zoo: Any, randomize: Any, name: str, quant: Any
) -> None:
    case = zoo(name)
    base = case.params
    if quant != "none":
        config = lft.QuantConfig(format=quant)
        base, _ = lft.quantize_base(base, config, layout=case.layout)
    few = {"einsums": ("query", "experts_up"), "vit_rematted": ("up", "query")}[name]
    config = lft.AdapterConfig(rank=2, dora=True, targets=few)
    params = randomize(lft.add_adapters(base, config, layout=case.layout, key=KEY))
    params = lft.with_dropout(params, KEY, rate=0.3)
    trained, frozen = lft.partition(params)

    def gradients(apply: Any) -> dict[str, Array]:
        def loss(trained: Tree) -> Array:
            y = lft.adapt(apply)({"params": lft.combine(trained, frozen)}, *case.example)
            return jnp.sum(jnp.sin(y))

        return flatten(jax.jit(jax.grad(loss))(trained))

    got, want = gradients(twin(name)), gradients(case.apply)
    assert set(got) == set(want)
    for path in want:
        assert distance(got[path], want[path]) < 1e-5, path


@pytest.mark.parametrize("targets", [("attention",), ("LayerNorm_1", "down")])
def test_a_bottleneck_beside_a_module_computes_what_it_does_in_linen(
    zoo: Any, randomize: Any, targets: tuple[str, ...]
) -> None:
    case, apply = zoo("vit_rematted"), twin("vit_rematted")
    config = lft.AdapterConfig(
        method="bottleneck", rank=3, bottleneck_input="input", targets=targets
    )
    layout = lft.layout(apply, case.params, *case.example)
    trees = [
        randomize(lft.add_adapters(case.params, config, layout=each, key=KEY))
        for each in (layout, case.layout)
    ]
    assert leaves(trees[0]) == leaves(trees[1])
    y = jax.jit(lft.adapt(apply))({"params": trees[1]}, *case.example)
    assert distance(y, case.forward(trees[1])) < 1e-6
    assert distance(y, case.plain(case.params)) > 1e-3


def test_our_step_trains_it_and_leaves_the_frozen_leaves_unchanged(zoo: Any) -> None:
    case = zoo("einsums")
    apply = lft.adapt(twin("einsums"))
    params = lft.add_adapters(
        case.params, adapter_config("einsums", EVERYWHERE[0]), layout=case.layout, key=KEY
    )
    trained, frozen = lft.partition(params)
    before = jax.tree.map(np.asarray, frozen)

    def loss(params: Tree, batch: Tree, key: Array | None) -> tuple[Array, Array, Tree]:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            apply({"params": params}, batch["x"]), batch["y"]
        )
        return losses.sum(), jnp.float32(losses.size), {}

    tx = lft.make_optimizer(lft.OptimConfig(learning_rate=1e-2), steps=5)
    step = jax.jit(lft.make_train_step(loss, tx, layout=case.layout))
    state = lft.TrainState(jnp.int32(0), trained, tx.init(trained))
    (x,) = case.example
    batch = {"x": x[None], "y": jnp.zeros((1, *x.shape[:2]), jnp.int32)}
    losses = []
    for _ in range(5):
        with jax.numpy_dtype_promotion("standard"):  # optax adds an int32 step count to a float
            state, metrics = step(state, frozen, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    for path, leaf in flatten(state.trained).items():
        assert not np.array_equal(leaf, flatten(trained)[path]), path


def test_several_adapters_over_one_base_by_vmap(zoo: Any, adapted: Adapted, randomize: Any) -> None:
    case = zoo("vit_rematted")
    trees = [randomize(adapted("vit_rematted", "kaiming-standard"), seed) for seed in (1, 2)]
    owned, base = zip(*(lft.partition(tree, by="ownership") for tree in trees), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owned)
    apply = lft.adapt(twin("vit_rematted"))
    many = jax.vmap(lambda mine: apply({"params": lft.combine(mine, base[0])}, *case.example))(
        stacked
    )
    for y, tree in zip(many, trees, strict=True):
        assert distance(y, case.forward(tree)) < 1e-5


def test_two_adapters_do_not_share_the_program_of_a_jitted_method(
    zoo: Any, adapted: Adapted, randomize: Any
) -> None:
    """`nnx.jit` caches by the module's structure. VeRA's A and B are not in its state."""
    case = zoo("convolutions")
    apply = lft.adapt(twin("convolutions"))
    start = adapted("convolutions", "vera-standard")
    for factor in (1.0, 2.0):
        params = randomize(start) | {"vera_a": factor * start["vera_a"]}
        y = apply({"params": params}, *case.example)
        assert distance(y, case.forward(params)) < 1e-6


class Recurrent(nnx.Module):
    """Layers that are called twice or not, weights that are shared or used directly."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(11, 6, rngs=rngs)
        self.places = nnx.Embed(3, 6, rngs=rngs)
        self.twice = nnx.Linear(6, 6, rngs=rngs)
        self.lstm = nnx.RNN(nnx.LSTMCell(6, 6, rngs=rngs), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.left = nnx.Linear(6, 6, rngs=rngs)
        self.right = nnx.Linear(6, 6, rngs=rngs)
        self.right.kernel = self.left.kernel
        self.idle = nnx.Linear(6, 6, rngs=rngs)
        self.raw = nnx.Param(jnp.eye(6))

    def __call__(self, tokens: Array) -> Array:
        x = self.table(tokens) + self.places(jnp.arange(3))
        x = self.lstm(self.twice(nnx.tanh(self.twice(x))))
        x = self.dropout(self.norm(x))
        x = self.right(nnx.tanh(self.left(x))) @ self.raw
        return self.table.attend(x)


TOKENS = jnp.arange(6).reshape(2, 3)


def test_state_is_handed_on() -> None:
    model = Recurrent(RNGS())
    apply, params = lft.from_nnx(model)
    variables = {"params": params, "state": apply.state}
    first, state = apply(variables, TOKENS)
    second, state = jax.jit(apply)(variables | {"state": state}, TOKENS)
    assert distance(model(TOKENS), first) < 1e-5
    assert distance(model(TOKENS), second) < 1e-5
    assert distance(first, second) > 1e-2  # another dropout
    assert distance(state["norm"]["mean"], model.norm.mean[...]) < 1e-5
    with pytest.raises(ValueError, match=r"the call changes .* model\.eval\(\)"):
        apply({"params": params}, TOKENS)


class Wrapped(nnx.Module):
    """A layer with state inside a transformation."""

    def __init__(self, how: str, rngs: nnx.Rngs):
        self.how = how
        self.block = nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        )

    def __call__(self, x: Array) -> Array:
        def call(block: nnx.Module, x: Array) -> Array:
            return block(x)

        if self.how == "scan":
            in_axes = (None, nnx.Carry)
            return nnx.scan(call, in_axes=in_axes, out_axes=nnx.Carry, length=2)(self.block, x)
        return {"jit": nnx.jit, "remat": nnx.remat}[self.how](call)(self.block, x)


@pytest.mark.parametrize("how", ["jit", "remat", "scan"])
def test_state_that_is_not_set_is_no_change(how: str) -> None:
    """Also where a transformation takes it along and puts it back."""
    model = Wrapped(how, RNGS())
    x = jnp.ones((2, 4))
    for _ in range(2):  # the second time nnx.jit has the program
        apply, params = lft.from_nnx(model)
        with pytest.raises(ValueError, match="the call changes block/layers/1/rngs/count"):
            apply({"params": params}, x)
    model.eval()
    apply, params = lft.from_nnx(model)
    for function in (apply, jax.jit(apply)):
        assert distance(function({"params": params}, x), model(x)) < 1e-6


def test_what_cannot_be_adapted_is_named_with_its_reason(randomize: Any) -> None:
    model = Recurrent(RNGS())
    model.eval()
    apply, params = lft.from_nnx(model)
    layout = lft.layout(apply, params, TOKENS)
    cells = {f"lstm/cell/{name}" for name in ["ii", "if_", "ig", "io", "hi", "hf", "hg", "ho"]}
    assert set(layout) == {"places", "twice", *cells}
    reasons = {
        "table/embedding": "without a call",
        "left/kernel": "of left and right",
        "idle/kernel": "no call of a layer",
        "raw": "Recurrent is no layer",
    }
    assert set(layout.unseen) == set(reasons)
    for path, reason in reasons.items():
        config = lft.AdapterConfig(rank=2, targets=(path.partition("/")[0],))
        with pytest.raises(
            ValueError, match=f"'{path.partition('/')[0]}' matches {path}.*{reason}"
        ):
            lft.add_adapters(params, config, layout=layout, key=KEY)
    config = lft.AdapterConfig(rank=2, targets=("all-linear", "places"))
    changed = randomize(lft.add_adapters(params, config, layout=layout, key=KEY))
    y, _ = lft.adapt(apply)({"params": changed, "state": apply.state}, TOKENS)
    merged = lft.merge_adapters(changed, layout=layout)
    assert distance(apply.model(merged)(TOKENS), y) < 1e-5
    assert distance(model(TOKENS), y) > 1e-2


def test_a_linen_model_inside_nnx_is_named() -> None:
    x = jnp.ones((2, 4))
    bridge = nnx.bridge.ToNNX(linen.Dense(3), rngs=RNGS()).lazy_init(x)
    cases = {"kernel": bridge, "inner/kernel": nnx.Dict(inner=bridge)}
    for path, model in cases.items():
        apply, params = lft.from_nnx(model, lambda model, x: getattr(model, "inner", model)(x))
        found = lft.layout(apply, params, x)
        assert found == {}
        assert "adapt the linen model itself" in found.unseen[path]


class Product(nnx.Module):
    """A layer that is not nnx's own."""

    def __init__(self, equation: str, shape: tuple[int, ...], rngs: nnx.Rngs):
        self.einsum_str = equation
        self.w = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), shape))

    def __call__(self, x: Array) -> Array:
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Named(nnx.Linear):
    """A subclass that computes what nnx's own layer does."""


class Own(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.heads = Product("BTD,DNH->BTNH", (6, 2, 4), rngs)
        self.out = Product("BTNH,NHD->BTD", (2, 4, 6), rngs)
        self.named = Named(6, 6, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.named(nnx.tanh(self.out(nnx.tanh(self.heads(x)))))


@pytest.mark.parametrize("method", ["kaiming-standard", "pissa_kept-rank_stabilized-dora"])
def test_a_class_of_layers_of_ones_own(randomize: Any, method: str) -> None:
    x = jax.random.normal(KEY, (2, 3, 6))
    apply, params = lft.from_nnx(Own(RNGS()), layers={Product: ("einsum", "w")})
    layout = lft.layout(apply, params, x)
    axes = {path: (spec.module, spec.ins, spec.outs) for path, spec in layout.items()}
    assert axes == {
        "heads": ("einsum", (0,), (1, 2)),
        "out": ("einsum", (0, 1), (2,)),
        "named": ("dense", (0,), (1,)),
    }
    config = adapter_config("own", method)
    changed = randomize(lft.add_adapters(params, config, layout=layout, key=KEY))
    y = lft.adapt(apply)({"params": changed}, x)
    merged = apply.model(lft.merge_adapters(changed, layout=layout))
    assert distance(merged(x), y) < 1e-5
    assert distance(apply({"params": params}, x), y) > 1e-2
    apply, params = lft.from_nnx(Own(RNGS()))
    layout = lft.layout(apply, params, x)
    config = lft.AdapterConfig(rank=2, targets=("heads",))
    with pytest.raises(ValueError, match=r"heads/w.*Product is no layer.*layers=\{Product: "):
        lft.add_adapters(params, config, layout=layout, key=KEY)


class Stacked(nnx.Module):
    """Only stacked blocks, in a module that holds nothing else; and a stack of one layer."""

    def __init__(self, rngs: nnx.Rngs):
        def block(rngs: nnx.Rngs) -> nnx.Dict:
            layers = {name: nnx.Linear(4, 4, rngs=rngs) for name in ("up", "down")}
            return nnx.Dict(layers)

        stacked = nnx.split_rngs(splits=3)(nnx.vmap(block))
        self.encoder = nnx.Dict(blocks=stacked(rngs))
        self.many = nnx.split_rngs(splits=2)(nnx.vmap(lambda r: nnx.Linear(4, 5, rngs=r)))(rngs)

    def __call__(self, x: Array) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Array, block: Any) -> Array:
            return block["down"](nnx.tanh(block["up"](x)))

        x = run(x, self.encoder["blocks"])
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.many, x)


def test_the_layers_of_a_stack_are_numbered_behind_the_module_that_is_stacked() -> None:
    apply, params = lft.from_nnx(Stacked(RNGS()))
    layout = lft.layout(apply, params, jnp.ones((2, 4)))
    names = [
        name
        for path, shape in (("encoder/blocks/up", (3, 4, 4)), ("many", (2, 4, 5)))
        for name in logical_paths(path, layout[path], shape)
    ]
    assert names == [*(f"encoder/blocks/{i}/up" for i in range(3)), "many/0", "many/1"]


@pytest.mark.parametrize("quant", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_quantized_layers_inside_a_scan(randomize: Any, quant: Any) -> None:
    """The output and its gradients are those on the dequantized kernels."""
    x = jax.random.normal(KEY, (2, 4))
    apply, params = lft.from_nnx(Stacked(RNGS()))
    layout = lft.layout(apply, params, x)
    base, _ = lft.quantize_base(params, lft.QuantConfig(format=quant), layout=layout)
    plain = lft.merge_adapters(base, layout=layout)
    owned, _ = lft.partition(
        randomize(lft.add_adapters(base, lft.AdapterConfig(rank=2), layout=layout, key=KEY)),
        by="ownership",
    )

    def gradients(base: Tree) -> tuple[Array, Tree]:
        def loss(owned: Tree) -> Array:
            return jnp.sum(jnp.sin(lft.adapt(apply)({"params": lft.combine(owned, base)}, x)))

        return jax.jit(jax.value_and_grad(loss))(owned)

    got, want = gradients(base), gradients(plain)
    assert distance(got[0], want[0]) < 1e-5
    for path, leaf in flatten(want[1]).items():
        assert distance(flatten(got[1])[path], leaf) < 1e-5, path
    assert not isinstance(flatten(base)["many/kernel"], jax.Array)
    with pytest.raises(ValueError, match="a quantized kernel, which only adapt"):
        apply({"params": base}, x)


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"method": "vera"}])
def test_adapters_come_back_from_their_folder(
    tmp_path: Path, randomize: Any, options: dict[str, Any]
) -> None:
    """Of a model with names of its own, stacked layers and a layer class that is not nnx's."""
    for model, kinds, x in (
        (Stacked(RNGS()), {}, jnp.ones((2, 4))),
        (Own(RNGS()), {Product: ("einsum", "w")}, jnp.ones((2, 3, 6))),
    ):
        apply, base = lft.from_nnx(model, layers=kinds)
        layout = lft.layout(apply, base, x)
        config = lft.AdapterConfig(rank=2, **options)
        params = randomize(lft.add_adapters(base, config, layout=layout, key=KEY))
        folder = tmp_path / type(model).__name__
        lft.save_adapter(folder, params, config=config)
        again = lft.load_adapter(folder, base, layout=layout)
        assert_trees_equal(again, params)


def test_mistakes_are_one_line() -> None:
    model = nnx.Linear(4, 3, rngs=RNGS())
    x = jnp.ones((2, 4))
    apply, params = lft.from_nnx(model)
    layout = lft.layout(apply, params, x)
    changed = lft.add_adapters(params, lft.AdapterConfig(rank=2), layout=layout, key=KEY)
    bridge = nnx.bridge.ToLinen(nnx.Linear, args=(4, 3))
    variables = bridge.init(KEY, x)
    lora = nnx.LoRALinear(4, 3, lora_rank=2, rngs=RNGS())
    mistakes = [
        (lambda: lft.layout(model, params, x), "layout was given an nnx.Module.*from_nnx"),
        (lambda: lft.layout(model.__call__, params, x), "layout was given an nnx.Module"),
        (lambda: lft.adapt(model), "adapt was given an nnx.Module.*from_nnx"),
        (lambda: lft.layout(apply, nnx.state(model), x), "an nnx.State.*from_nnx"),
        (lambda: lft.layout(apply, model, x), "layout was given an nnx.Module.*from_nnx"),
        (lambda: lft.save_adapter("out", nnx.state(model)), "save_adapter was given an nnx.State"),
        (lambda: lft.save_peft("out", changed, apply), "is a NnxApply; save_adapter writes"),
        (lambda: lft.save_peft("out", changed, model), "is a Linear; save_adapter writes"),
        (lambda: lft.load_peft("out", model), "load_peft is for .* load_adapter reads them"),
        (
            lambda: lft.add_adapters(model, lft.AdapterConfig(), layout=layout, key=KEY),
            "add_adapters was given an nnx.Module",
        ),
        (
            lambda: lft.load_adapter("out", nnx.state(model), layout=layout),
            "load_adapter was given an nnx.State",
        ),
        (lambda: lft.layout(bridge.apply, variables["params"], x), "ToLinen.*from_nnx"),
        (lambda: lft.from_nnx(apply), "needs an nnx.Module, not NnxApply"),
        (lambda: lft.from_nnx(lora), "'lora/lora_a' has the name of a leaf"),
        (lambda: apply({"params": changed}, x), "only adapt"),
        (lambda: apply.model(changed), "only adapt"),
        (lambda: apply(params, x), "the variables are"),
        (lambda: apply({"params": {}}, x), "the model has bias, which the variables lack"),
        (lambda: apply({"params": params | {"more": x}}, x), "more, which the model lacks"),
        (
            lambda: lft.adapt(apply)({"params": params | {"up": changed}}, x),
            "up/.*which the model lacks",
        ),
        (
            lambda: lft.adapt(apply)({"params": params | {"up": {"lora_scale": x}}}, x),
            "up has an adapter, but the model has no such layer",
        ),
        (
            lambda: lft.from_nnx(Own(RNGS()), layers={Product: ("einsum", "v")}),
            "heads, a Product, has no nnx.Param called 'v'.*: w",
        ),
        (
            lambda: lft.from_nnx(Own(RNGS()), layers={Product: ("conv", "w")}),
            "Product is said to be 'conv'",
        ),
        (
            lambda: lft.from_nnx(
                nnx.LSTMCell(4, 3, rngs=RNGS()), layers={nnx.Linear: ("einsum", "kernel")}
            ),
            "hf, a Linear, has no einsum_str",
        ),
    ]
    for call, message in mistakes:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_modules_of_unusual_classes_take_a_bottleneck(randomize: Any) -> None:
    """A class that is no pytree, one with its own subclasses' check, one that guards attributes."""

    class Plain(nnx.Module, pytree=False):
        def __init__(self) -> None:
            self.layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(0))]

        @nnx.jit
        def __call__(self, x: Array) -> Array:
            return self.layers[0](x)

    class Named(nnx.Module):
        def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
            super().__init_subclass__(**options)

    class OfAKind(Named, kind="dense"):
        def __init__(self) -> None:
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

        def __call__(self, x: Array) -> Array:
            return self.layer(x)

    class Guarded(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(2))

        def __setattr__(self, name: str, value: Any) -> None:
            if "hook" in name:
                raise AttributeError(name)
            super().__setattr__(name, value)

        def __call__(self, x: Array) -> Array:
            return self.layer(x)

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.plain, self.kind, self.guarded = Plain(), OfAKind(), Guarded()

        def __call__(self, x: Array) -> Array:
            return self.guarded(self.kind(self.plain(x)))

    apply, params = lft.from_nnx(Model())
    x = jax.random.normal(KEY, (2, 4))
    found = lft.layout(apply, params, x)
    assert set(found) == {"plain/layers/0", "kind/layer", "guarded/layer"}
    assert set(found.blocks) == {"plain", "kind", "guarded"}
    config = lft.AdapterConfig(
        method="bottleneck", rank=2, bottleneck_input="input", targets=tuple(found.blocks)
    )
    changed = randomize(lft.add_adapters(params, config, layout=found, key=KEY))
    want = x
    for name in ("plain", "kind", "guarded"):
        layer = changed[name]
        (kernel,) = [leaf for path, leaf in flatten(params[name]).items() if "kernel" in path]
        hidden = nnx.relu(want @ layer["bottleneck_a_input"] + layer["bottleneck_bias_a"])
        want = want @ kernel + hidden @ layer["bottleneck_b"] + layer["bottleneck_bias_b"]
    assert distance(lft.adapt(apply)({"params": changed}, x), want) < 1e-5


class Dispatching(nnx.Module):
    """It calls its layers by what `type` says, and a subclass that calls its base's `__call__`."""

    def __init__(self, rngs: nnx.Rngs):
        class Doubled(nnx.Linear):
            def __call__(self, x: Array) -> Array:
                return 2 * super().__call__(x)

        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), Doubled(4, 4, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = nnx.tanh(layer(x)) if type(layer) is nnx.Linear else layer(x)
        return x


def test_a_layer_keeps_its_class_while_it_is_hooked(randomize: Any) -> None:
    model, x = Dispatching(RNGS()), jax.random.normal(KEY, (2, 4))
    own = vars(nnx.Linear)["__call__"]
    apply, params = lft.from_nnx(model)
    layout = lft.layout(apply, params, x)
    assert set(layout) == {"layers/0"}
    (reason,) = layout.unseen.values()
    assert 'layers={Doubled: ("dense", "kernel")}' in reason
    config = lft.AdapterConfig(rank=2, targets=("0",))
    changed = randomize(lft.add_adapters(params, config, layout=layout, key=KEY))
    y = lft.adapt(apply)({"params": changed}, x)
    assert distance(y, apply.model(lft.merge_adapters(changed, layout=layout))(x)) < 1e-5
    assert distance(y, model(x)) > 1e-2
    assert vars(nnx.Linear)["__call__"] is own
    assert "__getattribute__" not in vars(nnx.Linear)


def test_another_thread_may_use_the_model_meanwhile(randomize: Any) -> None:
    """It sees no adapter, and its end does not take away this one's."""

    meanwhile: list[Any] = []

    class Calling(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(4, 4, rngs=RNGS())

        def __call__(self, x: Array) -> Array:
            if meanwhile:
                meanwhile.pop()()
            return self.layer(x)

    x = jax.random.normal(KEY, (2, 4))
    apply, params = lft.from_nnx(Calling())
    layout = lft.layout(apply, params, x)
    config = lft.AdapterConfig(rank=2, targets=("layer",))
    changed = randomize(lft.add_adapters(params, config, layout=layout, key=KEY))
    adapted = lft.adapt(apply)
    want = adapted({"params": changed}, x)
    others = []

    def in_another_thread() -> None:
        with ThreadPoolExecutor() as pool:
            for variables in ({"params": params}, {"params": changed}):
                others.append(pool.submit(adapted, variables, x).result())

    meanwhile.append(in_another_thread)
    y = adapted({"params": changed}, x)
    assert distance(y, want) == 0 == distance(others[1], want)
    assert distance(others[0], x @ params["layer"]["kernel"]) < 1e-6


class Sharded(nnx.Module):
    """A table, and products that are split over a mesh by columns and then by rows."""

    def __init__(self, spec: P | None, rngs: nnx.Rngs):
        self.spec = spec
        self.table = nnx.Embed(11, 64, rngs=rngs)
        self.up = nnx.LinearGeneral(64, (4, 32), rngs=rngs)
        self.down = nnx.LinearGeneral((4, 32), 64, axis=(-2, -1), rngs=rngs)
        self.last = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.table(tokens, out_sharding=self.spec)
        x = self.down(nnx.tanh(self.up(x)), out_sharding=self.spec)
        return self.last(x)


LINEAR = {"targets": ("up", "down"), "rank": 2}


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("none", {"targets": ("table", "up", "down"), "rank": 2}),
        ("nf4", {**LINEAR, "dora": True}),
        pytest.param("int8", LINEAR, marks=pytest.mark.slow),
        *(
            pytest.param("none", {**LINEAR, **more}, marks=pytest.mark.slow)
            for more in (
                {"init": "olora"},
                {"init": "pissa", "svd_iterations": 1},
                {"method": "miss"},
                {"method": "bottleneck", "targets": ("last",)},
            )
        ),
    ],
)
def test_a_mesh_of_explicit_axes(quant: Any, options: dict[str, Any]) -> None:
    """What `jax.make_mesh` gives. Outputs and gradients are those without a mesh."""
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), devices=jax.devices()[:4])
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    split_up = P(None, None, "columns")
    split_down = P(None, "columns")
    specs = {"up/kernel": split_up, "up/bias": split_down, "down/kernel": split_down}
    apply, base = lft.from_nnx(Sharded(P("rows"), RNGS()))
    tokens = jnp.arange(12).reshape(4, 3) % 11

    def loss(apply: Any, trained: Tree, frozen: Tree, tokens: Array) -> Array:
        return jnp.sum(jnp.sin(lft.adapt(apply)({"params": lft.combine(trained, frozen)}, tokens)))

    with jax.set_mesh(mesh):
        placed = {
            path: jax.device_put(leaf, NamedSharding(mesh, specs.get(path, P())))
            for path, leaf in flatten(base).items()
        }
        rows = jax.device_put(tokens, NamedSharding(mesh, P("rows")))
        base = unflatten(placed)
        layout = lft.layout(apply, base, rows)
        if quant != "none":
            base, _ = lft.quantize_base(base, lft.QuantConfig(format=quant), layout=layout)
        params = lft.add_adapters(base, lft.AdapterConfig(**options), layout=layout, key=KEY)
        params = lft.with_norms(params, layout=layout)
        trained, frozen = lft.partition(params)
        trained = jax.tree.map(lambda leaf: leaf + 0.05, trained)
        got, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, apply)))(
            trained, frozen, rows
        )
        if options.get("method") != "bottleneck":
            merged = lft.merge_adapters(lft.combine(trained, frozen), layout=layout)
            if quant == "none":
                assert jax.typeof(merged["down"]["kernel"]).sharding.spec[1] == "columns"
            assert abs(loss(apply, merged, {}, rows) - got) < 1e-3
    trained, frozen, gradients = jax.device_get((trained, frozen, gradients))
    apply, _ = lft.from_nnx(Sharded(None, RNGS()))
    want, wanted = jax.jit(jax.value_and_grad(functools.partial(loss, apply)))(
        trained, frozen, tokens
    )
    assert distance(got, want) < 1e-5
    for path, leaf in flatten(wanted).items():
        assert distance(flatten(gradients)[path], leaf) < 1e-4, path
