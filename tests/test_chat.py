"""lorax-ft chat: reasoning and tools in a conversation, with answers that are made up here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from data_cases import make_tokenizer, user

from lorax_ft.commands import chat
from lorax_ft.inference import texts
from lorax_ft.models.model import Model

TEMPLATE = (
    "{{ tools }}{{ enable_thinking }}"
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}<|im_end|>{% endfor %}"
)
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


class Talk:
    """A chat whose answers are given; keeps the prompts that the model saw."""

    def __init__(self, model: Model, patch: pytest.MonkeyPatch) -> None:
        self.prompts: list[str] = []
        self.answer = ""
        model = dataclasses.replace(model, tokenizer=make_tokenizer(TEMPLATE))
        self.args = chat.Args(model="m", system="S", template_args=("other=1",))
        self.chat = chat.Chat(model=model, adapted={}, params={}, opening=self.args.opening())
        patch.setattr(texts, "stream_texts", self._stream)

    def say(self, message: dict[str, Any], answer: str) -> str:
        self.answer = answer
        chat._answer(self.chat, message, self.args)
        return self.prompts[-1]

    def _stream(self, model: Model, params: Any, prompts: Any, **options: Any) -> Iterator[Any]:
        self.prompts.append(model.tokenizer.decode(prompts[0]))
        for end in range(1, len(self.answer) + 1):
            yield [self.answer[:end]]


@pytest.fixture
def talk(model: Model, monkeypatch: pytest.MonkeyPatch) -> Talk:
    return Talk(model, monkeypatch)


def test_reasoning_is_handed_back(talk: Talk, capsys: pytest.CaptureFixture) -> None:
    talk.say(user("hi"), "<think>so</think>\n42")
    assert capsys.readouterr().out == "<think>so</think>\n42\n"
    prompt = talk.say(user("and?"), "43")
    assert prompt == (
        "Nonesystem::S<|im_end|>user::hi<|im_end|>assistant:so:42<|im_end|>user::and?<|im_end|>"
    )


def test_reasoning_is_dimmed_in_a_terminal(
    talk: Talk, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    talk.say(user("hi"), "<think>so</think>42")
    out = capsys.readouterr().out
    reasoning, _, answer = out.partition("\033[0m")
    assert reasoning.replace("\033[2m", "") == "<think>so</think>"
    assert reasoning.startswith("\033[2m")
    assert "\033[2m" not in answer
    assert answer.replace("\033[0m", "") == "42\n"


def test_think(talk: Talk) -> None:
    assert chat._command(talk.chat, "/think off") == "think: off"
    assert talk.chat.opening.template_args == {"other": 1, "enable_thinking": False}
    assert talk.say(user("hi"), "42").startswith("NoneFalse")
    chat._command(talk.chat, "/think on")
    assert talk.say(user("hi"), "42").startswith("NoneTrue")
    with pytest.raises(ValueError, match="/think takes on or off"):
        chat._command(talk.chat, "/think maybe")
    talk.chat.model.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="this chat template has no switch for reasoning"):
        chat._command(talk.chat, "/think on")


def test_a_tool_is_called_and_answers(talk: Talk, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="the last answer called no tool"):
        chat._tool_message(talk.chat, "sunny")
    talk.say(user("weather?"), CALL)
    called = 'tool call: weather(city="Rome"); /tool TEXT gives its result\n'
    assert capsys.readouterr().out == f"{CALL}\n{called}"
    result = chat._tool_message(talk.chat, "sunny")
    assert result == {"role": "tool", "name": "weather", "content": "sunny"}
    prompt = talk.say(result, "It is sunny.")
    assert prompt.endswith("assistant::weather<|im_end|>tool::sunny<|im_end|>")


def test_the_system_message_changes(talk: Talk) -> None:
    chat._command(talk.chat, "/system T")
    assert "system::T" in talk.say(user("hi"), "42")
    chat._command(talk.chat, "/system")
    assert "system" not in talk.say(user("hi"), "42")
    assert talk.chat.opening.template_args == {"other": 1}
