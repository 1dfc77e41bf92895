"""How A and B start: a file for each initialization, and its row in `lorax_ft.schema.INITS`.

An init is a function of an `InitContext` that returns an `InitResult`. It sees a few matrices of a
stack at a time (`lorax_ft.lowrank.starts`), so what it makes of a matrix depends on that alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lorax_ft.lowrank.inits import random
from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.schema import init_schema

Init = Callable[[InitContext], InitResult]


def find_function(reference: str) -> Callable[..., Any]:
    """The function that a row of `INITS` refers to as "module:name"."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(f"lorax_ft.lowrank.inits.{module}"), name)


def find_init(name: str) -> Init:
    """The init of that name.

    Raises:
      ValueError: there is none.
    """
    return find_function(init_schema(name).function)


def initialize_embedding(context: InitContext) -> InitResult:
    """An embedding's adapter starts with A = 0 and a random B, whatever the init: as in PEFT."""
    _, _, columns = context.shape
    b = context.draw(random.normal_b, columns)
    return InitResult((context.zeros_a(), b))


def init_options(name: str, config: Any) -> Mapping[str, Any]:
    """The values of those options that the init uses."""
    return {option: getattr(config, option) for option in init_schema(name).options}
