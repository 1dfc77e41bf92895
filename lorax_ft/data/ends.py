"""What training needs to know about the token that ends an answer: without it, none stops."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lorax_ft.interop.end_tokens import end_of_turn


def missing_end(
    tokenizer: Any, template_args: Mapping[str, Any] = MappingProxyType({})
) -> str | None:
    """Returns a warning if the chat template ends answers with no token; None if all is well.

    Args:
      tokenizer: a transformers tokenizer with a chat template.
      template_args: further variables of the template.
    """
    if end_of_turn(tokenizer, template_args) is not None:
        return None
    name = tokenizer.name_or_path or "this model"
    warning = (
        f"the chat template of {name} writes no end-of-turn token after an answer, so the model "
        "does not learn where answers stop"
    )
    if tokenizer.eos_token is None:
        return f"{warning}; the tokenizer has no eos_token either: use another chat template"
    return f"{warning}; --data.append_end appends {tokenizer.eos_token}"


def end_to_append(
    tokenizer: Any, template_args: Mapping[str, Any] = MappingProxyType({})
) -> str | None:
    """Returns the token that --data.append_end puts after each answer.

    That is the eos_token; None if the chat template writes an end-of-turn token by itself.

    Raises:
      ValueError: the template writes none, and the tokenizer has no eos_token.
    """
    if end_of_turn(tokenizer, template_args) is not None:
        return None
    if tokenizer.eos_token is None:
        raise ValueError(
            "data.append_end: the tokenizer has no eos_token to append; set eos_token in its "
            "tokenizer_config.json"
        )
    return str(tokenizer.eos_token)
