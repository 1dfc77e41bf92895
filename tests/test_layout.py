"""The layout that a trace finds for a model's layers."""

from __future__ import annotations

import copy
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.layout import TracedLayout, layout, logical_paths
from lorax_ft.lowrank.targets import plan_adapters

KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("strict")

# path: kind, stack axes, in axes, out axes, experts
LITERAL: dict[
    str, dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]]
] = {
    "convolutions": {
        "first": ("conv", (), (0, 1, 2), (3,), 0),
        "second": ("conv", (), (0, 1, 2), (3,), 0),
        "line": ("conv", (), (0, 1), (2,), 0),
        "classes": ("dense", (), (0,), (1,), 0),
    },
    "vit_scanned": {
        "patches": ("conv", (), (0, 1, 2), (3,), 0),
        "layers/attention/query": ("general", (0,), (1,), (2, 3), 0),
        "layers/attention/key": ("general", (0,), (1,), (2, 3), 0),
        "layers/attention/value": ("general", (0,), (1,), (2, 3), 0),
        "layers/attention/out": ("general", (0,), (1, 2), (3,), 0),
        "layers/up": ("dense", (0,), (1,), (2,), 0),
        "layers/down": ("dense", (0,), (1,), (2,), 0),
        "classes": ("dense", (), (0,), (1,), 0),
    },
    "einsums": {
        "query": ("einsum", (), (1,), (0, 2), 0),
        "attention_out": ("einsum", (), (0, 1), (2,), 0),
        "square": ("einsum", (), (1,), (0,), 0),
        "experts_up": ("einsum", (0,), (1,), (2,), 1),
        "experts_down": ("einsum", (0,), (1,), (2,), 1),
        "classes": ("einsum", (), (0,), (1,), 0),
    },
    "decoder": {
        "embed_tokens": ("embed", (), (0,), (1,), 0),
        **{f"layers/self_attn/{name}_proj": ("dense", (0,), (1,), (2,), 0) for name in "qkvo"},
        **{
            f"layers/mlp/{name}_proj": ("dense", (0,), (1,), (2,), 0)
            for name in ("gate", "up", "down")
        },
        "lm_head": ("dense", (), (0,), (1,), 0),
    },
    "boxed": {
        "first": ("dense", (), (0,), (1,), 0),
        "second": ("general", (), (0,), (1, 2), 0),
    },
}
LITERAL["vit_rematted"] = LITERAL["vit_scanned"]


@pytest.mark.parametrize("model", LITERAL)
def test_a_models_layers(zoo: Any, model: str) -> None:
    found = zoo(model).layout
    assert {
        path: (s.module, s.stack, s.ins, s.outs, s.experts) for path, s in found.items()
    } == LITERAL[model]
    assert [path for path, spec in found.items() if spec.by_name] == (
        ["lm_head"] if model == "decoder" else []
    )


def test_an_unrolled_model_has_no_stacks(zoo: Any) -> None:
    found = zoo("vit_unrolled").layout
    assert not any(spec.stack for spec in found.values())
    assert {
        path.replace("layers/1/", "layers/")
        for path in found
        if "/0/" not in path and "/2/" not in path
    } == set(LITERAL["vit_scanned"])


def test_logical_paths_of_a_stack_are_those_of_the_unrolled_model(zoo: Any) -> None:
    scanned, unrolled = zoo("vit_scanned"), zoo("vit_unrolled")
    names: list[str] = []
    for path, spec in scanned.layout.items():
        node: Any = scanned.params
        for part in path.split("/"):
            node = node[part]
        names += logical_paths(path, spec, node["kernel"].shape)
    assert sorted(names) == sorted(unrolled.layout)


def test_shapes_are_enough(zoo: Any) -> None:
    case = zoo("vit_rematted")
    abstract = jax.eval_shape(lambda p: p, case.params)
    example = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.example]
    assert layout(case.apply, abstract, *example) == case.layout


def test_leaves_of_adapters_are_looked_past(zoo: Any) -> None:
    case = zoo("convolutions")
    params = case.params | {
        "second": case.params["second"] | {"lora_a": jnp.ones(3), "norm": jnp.ones(2)}
    }
    assert layout(case.apply, params, *case.example) == case.layout


@pytest.mark.parametrize("model", ["vit_scanned", "einsums", "convolutions", "decoder"])
def test_restored_inverts_canonical(zoo: Any, model: str) -> None:
    for spec in zoo(model).layout.values():
        shape = tuple(range(2, 2 + len(spec.stack + spec.ins + spec.outs)))
        kernel = jax.random.normal(KEY, shape)
        canonical = spec.canonical("kernel", kernel)
        assert canonical.shape == tuple(shape[i] for i in spec.stack + spec.ins + spec.outs)
        np.testing.assert_array_equal(spec.restored("kernel", canonical), kernel)


