"""Which tokens end an answer: those of a checkpoint's configs, and the one of its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lorax_ft.template_limits import template_limits

# Texts that no template contains, and that templates neither split nor trim.
QUESTION, ANSWER = "question-6f1c", "answer-2b9e"


def ids_that_stop(tokenizer: Any, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text, sorted.

    These are the eos_token_id of the configs and of the tokenizer, and the token that ends an
    assistant turn in the chat template: not every checkpoint lists it as an eos token.

    Args:
      tokenizer: a transformers tokenizer, or None.
      configs: a checkpoint's config.json and generation_config.json.

    Raises:
      ValueError: an eos_token_id is no integer.
    """
    ids: set[int | None] = set()
    for config in configs:
        eos = config.get("eos_token_id")
        listed = eos if isinstance(eos, list | tuple) else [eos]
        if not all(isinstance(i, int | None) for i in listed):
            raise ValueError(f"eos_token_id is {eos!r}; it must be a token id or a list of them")
        ids.update(listed)
    if tokenizer is not None:
        ids.add(tokenizer.eos_token_id)
        end = end_of_turn(tokenizer)
        if end is not None:
            ids.add(tokenizer.convert_tokens_to_ids(end))
    return tuple(sorted(i for i in ids if i is not None))


def end_of_turn(
    tokenizer: Any,
    template_args: Mapping[str, Any] = MappingProxyType({}),
) -> str | None:
    """Returns the token that the chat template writes after the assistant's last answer.

    It renders a question with its answer and looks behind the answer. Templates that write
    several special tokens there (Phi 3: `<|end|>`, then `<|endoftext|>`) end the answer with the
    first. Some write another token after earlier answers (gpt-oss: `<|end|>` rather than
    `<|return|>`); that one may also end a part of an answer, so it does not count.

    Args:
      tokenizer: a transformers tokenizer.
      template_args: further variables of the template, such as `enable_thinking`.

    Returns:
      The token, or None: the tokenizer has no chat template, the template rejects a conversation
      of a question and an answer, or it writes no special token after the answer.
    """
    for as_parts in (False, True):
        before, found, after = _render(tokenizer, template_args, as_parts).rpartition(ANSWER)
        if found:
            break
    else:
        return None
    tokens = special_tokens(tokenizer)
    after = after.lstrip()
    end = _leading(after, tokens)
    if end is None:
        return None
    # A template may always open the next answer. If it ended this one with nothing, the token opens
    # an answer: a role follows, and the token is the last one before this answer, too.
    follows = after.removeprefix(end).strip()
    if follows and end == _last(before, tokens):
        return None
    return end


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Returns the tokens that may end a turn: the special ones, and all that were added.

    Some checkpoints declare their end-of-turn token in the vocabulary only.
    """
    tokens = set(tokenizer.all_special_tokens)
    tokens.update(str(token) for token in tokenizer.added_tokens_decoder.values())
    return frozenset(token for token in tokens if token.strip())


def _render(tokenizer: Any, template_args: Mapping[str, Any], as_parts: bool) -> str:
    """Renders a question with its answer; "" if the template rejects them.

    The templates of models for images and text take contents as lists of parts.
    """
    messages = []
    for role, text in (("user", QUESTION), ("assistant", ANSWER)):
        content: Any = text
        if as_parts:
            content = [{"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
    try:
        with template_limits(str(tokenizer.get_chat_template())):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=False, **template_args
            )
    # Templates are programs of their own, and may raise anything; there may also be none.
    except Exception:
        return ""
    return str(text)


def _leading(text: str, tokens: frozenset[str]) -> str | None:
    """Returns the longest token that the text starts with."""
    return max((token for token in tokens if text.startswith(token)), key=len, default=None)


def _last(text: str, tokens: frozenset[str]) -> str | None:
    """Returns the token that ends last in the text; of several, the longest."""
    ends = {}
    for token in tokens:
        start = text.rfind(token)
        if start >= 0:
            ends[token] = start + len(token)
    return max(ends, key=lambda token: (ends[token], len(token)), default=None)
