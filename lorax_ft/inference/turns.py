"""The parts of an assistant's turn: its reasoning, its tool calls and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lorax_ft.data.conversation import Message

REASONING = (
    ("<think>", "</think>", ""),
    ("[THINK]", "[/THINK]", ""),
    ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"),
    ("<|START_RESPONSE|>", "", ""),
    (
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
    ),
    ("<|channel|>final<|message|>", "", ""),
    ("<|channel>thought\n", "<channel|>", ""),
)
"""What models write before and after their reasoning, and then before the answer.

Two rows are the headers of answers without reasoning.
"""
# Qwen, Hermes and SmolLM 3 write each call so.
_TAGGED_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
# Variables with which chat templates switch the reasoning on and off.
_SWITCHES = ("enable_thinking", "thinking")


def opened_reasoning(prompt: str) -> int | None:
    """Returns the index in `REASONING` of the marker that a rendered prompt ends with, or None.

    Some templates open the reasoning in the generation prompt, so the answer starts inside of it.
    """
    for index, (opener, closer, _) in enumerate(REASONING):
        if closer and prompt.rstrip().endswith(opener.rstrip()):
            return index
    return None


def split_reasoning(
    text: str,
    *,
    opened: int | None = None,
    complete: bool = True,
) -> tuple[str, str]:
    """Splits an answer after its reasoning; both parts keep what marks them.

    Args:
      text: what the model wrote.
      opened: what `opened_reasoning` returned for the prompt.
      complete: whether no more text follows. Otherwise the start of a marker is held back.

    >>> split_reasoning("<think>so</think>42")
    ('<think>so</think>', '42')
    >>> split_reasoning("42")
    ('', '42')
    """
    if opened is not None:
        return _through(text, opened, 0)
    start = len(text) - len(text.lstrip())
    for index, (opener, _, _) in enumerate(REASONING):
        if text.startswith(opener, start):
            return _through(text, index, start + len(opener))
        if not complete and opener.startswith(text[start:]):
            return "", ""
    return "", text


def assistant_message(text: str, *, opened: int | None = None) -> Message:
    """Converts an answer to a message, with reasoning and tool calls as templates read them."""
    reasoning, content = split_reasoning(text, opened=opened)
    message: Message = {"role": "assistant", "content": content.strip()}
    thoughts = reasoning
    for markers in REASONING:
        for marker in markers:
            thoughts = thoughts.replace(marker, "")
    if thoughts.strip():
        message["reasoning_content"] = thoughts.strip()
    calls = _tool_calls(content)
    if calls:
        message["tool_calls"] = calls
        message["content"] = _TAGGED_CALL.sub("", content).strip()
    return message


def describe_call(call: Mapping[str, Any]) -> str:
    """Writes a tool call as a call of a function with its arguments in JSON."""
    function = call["function"]
    arguments = []
    for name, value in function["arguments"].items():
        written = json.dumps(value, ensure_ascii=False)
        arguments.append(f"{name}={written}")
    listed = ", ".join(arguments)
    return f"{function['name']}({listed})"


def thinking_variable(template: str | Mapping[str, str] | None) -> str | None:
    """Returns the variable with which a chat template switches the reasoning, or None."""
    import jinja2.meta

    if isinstance(template, Mapping):
        template = "\n".join(template.values())
    # Tags that transformers adds to Jinja; they change no variable.
    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template or "")
    # `break` and `continue`, which transformers allows in templates.
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(text)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return None
    variables = jinja2.meta.find_undeclared_variables(parsed)
    for name in _SWITCHES:
        if name in variables:
            return name
    return None


def markers_are_special(tokenizer: Any) -> bool:
    """Whether decoding without special tokens would lose the borders of the reasoning."""
    special = tuple(tokenizer.all_special_tokens)
    return any(opener.startswith(special) for opener, _, _ in REASONING)


def _through(text: str, index: int, start: int) -> tuple[str, str]:
    """Splits a text behind the reasoning of a row of `REASONING` and the answer's header.

    All of it comes first if the reasoning has no end yet.
    """
    _, closer, header = REASONING[index]
    end = text.find(closer, start)
    if end < 0:
        return text, ""
    end += len(closer)
    rest = text[end:].lstrip()
    if header and rest.startswith(header):
        answer = rest.removeprefix(header)
        end = len(text) - len(answer)
    elif header and header.startswith(rest):
        # While streaming, only a part of the header may be there.
        end = len(text)
    return text[:end], text[end:]


def _tool_calls(content: str) -> list[dict[str, Any]]:
    """Returns the calls that are written as JSON in <tool_call> tags."""
    calls = []
    for written in _TAGGED_CALL.findall(content):
        try:
            call = json.loads(written)
        except (ValueError, RecursionError):  # the model made a mistake; the text stays
            return []
        name = call.get("name")
        arguments = call.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        function = {"name": name, "arguments": arguments}
        calls.append({"type": "function", "function": function})
    return calls
