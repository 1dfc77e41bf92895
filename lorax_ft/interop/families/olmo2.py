"""OLMo 2: norms behind attention and MLP, and on all queries and keys together (2501.00656)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

FAMILY = Family(describe=lambda c: {"norms": "after", "qk_norm": "whole"})
