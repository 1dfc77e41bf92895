"""Parameter trees: nested dicts, whose leaves have slash paths such as `layers/mlp/gate/kernel`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flax import traverse_util

from lorax_ft import regexes

Shape = tuple[int, ...]
Tree = dict[str, Any]
Layer = dict[str, Any]
"""The leaves of one module, by name."""
T = TypeVar("T")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a nested dict by slash path, in the dict's order. Empty dicts vanish.

    >>> flatten({"a": {"kernel": 1, "bias": 2}})
    {'a/kernel': 1, 'a/bias': 2}
    """
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The nested dict of leaves by slash path: the inverse of `flatten`.

    >>> unflatten({"a/kernel": 1, "a/bias": 2})
    {'a': {'kernel': 1, 'bias': 2}}
    """
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def modules(tree: Mapping[str, Any]) -> dict[str, Tree]:
    """The dicts that hold leaves directly, by slash path, with those leaves.

    >>> modules({"a": {"kernel": 1, "inner": {"bias": 2}}})
    {'a': {'kernel': 1}, 'a/inner': {'bias': 2}}
    """
    found: dict[str, Tree] = {}
    for path, leaf in flatten(tree).items():
        parent, _, name = path.rpartition("/")
        found.setdefault(parent, {})[name] = leaf
    return found


def from_modules(layers: Mapping[str, Tree]) -> Tree:
    """The nested dict of modules by slash path: the inverse of `modules`."""
    flat = {}
    for path, layer in layers.items():
        for name, leaf in layer.items():
            flat[join(path, name)] = leaf
    return unflatten(flat)


def join(path: str, name: str) -> str:
    """The slash path of a leaf of the module at `path`; the root's path is empty."""
    return f"{path}/{name}" if path else name


def split(tree: Mapping[str, Any], keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Two trees: the leaves whose slash path `keep` accepts, and the others."""
    accepted: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        if keep(path):
            accepted[path] = leaf
        else:
            others[path] = leaf
    return unflatten(accepted), unflatten(others)


def combine(*trees: Mapping[str, Any]) -> Tree:
    """One tree of the leaves of several, in any order.

    Raises:
      ValueError: two trees hold the same leaf, or one holds a leaf where another holds a dict.

    >>> combine({"a": {"kernel": 1}}, {"a": {"bias": 2}})
    {'a': {'kernel': 1, 'bias': 2}}
    """
    # Not by updating one dict with another, in which the last leaf would win without a word.
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(
                    f"two of the trees hold the leaf {path!r}; combine needs trees that do not "
                    "overlap"
                )
            flat[path] = leaf
    _check_no_leaf_above(flat)
    return unflatten(flat)


def _check_no_leaf_above(flat: Mapping[str, Any]) -> None:
    """Raise where a leaf's path continues that of another leaf."""
    for path in flat:
        parent, _, _ = path.rpartition("/")
        # From the nearest module up to the root, whose path is empty.
        while parent:
            if parent in flat:
                raise ValueError(f"{parent!r} is a leaf in one tree and holds {path!r} in another")
            parent, _, _ = parent.rpartition("/")


def member(place: int, period: int) -> str:
    """The name of a layer in a scan whose step computes several: its place among them.

    >>> member(2, 4)
    '2_of_4'
    """
    return f"{place}_of_{period}"


def with_layer_numbers(path: str) -> str:
    """A path with the number of its layer, where a scan's step computes several.

    >>> with_layer_numbers("layers/3/2_of_4/mlp/up_proj")
    'layers/14/mlp/up_proj'
    >>> with_layer_numbers("layers/3/mlp/up_proj")
    'layers/3/mlp/up_proj'
    """

    def number(found: re.Match[str]) -> str:
        step, place, period = map(int, found.groups())
        # Each step of the scan before this one computed a whole period of layers.
        layer = step * period + place
        return str(layer)

    # Whole path components only.
    return re.sub(r"(?<![^/])(\d+)/(\d+)_of_(\d+)(?![^/])", number, path)


def first_match(rules: Iterable[tuple[str, T]], path: str) -> T | None:
    """The value of the first (regular expression, value) rule that matches the whole path."""
    for pattern, value in rules:
        if regexes.fullmatch(pattern, path):
            return value
    return None
