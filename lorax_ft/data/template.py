"""Renders a conversation with a tokenizer's chat template, which is a program of a stranger.

Templates differ in the forms of a message that they take (`Form`). Their errors get the place of
the conversation, and their time and the length of their text have a bound.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lorax_ft.data.conversation import Conversation, Message
from lorax_ft.data.marks import Span
from lorax_ft.template_limits import MEMORY, SECONDS, template_limits

Tokenizer = Any
"""A transformers tokenizer. The type is not named, so that importing this module stays cheap."""
# Characters of one rendered conversation. Some templates repeat text without an end.
LONGEST_TEXT = 64_000_000
# How transformers finds out that a template marks what the assistant generates.
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write the same messages: templates disagree about these three."""

    parts: bool = False
    """Content is a list of parts, [{"type": "text", "text": ...}], and not a string."""
    json_arguments: bool = False
    """Arguments of a tool call are JSON text, as OpenAI writes them, and not an object."""
    null_content: bool = False
    """Content of a turn that only calls tools is null, and not an empty string."""


# The order in which forms are tried: the first is the one that transformers documents.
FORMS = (
    Form(),
    Form(json_arguments=True),
    Form(null_content=True),
    Form(json_arguments=True, null_content=True),
    Form(parts=True),
    Form(parts=True, json_arguments=True),
)


# What a template writes that takes a list of parts for a string.
PARTS = "[{'type': 'text'"


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    text: str
    generated: list[Span]
    """What `{% generation %}` marks in the template enclose; empty without marks."""


def check_tokenizer(tokenizer: Tokenizer, *, chat: bool = True) -> None:
    """Raises if the tokenizer has no chat template, or returns no character offsets."""
    name = tokenizer.name_or_path or "this model"
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {name} has no chat template; use an instruction-tuned checkpoint, "
            "or give model.chat_template, such as chatml"
        )
    # Only the tokenizers of the Rust library return the offsets that locate assistant turns.
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {name} returns no character offsets; "
            "use a checkpoint with a tokenizer.json"
        )


def template_of(tokenizer: Tokenizer, conversation: Conversation) -> str:
    """The template of a conversation; tokenizers may have another one for tools."""
    return str(tokenizer.get_chat_template(tools=conversation.tools))


def marks_generation(template: str) -> bool:
    """Whether the template says itself what the assistant generates."""
    return _GENERATION_MARK.search(template) is not None


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    form: Form = FORMS[0],
    prompt: bool = False,
    where: str = "conversation",
) -> Rendered:
    """Renders a conversation, with the generation prompt at its end if `prompt`.

    Raises:
      ValueError: the template rejects the conversation, or takes too long, or writes too much.
    """
    # `apply_chat_template` does not return where the text of `{% generation %}` blocks lies; this
    # function, which it calls, does.
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_of(tokenizer, conversation)
    variables = {**tokenizer.special_tokens_map, **conversation.template_args}
    messages = [_in_form(message, form) for message in conversation.messages]
    marked = marks_generation(template)
    try:
        with template_limits(template):
            # transformers annotates its return type as str.
            texts, generated = cast(Any, render_jinja_template)(
                conversations=[messages],
                tools=conversation.tools,
                documents=conversation.documents,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **variables,
            )
    # A template is a program of its own, and may raise anything about this conversation.
    except Exception as error:
        raise _rejection(error, where) from error
    text = str(texts[0])
    if len(text) > LONGEST_TEXT:
        raise ValueError(
            f"{where}: the chat template wrote {len(text):,} characters for this conversation; "
            "it may loop: use another chat template"
        )
    return Rendered(text, list(generated[0]) if marked else [])


def _rejection(error: Exception, where: str) -> ValueError:
    """The error to raise where a template raised `error`, or did not finish."""
    if isinstance(error, TimeoutError):
        return ValueError(
            f"{where}: the chat template did not finish within {SECONDS:g} seconds; "
            "it may loop forever: use another chat template"
        )
    if isinstance(error, MemoryError):
        return ValueError(
            f"{where}: the chat template took more than {MEMORY / 1e9:g} GB of memory; "
            "it may repeat text without an end: use another chat template"
        )
    return ValueError(f"{where}: the chat template rejects this conversation: {_first_line(error)}")


def _in_form(message: Message, form: Form) -> Message:
    """The message as a template of this form takes it, without what is only ours."""
    written = {key: value for key, value in message.items() if key != "train"}
    if form.json_arguments and "tool_calls" in written:
        written["tool_calls"] = [_with_json_arguments(call) for call in written["tool_calls"]]
    content = written["content"]
    if form.parts:
        written["content"] = [{"type": "text", "text": content}]
    if form.null_content and not content.strip() and written.get("tool_calls"):
        written["content"] = None
    return written


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return dict(call)
    function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if "function" not in call:
        return function
    return {**call, "function": function}


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
