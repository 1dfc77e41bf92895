"""Phi 3, 3.5 and 4: q, k and v share one projection, gate and up another (2404.14219)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

FAMILY = Family(
    keys=frozenset({"sliding_window"}),
    partial_rotary=True,
    describe=lambda c: {"fused": True},
)
