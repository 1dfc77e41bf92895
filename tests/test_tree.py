"""Trees by slash path: flatten and unflatten, split and combine, overlaps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_ft import tree

NAMES = st.text("abcdefgh_0123", min_size=1, max_size=4)
TREES = st.recursive(
    st.dictionaries(NAMES, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(NAMES, st.integers() | inner, min_size=1, max_size=3),
    max_leaves=12,
)


@given(TREES)
def test_unflatten_inverts_flatten(params: dict[str, Any]) -> None:
    assert tree.unflatten(tree.flatten(params)) == params


@given(TREES)
def test_from_modules_inverts_modules(params: dict[str, Any]) -> None:
    assert tree.from_modules(tree.modules(params)) == params


@given(TREES)
def test_modules_hold_every_leaf_once(params: dict[str, Any]) -> None:
    layers = tree.modules(params)
    assert sum(map(len, layers.values())) == len(tree.flatten(params))
    assert not any(isinstance(leaf, dict) for layer in layers.values() for leaf in layer.values())


@given(TREES, st.data())
def test_combine_inverts_split_in_any_order(params: dict[str, Any], data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.sampled_from(sorted(tree.flatten(params)))))
    left, right = tree.split(params, lambda path: path in kept)
    assert set(tree.flatten(left)) == kept
    assert tree.combine(left, right) == tree.combine(right, left) == params


@given(TREES, st.data())
def test_combine_refuses_an_overlap_anywhere(params: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(tree.flatten(params))))
    with pytest.raises(ValueError, match=f"leaf '{path}'"):
        tree.combine(params, tree.unflatten({path: 0}))


@pytest.mark.parametrize("first", [0, 1])
def test_combine_refuses_a_leaf_over_a_dict(first: int) -> None:
    parts = ({"a": {"b": 1}}, {"a": {"b": {"c": 2}}})
    with pytest.raises(
        ValueError, match="'a/b' is a leaf in one tree and holds 'a/b/c' in another"
    ):
        tree.combine(parts[first], parts[1 - first])


def test_empty_dicts_vanish() -> None:
    assert tree.flatten({"a": {}, "b": {"c": {}}}) == {}
    assert tree.combine({}, {"a": 1}, {}) == {"a": 1}


def test_modules_of_a_layer_without_a_name() -> None:
    layer = {"kernel": 1, "inner": {"bias": 2}}
    assert tree.modules(layer) == {"": {"kernel": 1}, "inner": {"bias": 2}}
    assert tree.from_modules(tree.modules(layer)) == layer


def test_the_first_match_wins_and_takes_the_whole_path() -> None:
    rules = [("a/.*", 1), ("a/b", 2), ("b", 3)]
    assert [tree.first_match(rules, path) for path in ("a/b", "b", "a/b/c", "ab", "c/b")] == [
        1,
        3,
        1,
        None,
        None,
    ]
