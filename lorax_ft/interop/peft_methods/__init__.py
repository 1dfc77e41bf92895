"""PEFT's adapter types: what each writes into adapter_config.json and calls its tensors.

A type is one row of `METHODS`. Its functions convert between the leaves of one adapted matrix,
without stack axes and padding (`Matrix`), and PEFT's tensors. Each type has a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_ft.interop.peft_methods.bottleneck import BOTTLENECK
from lorax_ft.interop.peft_methods.hira import HIRA
from lorax_ft.interop.peft_methods.ia3 import IA3
from lorax_ft.interop.peft_methods.loha import LOHA
from lorax_ft.interop.peft_methods.lokr import LOKR
from lorax_ft.interop.peft_methods.lora import LORA
from lorax_ft.interop.peft_methods.method import Matrix, PeftMethod
from lorax_ft.interop.peft_methods.miss import MISS
from lorax_ft.interop.peft_methods.oft import OFT
from lorax_ft.interop.peft_methods.shira import SHIRA
from lorax_ft.interop.peft_methods.vera import VERA

METHODS: Mapping[str, PeftMethod] = {
    "lora": LORA,
    "ia3": IA3,
    "miss": MISS,
    "vera": VERA,
    "loha": LOHA,
    "lokr": LOKR,
    "shira": SHIRA,
    "hira": HIRA,
    "oft": OFT,
    "bottleneck": BOTTLENECK,
}
"""By `AdapterConfig.method`."""


def method_name(config: Mapping[str, Any], folder: Path) -> str:
    """The `AdapterConfig.method` of the type that an adapter_config.json names.

    Raises:
      ValueError: the type is not supported.
    """
    peft_type = config.get("peft_type")
    for name, method in METHODS.items():
        if method.peft_type == peft_type:
            return name
    known = ", ".join(repr(method.peft_type) for method in METHODS.values())
    raise ValueError(f"{folder} holds an adapter of type {peft_type!r}; supported: {known}")


def method_of_config(config: Mapping[str, Any], folder: Path) -> PeftMethod:
    """The row of the type that an adapter_config.json names, or an error as `method_name`'s."""
    return METHODS[method_name(config, folder)]


def method_of_matrix(matrix: Matrix) -> PeftMethod:
    """The row of the type whose leaves an adapted matrix has."""
    for method in METHODS.values():
        if method.marker in matrix:
            return method
    raise ValueError(f"PEFT has no adapter with the leaves {', '.join(matrix)}")