def test_a_scan_over_another_axis_raises() -> None:
    size = 8  # as many rows as layers, so that the shape is ambiguous

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: None) -> tuple[Array, None]:
            return nn.Dense(size, name="inner")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            scan = nn.scan(
                Body,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=3,
                in_axes=nn.broadcast,
            )
            return scan(name="layers")(x, None)[0]

    x = jnp.ones((2, size))
    params = Model().init(KEY, x)["params"]
    with pytest.raises(ValueError, match=r"layers/inner.*first axis"):
        layout(Model().apply, params, x)


@pytest.mark.parametrize(
    "module",
    [
        nn.DenseGeneral(3, batch_dims=(0,), axis=-1),
        nn.Conv(4, 3, feature_group_count=4),
        nn.Conv(4, 3, mask=jnp.ones((3, 4, 4))),
        nn.LayerNorm(),
        nn.ConvTranspose(4, (3,)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_cannot_be_adapted_is_left_out(module: nn.Module) -> None:
    x = jnp.ones((2, 5, 4))
    params = module.init(KEY, x)["params"]
    found = layout(module.apply, params, x)
    assert found == {}
    if isinstance(module, nn.LayerNorm):  # it has no matrix
        assert found.unseen == {}
        return
    reason = "no call of a layer" if isinstance(module, nn.ConvTranspose) else "this form"
    assert found.unseen["kernel"].startswith(reason)
    with pytest.raises(ValueError, match=f"'kernel' matches kernel, .* {reason}"):
        plan_adapters(AdapterConfig(targets=("kernel",)), params, layout=found)
    with pytest.raises(ValueError, match=f"there are none; .*kernel cannot be adapted: {reason}"):
        plan_adapters(AdapterConfig(), params, layout=found)


def test_a_table_that_is_an_output_head_too_is_left_out() -> None:
    """An adapter on the lookup would not act on `attend`, so merged and adapted would differ."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens: Array) -> Array:
            table = nn.Embed(11, 8, name="table")
            return table.attend(nn.Dense(8, name="inner")(table(tokens)))

    tokens = jnp.arange(4)[None]
    found = layout(Tied().apply, Tied().init(KEY, tokens)["params"], tokens)
    assert set(found) == {"inner"}
    assert found.unseen == {"table/embedding": "its table is an output head too (attend)"}


def test_a_layer_without_a_path() -> None:
    x = jnp.ones((2, 5))
    module = nn.Dense(3)
    found = layout(module.apply, module.init(KEY, x)["params"], x)
    assert set(found) == {""}
    assert logical_paths("", found[""], (5, 3)) == [""]


def test_scans_in_scans_have_an_index_each() -> None:
    def repeated(body: Any, length: int) -> Any:
        return nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=length,
            in_axes=nn.broadcast,
        )

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: None) -> tuple[Array, None]:
            return nn.Dense(4, name="dense")(x), None

    class Middle(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: None) -> tuple[Array, None]:
            return repeated(Inner, 3)(name="inner")(x, None)[0], None

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return repeated(Middle, 2)(name="outer")(x, None)[0]

    x = jnp.ones((2, 4))
    params = Outer().init(KEY, x)["params"]
    spec = layout(Outer().apply, params, x)["outer/inner/dense"]
    assert (spec.stack, spec.ins, spec.outs) == ((0, 1), (2,), (3,))
    names = logical_paths("outer/inner/dense", spec, (2, 3, 4, 4))
    assert len(set(names)) == 6
    assert names == [f"outer/{i}/inner/{j}/dense" for i in range(2) for j in range(3)]


def test_copies_and_unions_keep_what_the_trace_did_not_find() -> None:
    class Wrapped(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(self.width, name="dense")(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = Wrapped(5, name="wide")(Wrapped(4, name="net")(x))
            return x @ self.param("raw", nn.initializers.ones, (5, 2))

    x = jnp.ones((2, 4))
    found = layout(Model().apply, Model().init(KEY, x)["params"], x)
    notes = vars(found)
    assert [set(notes[name]) for name in ("unseen", "blocks", "refused")] == [
        {"raw"},
        {"net"},
        {"wide"},
    ]
    few = {"net/dense": found["net/dense"]}
    in_place = TracedLayout()
    in_place |= found
    for same in (found.copy(), found | few, few | found, in_place, copy.deepcopy(found)):
        assert isinstance(same, TracedLayout)
        assert same == found
        assert vars(same) == notes
    found.copy().blocks.clear()
    assert found.blocks
