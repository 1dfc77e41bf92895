"""Converts dataset rows of the supported formats to conversations and plain texts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorax_ft.data.conversation import Conversation, Example, Message, PlainText
from lorax_ft.data.fields import Fields, check_text, parse_json, parse_renames, type_name
from lorax_ft.data.rows import Row
from lorax_ft.data.shapes import LETTERS, SYNONYMS, Shape
from lorax_ft.data.tools import document_list, tool_schemas
from lorax_ft.data.turns import is_blank, to_message

_EVERYWHERE = {"system": ("system_prompt",), "tools": ("functions",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a conversation gets that its row does not have."""

    system: str | None = None
    """System message."""
    tools: list[dict[str, Any]] | None = None
    """Tools that the assistant may call."""
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template."""


NO_DEFAULTS = Defaults()


def to_example(
    row: Row,
    *,
    shape: Shape,
    fields: Sequence[str] = (),
    defaults: Defaults = NO_DEFAULTS,
    unused: Counter[str] | None = None,
) -> Example:
    """Converts a row to what the model is trained on.

    Args:
      row: the row.
      shape: messages (a list of turns with role and content), sharegpt (`conversations`, a list
        of turns with from and value), alpaca (instruction, input, output, and history as pairs of
        user and assistant texts), multiple_choice (question, A to D, and a letter as answer),
        question_answer, prompt_completion (texts without a chat template, or messages; the loss is
        on the completion) or text (without a template).
        All but text may have system, tools, documents and chat_template_kwargs.
      fields: renames, each as "expected=actual"; renames of a turn's fields apply to every turn.
      defaults: what conversations get that have none of their own.
      unused: the columns of the row that are not used are counted here.

    Raises:
      ValueError: a field is missing or of the wrong type, a role is unknown, or the conversation
        has no assistant turn or an empty one. The message names the row and the turn.

    >>> row = Row(fields={"question": "1 + 1?", "answer": "2"}, where="")
    >>> to_example(row, shape="question_answer").messages
    [{'role': 'user', 'content': '1 + 1?'}, {'role': 'assistant', 'content': '2'}]
    """
    renames = parse_renames(tuple(fields))
    synonyms = {**_EVERYWHERE, **SYNONYMS[shape]}
    view = Fields(row.fields, row.where, renames=renames.row, synonyms=synonyms)
    example: Example
    if shape == "text":
        example = PlainText(completion=view.text("text"))
    elif shape == "prompt_completion" and _is_text(view):
        example = _prompt_completion(view)
    else:
        messages = _messages(view, shape, renames.turn)
        _check_answers(messages, row.where)
        example = _conversation(messages, view, defaults)
    if unused is not None:
        unused.update(_unused(example, view, defaults))
    return example


def has_answer(messages: Sequence[Message]) -> bool:
    """Whether an assistant turn has a text."""
    for message in messages:
        if message["role"] == "assistant" and message["content"].strip():
            return True
    return False


def split_answer(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """Returns the messages before the assistant's last text, and that text.

    A turn that only calls tools has no text to compare.

    Raises:
      ValueError: no assistant turn has a text.
    """
    answers = [i for i, message in enumerate(messages) if has_answer([message])]
    if not answers:
        raise ValueError("the conversation has no assistant turn with a text")
    last = answers[-1]
    before = list(messages[:last])
    return before, messages[last]["content"]


def _messages(view: Fields, shape: Shape, renames: Mapping[str, str]) -> list[Message]:
    """The messages of a row of any format but plain text."""
    match shape:
        case "messages":
            return _turns(view, "messages", renames)
        case "sharegpt":
            return _turns(view, "conversations", renames)
        case "alpaca":
            return _alpaca(view)
        case "prompt_completion":
            return _prompt_messages(view, renames)
        case "multiple_choice":
            return _multiple_choice(view)
    question = view.text("question")
    answer = view.text("answer")
    return [_said("user", question), _said("assistant", answer)]


def _conversation(messages: list[Message], view: Fields, defaults: Defaults) -> Conversation:
    """The conversation with what the row has beside the messages."""
    where = view.where
    # What the row has wins over the defaults.
    system = view.optional_text("system") or defaults.system
    tools = tool_schemas(view.get("tools"), "tools", where) or defaults.tools
    documents = document_list(view.get("documents"), "documents", where)
    template_args = dict(defaults.template_args)
    own_args = parse_json(view.get("chat_template_kwargs"), "chat_template_kwargs", where)
    if own_args is not None:
        if not isinstance(own_args, dict):
            raise ValueError(
                f"{where}: chat_template_kwargs is {type_name(own_args)}, not an object"
            )
        template_args.update(own_args)
    return Conversation(
        messages=_with_system(messages, system),
        tools=tools,
        documents=documents,
        template_args=template_args,
    )


def _turns(view: Fields, name: str, renames: Mapping[str, str]) -> list[Message]:
    """The messages of a list of turns."""
    messages = []
    for number, turn in enumerate(view.items(name), 1):
        place = f"{view.where}, turn {number}"
        messages.append(to_message(turn, renames=renames, where=place))
    return messages


def _alpaca(view: Fields) -> list[Message]:
    messages = []
    # Rows without a history often have null or an empty string there.
    history = view.items("history") if view.get("history") else []
    for number, pair in enumerate(history, 1):
        place = f"{view.where}, pair {number} of the history"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"{place}: must be a list of two texts, the user's and the assistant's"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_said(role, check_text(text, role, place)))
    prompt = view.text("instruction")
    context = view.optional_text("input")
    # An empty instruction or input must not leave a stray line break in the prompt.
    question = "\n".join(filter(None, [prompt, context]))
    messages.append(_said("user", question))
    messages.append(_said("assistant", view.text("output")))
    return messages


def _multiple_choice(view: Fields) -> list[Message]:
    """The question with its choices a line each, and the letter of the answer."""
    lines = [view.text("question")]
    for letter in LETTERS:
        choice = view.text(letter)
        lines.append(f"{letter}. {choice}")
    answer = view.text("answer").strip()
    if answer not in LETTERS:
        raise ValueError(f"{view.where}: the answer is {answer!r}; it must be A, B, C or D")
    return [_said("user", "\n".join(lines)), _said("assistant", answer)]


def _is_text(view: Fields) -> bool:
    """Whether both prompt and completion are text, and not the JSON text of messages."""
    values = [view.require(name) for name in ("prompt", "completion")]
    return all(_as_messages(value) is None for value in values)


def _prompt_completion(view: Fields) -> PlainText:
    completion = view.text("completion")
    if not completion.strip():
        raise ValueError(f"{view.where}: the completion is empty; remove or complete the row")
    return PlainText(prompt=view.text("prompt"), completion=completion)


def _prompt_messages(view: Fields, renames: Mapping[str, str]) -> list[Message]:
    """The messages of a prompt and a completion, of which one may be text."""
    messages = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = view.require(name)
        turns = _as_messages(value)
        if turns is None:
            text = check_text(value, name, view.where)
            turns = [_said(role, text)]
        for number, turn in enumerate(turns, 1):
            place = f"{view.where}, turn {number} of the {name}"
            message = to_message(turn, renames=renames, where=place)
            if name == "prompt":
                # The loss is on the completion, whatever turns of the assistant come before.
                message["train"] = False
            messages.append(message)
    return messages


def _as_messages(value: Any) -> list[Any] | None:
    """The turns of a list, of a single turn, or of the JSON text of either; None for a text."""
    if isinstance(value, str) and value.lstrip().startswith(("[{", '{"role"')):
        try:
            value = parse_json(value, "", "")
        except ValueError:
            return None
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    return None


def _check_answers(messages: Sequence[Message], where: str) -> None:
    has_answer = False
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        has_answer = True
        # An empty answer would teach the model to end its turn at once.
        if is_blank(message) and message.get("train", True):
            raise ValueError(
                f"{where}: the assistant's text (turn {number}) is empty; remove or complete it"
            )
    if not has_answer:
        raise ValueError(
            f"{where}: the conversation has no assistant turn, so there is nothing to train on; "
            "remove or complete it"
        )


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Adds a system message at the front, unless the conversation has one or `system` is empty."""
    has_system = bool(messages) and messages[0]["role"] in ("system", "developer")
    if has_system or not system:
        return messages
    return [_said("system", system), *messages]


def _unused(example: Example, view: Fields, defaults: Defaults) -> Iterator[str]:
    """Names what the example does not contain of the row and of the options."""
    for name, value in view.values.items():
        # Columns of another format's rows are often present and empty.
        is_empty = value is None or value == ""
        if name not in view.used and not is_empty:
            yield f"column {name}"
    if isinstance(example, PlainText):
        for option in dataclasses.fields(defaults):
            if getattr(defaults, option.name):
                yield f"--data.{option.name}"
