"""How a token is chosen. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math

from lorax_ft.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn, and 1 draws as the model is."""
    top_k: int | None = None
    """SamplingParams among the k likeliest tokens only."""
    top_p: float | None = None
    """SamplingParams among the fewest likeliest tokens whose probabilities sum up to p (1904.09751)."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens less likely that stand in the text already (1909.05858)."""

    def __post_init__(self) -> None:
        check(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature is {self.temperature}; it must be 0 or more and finite",
        )
        check(self.top_k is None or self.top_k > 0, f"top_k is {self.top_k}; it must be above 0")
        check(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p is {self.top_p}; it must be above 0 and at most 1",
        )
        check(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and finite",
        )
        for name in ("top_k", "top_p"):
            check(
                self.temperature > 0 or getattr(self, name) is None,
                f"{name} is given, but at temperature 0 nothing is drawn; give a temperature such as 0.7",
            )
