"""Scanned layers equal unrolled ones for any ranks; every matrix has its own random init."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from method_cases import KEY, TABLE, Adapted, distance

from lorax_ft import AdapterConfig, adapt, add_adapters, combine, merge_adapters, partition
from lorax_ft.tree import Tree, flatten

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        *((method, {}) for method in TABLE if "standard" in method),
        ("kaiming-standard-dora", {"layers": (1,)}),
        ("gaussian-standard", {"rank_pattern": ("layers/1/.*=2",)}),
        (
            "kaiming-rank_stabilized",
            {"rank_pattern": ("layers/[02]/up=5",), "alpha_pattern": ("layers/2/up=9",)},
        ),
        (
            "pissa-rank_stabilized-dora",
            {"rank_pattern": ("layers/1/.*=2",), "exclude": ("layers/0/attention/.*",)},
        ),
        ("pissa_kept-standard-dora", {"exclude": ("layers/2/.*",)}),
        ("milora-rank_stabilized-dora", {"rank_pattern": ("layers/1/.*=2",)}),
        ("orthogonal-standard", {"rank_pattern": ("layers/1/.*=2",), "exclude": ("layers/2/.*",)}),
    ],
)
def test_scanned_equals_unscanned(
    zoo: Any, adapted: Adapted, randomize: Any, method: str, fields: dict[str, Any]
) -> None:
    stacked, single = (
        adapted("vit_scanned", method, **fields),
        flatten(adapted("vit_unrolled", method, **fields)),
    )
    flat = flatten(stacked)
    for path, leaf in single.items():
        parts = path.split("/")
        if parts[0] != "layers":
            np.testing.assert_array_equal(leaf, flat[path])
            continue
        mine = flat["/".join([parts[0], *parts[2:]])][int(parts[1])]
        if mine.shape != leaf.shape:  # padded with zeros up to the largest rank
            cut = tuple(slice(n) for n in leaf.shape)
            assert np.count_nonzero(mine) == np.count_nonzero(mine[cut])
            mine = mine[cut]
        np.testing.assert_allclose(mine, leaf, atol=2e-6, rtol=1e-5, err_msg=path)
    random_factor = "lora_b" if method.startswith("mica") else "lora_a"
    assert not any(np.abs(flat[path]).max() == 0 for path in flat if path.endswith(random_factor))
    y = zoo("vit_scanned").forward(stacked)
    assert (
        distance(zoo("vit_unrolled").forward(adapted("vit_unrolled", method, **fields)), y) < 1e-5
    )
    assert distance(zoo("vit_rematted").forward(stacked), y) < 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("kaiming-standard", {"layers": (1,)}),
        ("kaiming-standard-dora", {"exclude": ("layers/[02]/.*",)}),
        ("pissa_kept-standard-dora", {"layers": (1,)}),
    ],
)
def test_layers_without_an_adapter_are_a_fixed_point(
    zoo: Any, adapted: Adapted, randomize: Any, method: str, fields: dict[str, Any]
) -> None:
    """The padding of layers without an adapter gets no gradient; merging keeps their kernels."""
    case = zoo("vit_scanned")
    params = adapted("vit_scanned", method, targets=("up", "attention/query"), **fields)
    active = params["layers"]["up"]["lora_b"][1]
    params["layers"]["up"]["lora_b"] = (
        params["layers"]["up"]["lora_b"].at[1].set(jnp.ones_like(active))
    )
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
        assert (
            np.array_equal(
                merged["up"]["kernel"][index], case.params["layers"]["up"]["kernel"][index]
            )
            == same
        )


def test_a_smaller_rank_is_a_prefix_of_a_larger_one(adapted: Adapted) -> None:
    small, large = (flatten(adapted("decoder", "kaiming-standard", rank=rank)) for rank in (3, 8))
    gaussian = [flatten(adapted("decoder", "gaussian-standard", rank=rank)) for rank in (3, 8)]
    for path in small:
        if path.endswith("lora_a"):
            np.testing.assert_array_equal(small[path], large[path][..., :3])
            np.testing.assert_allclose(
                3 * gaussian[0][path], 8 * gaussian[1][path][..., :3], rtol=1e-6
            )


@pytest.mark.parametrize(
    "method",
    ["kaiming-standard", "gaussian-standard", "orthogonal-standard", "pissa_randomized-standard"],
)
def test_adding_a_target_never_changes_another_leafs_start(adapted: Adapted, method: str) -> None:
    few = flatten(adapted("decoder", method, targets=("q_proj",)))
    many = flatten(adapted("decoder", method, targets=("all-linear", "lm_head", "embed_tokens")))
    for path in few:
        if "q_proj" in path or path.endswith("scale"):
            np.testing.assert_array_equal(few[path], many[path])


def test_every_matrix_has_a_start_of_its_own(adapted: Adapted) -> None:
    flat = flatten(adapted("decoder", "kaiming-standard")) | flatten(
        adapted("einsums", "kaiming-standard")
    )
    starts = []
    for path, leaf in flat.items():
        if path.endswith("lora_a"):
            starts += list(leaf.reshape(-1, *leaf.shape[-2:])) if leaf.ndim == 3 else [leaf]
    firsts = [tuple(np.asarray(start).ravel()[:2].tolist()) for start in starts]
    assert len(set(firsts)) == len(firsts)


def test_kaiming_and_gaussian_have_pefts_spread(decoder: Any) -> None:
    model = decoder(width=256, mlp_width=512, head_dim=64, layers=1)
    kaiming, gaussian = (
        add_adapters(model.params, AdapterConfig(rank=32, init=init), layout=model.layout, key=KEY)[
            "layers"
        ]["mlp"]
        for init in ("kaiming", "gaussian")
    )
    for name, rows in (("up_proj", 256), ("down_proj", 512)):
        a = kaiming[name]["lora_a"]
        assert np.abs(a).max() == pytest.approx(rows**-0.5, rel=1e-2)
        assert a.std() == pytest.approx((3 * rows) ** -0.5, rel=3e-2)
        assert gaussian[name]["lora_a"].std() == pytest.approx(1 / 32, rel=3e-2)
