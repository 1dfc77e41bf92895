"""Generated answers: where they stop, how they stream, and exact match."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from generation_cases import WORDS, asked

from lorax_ft.evaluation.exact_match import evaluate_answers, exact_match
from lorax_ft.inference.generate import default_stop_ids
from lorax_ft.inference.texts import answer, stream_texts
from lorax_ft.models.model import Model


def test_default_stop_ids(speaker: Model, model: Model) -> None:
    assert default_stop_ids(speaker) == (0, 2)
    assert default_stop_ids(dataclasses.replace(speaker, hf_config={"eos_token_id": [5, 2]})) == (
        0,
        2,
        5,
    )
    assert default_stop_ids(dataclasses.replace(model, hf_config={"eos_token_id": 7})) == (7,)
    assert default_stop_ids(model) == ()
    configured = dataclasses.replace(
        model, hf_config={"eos_token_id": 7}, generation_config={"eos_token_id": [7, 9]}
    )
    assert default_stop_ids(configured) == (7, 9)


def test_answers_in_batches(speaker: Model, model: Model) -> None:
    conversations = [asked(*WORDS[i : i + 3 * i + 1]) for i in range(5)]
    alone = [answer(speaker, speaker.params, [c], max_new_tokens=8)[0] for c in conversations]
    assert answer(speaker, speaker.params, conversations, max_new_tokens=8, batch_size=2) == alone
    assert answer(speaker, speaker.params, [], max_new_tokens=8) == []
    assert all(text == text.strip() and "<|" not in text for text in alone)
    assert len(set(alone)) > 1
    stop = f" {alone[0].split()[2]}"
    stopped = answer(
        speaker, speaker.params, conversations[:1], max_new_tokens=8, stop_strings=[stop]
    )
    assert stopped == [alone[0][: alone[0].index(stop)]]
    with pytest.raises(ValueError, match="a stop string is empty"):
        answer(speaker, speaker.params, conversations[:1], max_new_tokens=8, stop_strings=[""])
    long, short = asked(*["w1"] * 60), asked("w1")
    with pytest.raises(
        ValueError, match=r"^a.txt, line 7: 63 tokens plus max_new_tokens 8 exceed the 64"
    ):
        answer(
            speaker,
            speaker.params,
            [short, long],
            max_new_tokens=8,
            batch_size=1,
            where=["line 2", "a.txt, line 7"],
        )
    with pytest.raises(ValueError, match="no tokenizer"):
        answer(model, speaker.params, conversations, max_new_tokens=8)


class Letters:
    """A tokenizer of single bytes; invalid UTF-8 decodes to one replacement character per byte."""

    def decode(self, row: list[int], **options: bool) -> str:
        try:
            return bytes(row).decode()
        except UnicodeDecodeError:
            return bytes(row).decode("ascii", "replace")


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize(
    ("said", "stops", "expected"),
    [
        ("7 + 5 = 12\n\nQuestion: 3", ["\n\nQuestion"], "7 + 5 = 12"),
        ("7 + 5 = 12\n\nQuite", ["\n\nQuestion", "###"], "7 + 5 = 12\n\nQuite"),
        ("ends in a begin\n\nQ", ["\n\nQuestion"], "ends in a begin\n\nQ"),
        ("one abcd", ["abcd", "b"], "one a"),  # the stop string that is complete first
        ("aab", ["ab"], "a"),
        ("été €€ 😀", [], "été €€ 😀"),
        ("é\n\nQé", ["\n\nQé"], "é"),
    ],
)
def test_what_was_shown_is_never_taken_back(
    speaker: Model,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    stops: list[str],
    expected: str,
    chunk: int,
) -> None:
    tokens = list(said.encode())
    rows = [[tokens[:n]] for n in [*range(chunk, len(tokens), chunk), len(tokens)]]
    monkeypatch.setattr("lorax_ft.inference.texts.stream", lambda *args, **options: iter(rows))
    model = dataclasses.replace(speaker, tokenizer=Letters())
    texts = [
        t
        for (t,) in stream_texts(
            model, {}, [[1]], max_new_tokens=99, chunk=chunk, stop_strings=stops
        )
    ]
    assert all(new.startswith(old) for old, new in itertools.pairwise(texts))
    assert texts[-1] == expected
    if chunk == 1 and not stops:
        assert texts[:4] == ["", "é", "ét", "ét"]


def test_evaluate_answers(speaker: Model) -> None:
    questions = [asked("w1", "w2"), asked("w3"), asked("w4", "w5", "w6")]
    said = answer(speaker, speaker.params, questions, max_new_tokens=6, batch_size=2)
    references = [said[0], "something else", f"  {said[2]}\n"]
    conversations = [
        [*question, {"role": "assistant", "content": text}, *asked("more")]
        for question, text in zip(questions, references, strict=True)
    ]
    result = evaluate_answers(
        speaker, speaker.params, conversations, max_new_tokens=6, batch_size=2
    )
    assert (result.prompts, result.answers, result.references) == (questions, said, references)
    assert result.match.correct == (True, False, True)
    first = evaluate_answers(speaker, speaker.params, conversations, max_new_tokens=6, compared=2)
    assert first.answers == said
    assert (first.match.count, first.match.total, first.match.fraction) == (1, 2, 0.5)
    nothing = evaluate_answers(
        speaker, speaker.params, conversations, max_new_tokens=6, compared=0, pattern="no (.*)"
    )
    assert nothing.match is None
    with pytest.raises(ValueError, match="conversation 1 has no assistant turn"):
        evaluate_answers(speaker, speaker.params, questions, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"does not match reference 1: 'w"):
        evaluate_answers(
            speaker, speaker.params, conversations, max_new_tokens=6, pattern="#### (.*)"
        )


@pytest.mark.parametrize(
    ("said", "wanted", "pattern", "same"),
    [
        (" 42\n", "42", None, True),
        ("42.", "42", None, False),
        ("", "42", None, False),
        ("so 2 + 2 = 4\n#### 1,008", "#### 1008", r"#### (-?[\d,.]+)", True),
        ("#### 3 no, #### -18.", "1 #### 2 #### -18", r"#### (-?[\d,.]+)", True),
        ("#### 18.5", "#### 18", r"#### (-?[\d,.]+)", False),
        ("1008", "#### 1008", r"#### (-?[\d,.]+)", False),
        ("#### 18", "#### 118", r"#### (-?[\d,.]+)", False),
        ("answer:  yes, sir ", "answer: yes, sir", "answer:(.*)", True),
        # This comma is not part of a number.
        (
            "answer: yes sir",
            "answer: yes, sir",
            "answer:(.*)",
            False,
        ),
        ("b", "a", "(a)|b", False),
    ],
)
def test_exact_match(said: str, wanted: str, pattern: str | None, same: bool) -> None:
    assert exact_match([said], [wanted], pattern=pattern).correct == (same,)


@pytest.mark.parametrize(
    ("answers", "references", "pattern", "words"),
    [
        ([], [], None, "0 answers and 0 references"),
        (["a"], ["a", "b"], None, "1 answers and 2 references"),
        (["a", "#1"], ["#1", "b"], "#(.)", "does not match reference 2: 'b'"),
        (["a"], ["a"], "a", "has no group"),
        (["a"], ["a"], "(a", "is not a regular expression"),
    ],
)
def test_exact_match_refuses(
    answers: list[str], references: list[str], pattern: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        exact_match(answers, references, pattern=pattern)
