"""Gemma 3's text models (2503.19786).

Gemma 2 with norms on queries and keys instead of soft caps, and two rotary embeddings: one for
layers with a sliding window, one for the others.
"""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families import gemma2
from lorax_ft.interop.families.family import Family, Fields


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    # Gemma 3 has no soft caps; its config says so with null.
    return gemma2.describe(c) | {"qk_norm": "head"}


FAMILY = Family(keys=gemma2.KEYS, describe=describe)
