"""Which token ends an answer: found in the template, warned of where none is written."""

from __future__ import annotations

from typing import Any

import pytest
from data_cases import CHATML, make_tokenizer

from lorax_ft.interop.end_tokens import end_of_turn, ids_that_stop

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
ALWAYS_OPENS = "<|im_start|>assistant\n"
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}"
    "<|im_end|>{% endfor %}"
)
ENDS = {
    "ChatML": (CHATML, "<|im_end|>"),
    "a space before the end": (TURNS + " <|im_end|>\n{% endfor %}", "<|im_end|>"),
    "always opens an answer": (
        TURNS + "<|im_end|>\n{% endfor %}" + ALWAYS_OPENS,
        "<|im_end|>",
    ),
    "opens without an end": (TURNS + "\n{% endfor %}" + ALWAYS_OPENS, None),
    "no end": (TURNS + "\n{% endfor %}", None),
    "text after the answer": (TURNS + "\n###<|im_end|>{% endfor %}", None),
    "end of the last turn only": (
        TURNS + "{% if loop.last %}<|im_end|>{% endif %}{% endfor %}",
        "<|im_end|>",
    ),
    "end between turns only": (
        TURNS + "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
        None,
    ),
    "two tokens": (TURNS + "<|end|>\n<|im_end|>{% endfor %}", "<|end|>"),
    "a token in another": (TURNS + "<|end|>x{% endfor %}", "<|end|>x"),
    "roles without tokens": (CHATML.replace("<|im_start|>", ""), "<|im_end|>"),
    "lists of parts": (PARTS, "<|im_end|>"),
    "rejects": ("{{ raise_exception('no') }}", None),
    "drops answers": ("{% for m in messages[:1] %}{{ m.content }}<|im_end|>{% endfor %}", None),
    "none": (None, None),
}


def tokenizer_of(template: str | None) -> Any:
    tokenizer = make_tokenizer(template)
    # Added, but not special, as in some checkpoints.
    tokenizer.add_tokens(["<|end|>", "<|end|>x"])
    return tokenizer


@pytest.mark.parametrize("name", ENDS)
def test_end_of_turn(name: str) -> None:
    template, end = ENDS[name]
    assert end_of_turn(tokenizer_of(template)) == end


def test_template_variables_reach_the_template() -> None:
    template = TURNS + "{% if closes %}<|im_end|>{% endif %}{% endfor %}"
    tokenizer = tokenizer_of(template)
    assert end_of_turn(tokenizer) is None
    assert end_of_turn(tokenizer, {"closes": True}) == "<|im_end|>"


def test_the_default_of_named_templates_counts() -> None:
    tokenizer = tokenizer_of(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TURNS + "{% endfor %}"}
    assert end_of_turn(tokenizer) == "<|im_end|>"


def test_stop_ids() -> None:
    tokenizer = tokenizer_of(TURNS + "<|end|>{% endfor %}")
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    assert ids_that_stop(tokenizer) == tuple(sorted((end, eos)))
    assert ids_that_stop(None, {"eos_token_id": [7, 5]}, {"eos_token_id": 6}, {}) == (5, 6, 7)
    assert ids_that_stop(None, {"eos_token_id": None}) == ()
