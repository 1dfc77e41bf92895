"""Which modules the patterns match, and the rank, alpha and scale of each module."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_ft import AdapterConfig, add_adapters, layout
from lorax_ft.lowrank.patterns import check_coverage, first_value, layer_index, matches
from lorax_ft.tree import flatten

PARTS = st.text("abcxyz_019", min_size=1, max_size=5)
PATHS = st.lists(PARTS, min_size=1, max_size=5)


@given(PATHS, st.data())
def test_every_suffix_means_its_module_with_slashes_or_dots(
    parts: list[str], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(parts) - 1))
    path = "/".join(parts)
    assert matches("/".join(parts[start:]), path)
    assert matches(".".join(parts[start:]), path)
    assert matches(".*" + re.escape("." + parts[-1]), "root/" + path)


@given(PATHS, PATHS)
def test_a_plain_name_means_nothing_but_suffixes(pattern: list[str], path: list[str]) -> None:
    numbered = any(part.isdecimal() for part in pattern)
    meant = path if numbered else [part for part in path if not part.isdecimal()]
    is_suffix = path[-len(pattern) :] == pattern or meant[-len(pattern) :] == pattern
    assert matches("/".join(pattern), "/".join(path)) == is_suffix


@given(PATHS, PARTS)
def test_a_part_of_a_name_is_not_the_name(parts: list[str], more: str) -> None:
    path = "/".join(parts)
    assert not matches(more + parts[-1], path) or any(p == more + parts[-1] for p in parts)
    assert not matches(path + more, path)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn", False),
        ("self_attn/q_proj", True),
        ("self_attn.q_proj", True),
        ("layers/3/self_attn/q_proj", True),
        (r".*\.(q|v)_proj", True),
        (r".*(q|v)_proj", True),
        (r"layers\.[0-3]\..*", True),
        (r"layers/[0-2]/.*", False),
        (r"(q|v)_proj", False),  # a regular expression must match the whole path, as in PEFT
        (r"layers/3", False),
        # As the tree of scanned layers has it, and as errors do.
        ("layers/self_attn/q_proj", True),
        ("layers.self_attn.q_proj", True),
        ("layers/*/self_attn/q_proj", True),
        ("layers/4/self_attn/q_proj", False),
        ("", False),
    ],
)
def test_patterns(pattern: str, meant: bool) -> None:
    assert matches(pattern, "layers/3/self_attn/q_proj") == meant


def test_the_first_rule_that_matches_wins() -> None:
    rules = [("layers/3/.*", 1), ("q_proj", 2)]
    assert [first_value(rules, f"layers/{i}/q_proj", 9) for i in (3, 4)] == [1, 2]
    assert first_value(rules, "k_proj", 9) == 9


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("layers/3/mlp/up_proj", 3),
        ("lm_head", None),
        ("", None),
        ("outer/1/inner/0/dense", 1),
        ("layers/10", 10),
    ],
)
def test_layer_index(path: str, index: int | None) -> None:
    assert layer_index(path) == index


def test_coverage_names_the_nearest_and_what_exists_once() -> None:
    names = [f"layers/{i}/mlp/{name}" for i in range(30) for name in ("up_proj", "down_proj")]
    check_coverage(["up_proj"], lambda p: True, names=names, where="here")
    with pytest.raises(
        ValueError, match="here: 'upproj' matches no module; did you mean 'up_proj'"
    ) as error:
        check_coverage(["upproj"], lambda p: False, names=names, where="here")
    assert str(error.value).count("down_proj") == 1


def adapters(model: Any, **fields: Any) -> dict[str, Any]:
    """The paths and shapes of the adapter leaves, without computing them."""
    config = AdapterConfig(**({"rank": 4, "alpha": 8.0} | fields))
    flat = flatten(
        jax.eval_shape(
            lambda p: add_adapters(p, config, layout=model.layout, key=jax.random.key(0)),
            model.params,
        )
    )
    return {path: leaf.shape for path, leaf in flat.items() if "lora" in path}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 7),
        ({"targets": ("q_proj", "v_proj")}, 2),
        ({"targets": ("self_attn/.*",), "exclude": ("o_proj",)}, None),
        ({"targets": (r".*\.self_attn\..*",)}, 4),
        ({"targets": ("all-linear", "lm_head")}, 8),
        ({"targets": ("all-linear", "embed_tokens")}, 8),
        ({"targets": (r".*",)}, 9),
        ({"exclude": ("mlp/up_proj", r".*/self_attn/.*")}, 2),
        ({"exclude": ("all-linear",), "targets": (r".*",)}, 2),
        ({"layers": (0, 2)}, 7),
        ({"targets": ("layers/1/mlp/up_proj",)}, 1),
        ({"targets": (), "train_whole": ("all",)}, 0),
    ],
)
def test_targets(decoder: Any, fields: dict[str, Any], count: int | None) -> None:
    if count is None:  # "self_attn/.*" is not a suffix, and does not match the whole path
        with pytest.raises(ValueError, match="matches no module"):
            adapters(decoder(), **fields)
    else:
        assert sum(path.endswith("lora_a") for path in adapters(decoder(), **fields)) == count


def test_layer_ranges_are_of_layers(decoder: Any) -> None:
    """As in PEFT, `layers` excludes modules outside the layers."""
    found = adapters(decoder(), targets=("q_proj", "embed_tokens", "lm_head"), layers=(1,))
    assert {path.rpartition("/")[0] for path in found} == {"layers/self_attn/q_proj"}


def test_layers_by_their_linen_names() -> None:
    """Lists in `setup` give `layers_1`, and automatic names `Block_1`."""
    assert [
        layer_index(path) for path in ("layers_1/mlp", "Block_12/Dense_0", "conv1", "mlp_x")
    ] == [1, 12, None, None]


def test_a_stack_of_one_layer_is_found_by_its_name() -> None:
    stacked = nn.vmap(
        nn.Dense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return stacked(4, name="v")(x)

    x = np.ones((2, 4), np.float32)
    params = Model().init(jax.random.key(0), x)["params"]
    found = layout(Model().apply, params, x)
    for target, scales in {"v": [1, 1, 1], "v/1": [0, 1, 0], "v/*": [1, 1, 1]}.items():
        config = AdapterConfig(rank=2, alpha=2.0, targets=(target,))
        added = add_adapters(params, config, layout=found, key=jax.random.key(0))
        np.testing.assert_array_equal(added["v"]["lora_scale"], scales)


@pytest.mark.parametrize(
    ("scaling", "fields", "scales"),
    [
        ("standard", {}, [2, 2, 2]),
        ("rank_stabilized", {}, [4, 4, 4]),
        ("standard", {"layers": (1,)}, [0, 2, 0]),
        ("standard", {"rank_pattern": ("layers/1/.*=2", "up_proj=8")}, [1, 4, 1]),
        ("rank_stabilized", {"rank_pattern": ("layers/1/.*=16",)}, [4, 2, 4]),
        ("standard", {"alpha_pattern": ("layers.2.mlp.up_proj=4", ".*=16")}, [4, 4, 1]),
        (
            "rank_stabilized",
            {"rank_pattern": ("layers/0/.*=1",), "alpha_pattern": ("layers/0/.*=3",)},
            [3, 4, 4],
        ),
        (
            "standard",
            {"targets": ("layers/[02]/mlp/up_proj",), "exclude": ("layers/0/.*",)},
            [0, 0, 2],
        ),
    ],
)
def test_scales_ranks_and_padding(
    decoder: Any, scaling: str, fields: dict[str, Any], scales: list[float]
) -> None:
    model = decoder()
    config = AdapterConfig(
        **({"rank": 4, "alpha": 8.0, "scaling": scaling, "init": "pissa"} | fields)
    )
    layer = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))[
        "layers"
    ]["mlp"]["up_proj"]
    np.testing.assert_allclose(layer["lora_scale"], scales)
    ranks = [
        0
        if scale == 0
        else round(int(alpha) / scale if scaling == "standard" else (int(alpha) / scale) ** 2)
        for scale, alpha in zip(scales, alphas(fields), strict=True)
    ]
    assert layer["lora_a"].shape[-1] == max(ranks)
    assert [int((np.abs(a).sum(0) > 0).sum()) for a in layer["lora_a"]] == ranks
    assert [int((np.abs(b).sum(1) > 0).sum()) for b in layer["lora_b"]] == ranks


def alphas(fields: dict[str, Any]) -> list[float]:
    rules = [
        (p, float(v))
        for p, _, v in (entry.rpartition("=") for entry in fields.get("alpha_pattern", ()))
    ]
    return [first_value(rules, f"layers/{i}/mlp/up_proj", 8.0) for i in range(3)]
