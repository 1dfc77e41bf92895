"""Chat templates, and the loss masks of the assistant's turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from data_cases import BYTES, assistant, make_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_ft.data.chat import describe_row, encode, encode_prompt
from lorax_ft.data.formats import Message, split_answer

LLAMA2 = (  # no generation prompt; answers start with a space and end with EOS
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (  # no special tokens; the prompt and the turns end with a space
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"
MERGED = make_tokenizer(merges=40)
UNTRIMMED = make_tokenizer(trim_offsets=False)
texts = st.text(max_size=8) | st.sampled_from(
    ["  ", "\n\n", " é ", "日本", "👩‍👩‍👧", "\u3000", "\r\n", ""]
)


def learnt(messages: list[Message], tokenizer: Any, **options: Any) -> list[str]:
    """The parts of a conversation that contribute to the loss."""
    sample = encode(messages, tokenizer, **{"max_length": 1000, **options})
    return [text for text, counts in describe_row(tokenizer, sample) if counts]


def test_multi_turn_mask_ends_with_the_end_of_turn() -> None:
    messages = [user("one?"), assistant("two"), user("and?"), assistant("the answer\n is twelve")]
    for tokenizer in (BYTES, MERGED):
        assert learnt(messages, tokenizer) == ["two<|im_end|>", "the answer\n is twelve<|im_end|>"]
        assert "".join(learnt(messages, tokenizer, loss_on="all")) == tokenizer.apply_chat_template(
            messages, tokenize=False
        )


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_other_templates(trim_offsets: bool) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant(" d ")]
    llama2 = make_tokenizer(LLAMA2, trim_offsets=trim_offsets)
    assert learnt(messages, llama2) == [" b <|im_end|>", "  d  <|im_end|>"]
    # Without a special token, the end of a turn looks like the template's white space, so all of it
    # counts in the loss.
    plain = make_tokenizer(PLAIN, trim_offsets=trim_offsets)
    assert learnt(messages, plain) == ["b ", " d  "]


def test_a_token_that_holds_the_answers_first_letters_counts() -> None:
    """The tokenizer merges the space at the end of "assistant: " into the answer's first word."""
    tokenizer = make_tokenizer(PLAIN, merges=60)
    assert learnt([user("one?"), assistant("twelve")], tokenizer) == [" twelve "]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.booleans())
def test_labels_are_the_assistants_bytes(pairs: list[tuple[str, str]], trim_offsets: bool) -> None:
    """For any text and a byte-level tokenizer, the labels are the answers' bytes and end tokens."""
    messages = [
        message for question, answer in pairs for message in (user(question), assistant(answer))
    ]
    tokenizer = BYTES if trim_offsets else UNTRIMMED
    sample = encode(messages, tokenizer, max_length=1000)
    assert sample.tokens.dtype == np.int32
    assert sample.mask.dtype == bool
    labels = tokenizer.decode(
        sample.tokens[sample.mask].tolist(), clean_up_tokenization_spaces=False
    )
    assert labels == "".join(answer + "<|im_end|>" for _, answer in pairs)
    whole = tokenizer.decode(sample.tokens.tolist(), clean_up_tokenization_spaces=False)
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)


def test_prompt_is_the_sample_before_its_labels() -> None:
    prompt, answer = split_answer([user("one and é?"), assistant("two")])
    tokens = encode_prompt(prompt, MERGED)
    sample = encode([*prompt, assistant(answer)], MERGED, max_length=100)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, sample.tokens[: int(np.argmax(sample.mask))])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REFUSING, "line 3: the chat template rejects this conversation: roles must alternate"),
        (None, "has no chat template; use an instruction-tuned checkpoint"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    tokenizer = make_tokenizer(template)
    with pytest.raises(ValueError, match=message):
        encode([user("a"), assistant("b")], tokenizer, max_length=50, where="a.jsonl, line 3")
