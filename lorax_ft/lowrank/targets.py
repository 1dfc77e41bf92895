"""Which modules a list of patterns means, and which rank and alpha each gets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern means a module: by name or path suffix (`q_proj`, `mlp/up_proj`), or as a whole regular expression.

    Dots in place of slashes are understood, so that patterns written for PEFT work.

    >>> matches("q_proj", "layers/3/self_attn/q_proj"), matches("layers/[0-3]/.*", "layers/12/mlp/up_proj")
    (True, False)
    """
    parts = path.split("/")
    suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
    return any(pattern in (suffix, suffix.replace("/", ".")) for suffix in suffixes) or any(
        re.fullmatch(pattern, name) is not None for name in (path, path.replace("/", "."))
    )


def is_target(path: str, *, targets: Sequence[str], head: bool, embed: bool) -> bool:
    """Whether `targets` mean the module at `path`; "all-linear" means all but output heads and embeddings."""
    return any(not (head or embed) if t == "all-linear" else matches(t, path) for t in targets)


def layer_index(path: str) -> int | None:
    """The index in a logical path: 3 for `layers/3/mlp` and for `Block_3/mlp`, None where there is none."""
    found = re.search(r"(?:^|/)(?:[^/]*_)?(\d+)/", f"{path}/" if re.search(r"(^|/)\d+$", path) else path)
    return int(found[1]) if found else None


def first_value(rules: Iterable[tuple[str, T]], path: str, default: T) -> T:
    """The value of the first (pattern, value) rule that means the module at `path`."""
    return next((value for pattern, value in rules if matches(pattern, path)), default)


def check_coverage(patterns: Iterable[str], hit: Callable[[str], bool], *, names: Iterable[str], where: str) -> None:
    """Raise where a pattern means none of the modules.

    Args:
      patterns: what the user wrote.
      hit: whether a pattern means something.
      names: the modules that exist, by logical path.
      where: the option's name, for the error.

    Raises:
      ValueError: with the modules that exist and the nearest name.
    """
    kinds = sorted({re.sub(r"/\d+(?=/|$)", "/*", name) for name in names})
    for pattern in patterns:
        if not hit(pattern):
            last = {kind.rpartition("/")[2] for kind in kinds}
            near = difflib.get_close_matches(pattern, sorted(last | set(kinds)), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}? There are" if near else "; there are"
            raise ValueError(f"{where}: {pattern!r} matches no module{hint} {', '.join(kinds) or 'none'}")
