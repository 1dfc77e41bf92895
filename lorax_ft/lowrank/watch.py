"""What watches the calls of an NNX model's layers, in place of linen's `nn.intercept_methods`.

`adapt` and `layout` say here what they want of the layers, and the function that `from_nnx` makes
does it. This module needs no flax.nnx, whose import takes half a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from lorax_ft.lowrank.layer_call import Gather, Traced
from lorax_ft.tree import Shape


@dataclasses.dataclass(frozen=True)
class SeeAdapters:
    """The layers compute with the adapters in the parameters."""

    gather: Gather


@dataclasses.dataclass(frozen=True)
class SeeCalls:
    """The calls of the layers are recorded."""

    called: Callable[[str, Traced | None], None]
    """Gets a layer's path, and what its call says of its kernel's axes."""
    unseen: Callable[[str, str], None]
    """Gets the path of a module whose weights no adapter can be added to, and the reason."""
    called_block: Callable[[str, dict[str, Shape], Traced | str], None]
    """Gets the path of a module that is no layer, the shapes of the leaves in it as its call sees
    them, and what the call says (`lorax_ft.lowrank.layer_call.trace_block`)."""


Watch = SeeAdapters | SeeCalls
_FROM_NNX = "write apply, params = lft.from_nnx(model), and give these"
_watches: ContextVar[tuple[Watch, ...]] = ContextVar("lorax_ft_watches", default=())


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Inside, the layers of NNX models are watched in this way too."""
    token = _watches.set((*_watches.get(), watch))
    try:
        yield
    finally:
        _watches.reset(token)


def watches() -> tuple[Watch, ...]:
    """How the layers of NNX models are watched, from the outermost."""
    return _watches.get()


def check_function(apply: Any, *, name: str) -> None:
    """Raise for an NNX model in place of a function of its parameters.

    Args:
      apply: what was given.
      name: the function that it was given to.
    """
    nnx = sys.modules.get("flax.nnx")
    # Also a method of the model.
    if nnx is not None and isinstance(getattr(apply, "__self__", apply), nnx.Module):
        raise ValueError(f"{name} was given an nnx.Module; {_FROM_NNX}")


def check_tree(params: Any, *, name: str) -> None:
    """Raise for an NNX model, or its state, in place of a nested dict of its parameters."""
    check_function(params, name=name)
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(params, nnx.State):
        raise ValueError(f"{name} was given an nnx.State; {_FROM_NNX}")
