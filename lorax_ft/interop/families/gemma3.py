"""Gemma 3's text models: Gemma 2 with norms on queries and keys, and a rotary embedding of each kind (2503.19786)."""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families import gemma2
from lorax_ft.interop.families.family import Family


def describe(c: Any) -> dict[str, Any]:
    """Fields of `DecoderConfig`."""
    return gemma2.describe(c) | {"qk_norm": "head"}


FAMILY = Family(describe=describe)
