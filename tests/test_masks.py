"""Where the assistant's turns stand in what a chat template writes."""

from __future__ import annotations

from typing import Any

import pytest
from data_cases import CHATML, assistant, make_tokenizer, user

from lorax_ft.data import template as template_room
from lorax_ft.data.chat import Encoded, Encoder, describe_row, encode, encode_prompt
from lorax_ft.data.conversation import Conversation, Message, PlainText

TALK = [user("one?"), assistant("two"), user("and?"), assistant("four")]
ENDED = ["two<|im_end|>", "four<|im_end|>"]
# Writes the same after a user's turn with and without a generation prompt.
NEVER = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
ALWAYS = NEVER + "{{ '<|im_start|>assistant\n' }}"
# Writes an empty thought into the last turn, and drops thoughts from earlier turns.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set reasoning = m.reasoning_content or '' %}"
    "{% if parts | length > 1 %}"
    "{% set reasoning = parts[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '!<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = [{"type": "function", "function": {"name": "sum", "arguments": {"x": "1", "n": 2}}}]
PARTS = (
    "{% for m in messages %}{{ m.role + ':' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)


def labels(template: str, messages: list[Message] | Conversation, **options: Any) -> list[str]:
    """The texts that count in the loss."""
    tokenizer = make_tokenizer(template)
    sample = encode(messages, tokenizer, **{"max_length": 1000, **options})
    return [text for text, counts in describe_row(tokenizer, sample) if counts]


def counted(tokenizer: Any, *talks: list[Message]) -> Encoded:
    """These conversations encoded, with the counts."""
    encoder = Encoder(tokenizer=tokenizer)
    encoded = encoder.encode([(Conversation(messages=talk), "") for talk in talks])
    assert list(encoded.samples())
    return encoded


@pytest.mark.parametrize("template", [CHATML, NEVER, ALWAYS, "{{ messages|length }}" + CHATML])
def test_neither_a_header_nor_the_next_turn_is_taught(template: str) -> None:
    assert labels(template, TALK) == ENDED
    assert labels(template, [*TALK, user("so?")]) == ENDED
    assert labels(template, [assistant("hi"), *TALK]) == ["hi<|im_end|>", *ENDED]
    system = {"role": "system", "content": "Be brief."}
    assert labels(template, [system, *TALK]) == ENDED


def test_texts_that_a_template_looks_at_are_found_too() -> None:
    trims = CHATML.replace("m['content']", "(m['content'] | trim)")
    assert labels(trims, [user(" a "), assistant(" two \n")]) == ["two<|im_end|>"]
    asks = CHATML.replace(
        "m['content']", "('[tool]' if m['content'].startswith('<') else m['content'])"
    )
    talk = [user("<b>"), assistant("two"), user("c"), assistant("four")]
    assert labels(asks, talk) == ENDED
    # Icon fonts use the private-use characters that serve as marks.
    talk = [user("\U000f0000 \U00100000"), assistant("\U000f0001")]
    assert labels(CHATML, talk) == ["\U000f0001<|im_end|>"]


def test_a_template_that_defies_all_of_it_is_shown_at_that_place() -> None:
    reverses = "{{ messages | length }} " + CHATML.replace("m['content']", "m['content'] | reverse")
    with pytest.raises(
        ValueError,
        match=r"line 3, turn 2: the chat template changes the texts, .* around that place it wrote "
        r"'4 <\|im_start\|>user.*; use --data.loss_on all",
    ):
        labels(reverses, TALK, where="a.jsonl, line 3")
    assert labels(reverses, TALK, loss_on="all")


def test_reasoning_and_the_empty_thought() -> None:
    plain = [user("one?"), assistant("two"), user("and?"), assistant("four")]
    empty = "<think>\n\n</think>\n\n"
    assert labels(THINKING, plain) == ENDED
    assert labels(THINKING, plain, reasoning_loss="all") == [ENDED[0], empty + ENDED[1]]
    thought = "<think>\nhm\n</think>\n\n"
    for answer in (
        {"role": "assistant", "content": "four", "reasoning_content": "hm"},
        assistant(thought + "four"),
    ):
        talk = [*plain[:3], answer]
        assert labels(THINKING, talk) == [ENDED[0], thought + ENDED[1]]
        assert labels(THINKING, talk, reasoning_loss="none") == ENDED
    # An empty thought of the data counts.
    assert labels(THINKING, [*plain[:3], assistant(empty + "four")]) == [
        ENDED[0],
        empty + ENDED[1],
    ]
    # The template drops the thoughts of earlier turns.
    assert labels(THINKING, [user("one?"), assistant(thought + "two"), *plain[2:]]) == ENDED


def test_generation_marks_of_the_template_come_first() -> None:
    assert labels(MARKED, TALK) == ["two!<|im_end|>\n", "four!<|im_end|>\n"]
    assert labels(MARKED, TALK, loss_on="last") == ["four!<|im_end|>\n"]


def test_turns_with_weights() -> None:
    first = {**assistant("two"), "train": False}
    assert labels(CHATML, [TALK[0], first, *TALK[2:]]) == ENDED[1:]
    assert labels(CHATML, TALK, loss_on="last") == ENDED[1:]
    kept = "".join(labels(CHATML, [TALK[0], first, *TALK[2:]], loss_on="all"))
    assert "two" not in kept
    assert "one?" in kept


def test_reasoning_does_not_count_where_all_else_does() -> None:
    talk = [user("one?"), assistant("<think>hm</think>two")]
    kept = labels(CHATML, talk, loss_on="all", reasoning_loss="none")
    assert kept == ["<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n", "two<|im_end|>\n"]


def test_tool_calls_are_part_of_the_turn() -> None:
    called = Conversation(
        messages=[
            user("one?"),
            {**assistant(""), "tool_calls": CALLS},
            {"role": "tool", "content": "3"},
            assistant("four"),
        ],
        tools=[{"type": "function", "function": {"name": "sum"}}],
    )
    call = '<call>sum{"x": "1", "n": 2}</call><|im_end|>'
    assert labels(CALLING, called) == [call, ENDED[1]]
    # A template that joins texts takes the arguments as JSON text only.
    joins = CALLING.replace("(call.function.arguments | tojson)", "call.function.arguments")
    assert labels(joins, called) == [call, ENDED[1]]
    with pytest.raises(ValueError, match="turn 2: the chat template does not write the tool calls"):
        labels(CHATML, called)


def test_a_template_that_writes_no_text() -> None:
    with pytest.raises(ValueError, match="turn 2: the chat template does not write this turn"):
        labels("{{ messages | length }}", TALK)


def test_content_as_a_list_of_parts() -> None:
    assert labels(PARTS, TALK) == ENDED
    prompt = encode_prompt(TALK[:1], make_tokenizer(PARTS))
    assert make_tokenizer(PARTS).decode(prompt) == "user:one?<|im_end|>"


def test_texts_that_a_template_does_not_write_are_counted() -> None:
    silent = CHATML.replace(
        "{{ '<|im_start|>' + m['role']",
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ '<|im_start|>' + m['role']",
    )
    with_system = [{"role": "system", "content": "Be brief."}, *TALK]
    encoded = counted(make_tokenizer(silent), with_system, TALK)
    assert encoded.unwritten == {"messages of the role system": 1}


def test_a_template_without_an_end_of_turn_token() -> None:
    endless = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer(endless)
    encoded = counted(tokenizer, TALK)
    assert encoded.endless == 2
    assert labels(endless, TALK) == ["two\n", "four\n"]
    assert labels(endless, TALK, append_end=True) == ["two\n", "four\n<|im_end|>"]
    assert labels(CHATML, TALK, append_end=True) == ENDED


def test_plain_text() -> None:
    tokenizer = make_tokenizer(None)
    sample = encode(PlainText(prompt="a b", completion=" c"), tokenizer, max_length=99)
    assert [text for text, counts in describe_row(tokenizer, sample) if counts] == [" c<|im_end|>"]
    text = encode(PlainText(completion="once"), tokenizer, max_length=99)
    assert text.mask.all()
    assert tokenizer.decode(text.tokens) == "once<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            r"line 3: the chat template did not finish within 0.5 seconds; it may loop forever",
        ),
        (
            "{% for a in range(9) %}{{ 'a' * 1000000 }}{% endfor %}",
            r"line 3: the chat template wrote 9,000,000 characters",
        ),
        ("{{ range(10 ** 9) | length }}", r"line 3: the chat template rejects this conversation"),
    ],
)
def test_templates_that_do_not_end(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_room, "SECONDS", 0.5)
    monkeypatch.setattr(template_room, "LONGEST_TEXT", 1_000_000)
    with pytest.raises(ValueError, match=message):
        labels(template, TALK, where="a.jsonl, line 3")


