"""Patterns of module names, as PEFT's users write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from lorax_ft import regexes
from lorax_ft.lowrank.spec import LayerSpec

T = TypeVar("T")


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a module: by name, by suffix, or as a whole regular expression.

    Dots are understood in place of slashes, so that patterns written for PEFT work. A name may
    leave the numbers of layers out, as the tree of a scanned model does, or have `*` in their
    place, as errors list them.

    >>> matches("q_proj", "layers/3/self_attn/q_proj")
    True
    >>> matches("mlp/up_proj", "layers/12/mlp/up_proj")
    True
    >>> matches("layers/[0-3]/.*", "layers/12/mlp/up_proj")
    False
    >>> matches("layers/mlp/up_proj", "layers/12/mlp/up_proj"), matches("v", "v/2")
    (True, True)
    """
    for name in (path, path.replace("/", ".")):
        if regexes.fullmatch(pattern, name):
            return True
    parts = path.split("/")
    without_numbers = [part for part in parts if not part.isdecimal()]
    with_stars = ["*" if part.isdecimal() else part for part in parts]
    for spelled in (parts, without_numbers, with_stars):
        for start in range(len(spelled)):
            suffix = "/".join(spelled[start:])
            if pattern in (suffix, suffix.replace("/", ".")):
                return True
    return False


def layer_index(path: str) -> int | None:
    """The index of the layer in a logical path, or None.

    >>> layer_index("layers/3/mlp"), layer_index("Block_3/mlp"), layer_index("lm_head")
    (3, 3, None)
    """
    if re.search(r"(^|/)\d+$", path):  # the layer itself, as a module
        path += "/"
    found = re.search(r"(?:^|/)(?:[^/]*_)?(\d+)/", path)
    if found is None:
        return None
    return int(found[1])


def is_target(path: str, spec: LayerSpec, targets: Sequence[str]) -> bool:
    """Whether `targets` match the module at `path`.

    "all-linear" matches all but output heads, routers and embeddings.
    """
    for target in targets:
        if target == "all-linear":
            hit = not spec.by_name and spec.module != "embed"
        else:
            hit = matches(target, path)
        if hit:
            return True
    return False


def first_value(rules: Iterable[tuple[str, T]], path: str, default: T) -> T:
    """The value of the first (pattern, value) rule that matches the module at `path`."""
    for pattern, value in rules:
        if matches(pattern, path):
            return value
    return default


def check_coverage(
    patterns: Iterable[str],
    hit: Callable[[str], bool],
    *,
    names: Iterable[str],
    where: str,
    unseen: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise where a pattern matches none of the modules.

    Args:
      patterns: what the user wrote.
      hit: whether a pattern matches something.
      names: the modules that exist, by logical path.
      where: the option's name, for the error.
      unseen: why the model's other matrices cannot be adapted, by slash path.

    Raises:
      ValueError: with the modules that exist and the nearest name.
    """
    # The layers of a stack are listed once, as `layers/*`.
    existing = sorted({re.sub(r"/\d+(?=/|$)", "/*", name) for name in names})
    last_parts = {path.rpartition("/")[2] for path in existing}
    for pattern in patterns:
        if hit(pattern):
            continue
        separate = pattern.replace(" ", "").split(",")
        if len(separate) > 1 and all(map(hit, separate)):
            raise ValueError(
                f"{where}: {pattern!r} matches no module; give several names without commas, "
                f"as in {' '.join(separate)}"
            )
        for path, why in unseen.items():
            module, _, _ = path.rpartition("/")
            if matches(pattern, path) or matches(pattern, module):
                raise ValueError(
                    f"{where}: {pattern!r} matches {path}, which cannot be adapted: {why}"
                )
        known = sorted(last_parts | set(existing))
        near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}? There are" if near else "; there are"
        listed = ", ".join(existing) or "none"
        if not existing:
            # Why there are none: the first reasons are enough.
            first = list(unseen.items())[:3]
            listed += "".join(f"; {path} cannot be adapted: {why}" for path, why in first)
        raise ValueError(f"{where}: {pattern!r} matches no module{hint} {listed}")
