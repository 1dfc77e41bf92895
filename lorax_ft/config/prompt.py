"""The soft prompt: virtual tokens in front of each sample, whose vectors train."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lorax_ft.checks import check, check_positive, check_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """A soft prompt in front of each sample, alone (adapter.targets empty) or beside an adapter."""

    kind: Literal["none", "prompt", "prefix"] = "none"
    """What trains.
    prompt: embeddings of virtual tokens, prompt tuning; with an encoder it is P-tuning;
    prefix: keys and values of virtual tokens in every layer, prefix tuning (with encoder mlp) or
    P-tuning v2 (without)."""
    virtual_tokens: int = 20
    """Number of virtual tokens; each sample has so many tokens less of data.max_length."""
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    """Initialization, without an encoder.
    vocabulary, text: the embeddings, or the keys and values, of random tokens or of prompt.text;
    random: small random numbers."""
    text: str | None = None
    """Text to start from, repeated or cut to the number of virtual tokens (prompt.init text)."""
    encoder: Literal["none", "mlp", "lstm"] = "none"
    """Network whose output is the prompt while it trains; what is saved is the output.
    A prompt has an mlp or an lstm, a prefix an mlp."""
    encoder_width: int | None = None
    """Hidden width of the encoder; None: the model's width."""

    @property
    def count(self) -> int:
        """How many virtual tokens stand before each sample: 0 without a soft prompt."""
        return 0 if self.kind == "none" else self.virtual_tokens

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "virtual_tokens")
        if self.encoder_width is not None:
            check_positive(self, "encoder_width")
        if self.kind == "none":
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                check(
                    value == field.default,
                    f"prompt.{field.name} is {value}, but there is no soft prompt; "
                    "give prompt.kind prompt or prefix",
                )
        check(
            self.kind != "prefix" or self.encoder != "lstm",
            "prompt.encoder lstm is for prompts; a prefix has the encoder mlp or none",
        )
        check(
            self.encoder == "none" or self.init == "vocabulary",
            f"prompt.init is {self.init}, but the prompt starts as the output of prompt.encoder "
            f"{self.encoder}, which starts at random; remove one of them",
        )
        check(
            self.encoder != "none" or self.encoder_width is None,
            f"prompt.encoder_width is {self.encoder_width}, but there is no prompt.encoder",
        )
        check(
            (self.init == "text") == (self.text is not None),
            "prompt.init text and prompt.text belong together; give both or neither",
        )
