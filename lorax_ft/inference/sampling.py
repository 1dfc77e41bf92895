"""Options of sampling. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math

from lorax_ft.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 is greedy decoding. Above 0, tokens are sampled; 1 keeps the model's own distribution."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float | None = None
    """Sample only from the most likely tokens whose probabilities add up to p (1904.09751)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that already occur in the text become less likely (1909.05858)."""

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
        # Greedy decoding would ignore these options; whoever sets one expects sampling.
        for name in ("top_k", "top_p"):
            check(
                self.temperature > 0 or getattr(self, name) is None,
                f"{name} is given, but at temperature 0 decoding is greedy; set a temperature "
                "such as 0.7",
            )