def test_a_turn_that_only_thinks_ends_too() -> None:
    thinks = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    thought = "<think>\nhm\n</think>\n\n"
    assert labels(THINKING, [user("one?"), thinks]) == [thought + "<|im_end|>"]
    assert labels(THINKING, [user("one?"), thinks], reasoning_loss="none") == ["<|im_end|>"]
    only = [user("one?"), assistant("<think>hm</think>")]
    assert labels(CHATML, only) == ["<think>hm</think><|im_end|>"]


def test_headers_that_differ_from_turn_to_turn() -> None:
    numbered = (
        "{% for m in messages %}"
        "{{ '[Round ' ~ loop.index0 // 2 ~ '] ' ~ m.role ~ ': ' ~ m.content ~ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '[Round ' ~ (messages | length) // 2 ~ '] assistant: ' }}{% endif %}"
    )
    system = {"role": "system", "content": "Be brief."}
    assert labels(numbered, TALK) == ENDED
    assert labels(numbered, [system, *TALK]) == ENDED


def test_ends_of_turns_that_are_text_or_follow_text() -> None:
    as_json = CHATML.replace("m['content']", "(m['content'] | tojson)")
    assert labels(as_json, TALK) == ['"two"<|im_end|>', '"four"<|im_end|>']
    as_text = CHATML.replace("<|im_end|>", "<|end of turn|>")
    assert labels(as_text, TALK) == ["two<|end of turn|>", "four<|end of turn|>"]
    # It is no token, so generation does not stop at it.
    encoded = counted(make_tokenizer(as_text), TALK)
    assert encoded.endless == 2


def test_calls_without_a_header_and_results_in_the_turn_of_the_assistant() -> None:
    talk = [
        user("one?"),
        {**assistant(""), "tool_calls": CALLS},
        {"role": "tool", "content": "3"},
        {**assistant(""), "tool_calls": CALLS},
        {"role": "tool", "content": "3"},
        assistant("four"),
    ]
    bare = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
        "{% elif m.tool_calls %}{{ '[CALLS]' + m.tool_calls[0].function.name }}"
        "{{ (m.tool_calls[0].function.arguments | tojson) + '<|im_end|>' }}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    call = '[CALLS]sum{"x": "1", "n": 2}<|im_end|>'
    assert labels(bare, talk) == [call, call, ENDED[1]]
    inside = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '<r>' + m.content + '</r>' }}"
        "{% else %}{% if loop.first or loop.previtem.role != 'tool' %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% endif %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}"
        "{{ '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}"
        "{% endfor %}{% if not m.tool_calls %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = '<call>sum{"x": "1", "n": 2}</call>'
    assert labels(inside, talk) == [call, call, ENDED[1]]
    # A token that opens the results does not end the calls.
    marked = inside.replace("<r>", "<|im_start|>")
    assert labels(marked, talk) == [call, call, ENDED[1]]
