"""ROUGE and BLEU by hand, through the libraries of the extra `eval`."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")

from lorax_ft.evaluation.text_metrics import corpus_bleu, rouge_l, sentence_bleu


def test_rouge_l() -> None:
    # The longest common subsequence has 2 words: precision 2 / 3, recall 1.
    scores = rouge_l(["the cat sat", "a b"], ["the cat", "c d"])
    assert scores.tolist() == pytest.approx([0.8, 0])


def test_bleu() -> None:
    # All n-grams are right, and 4 words of 5 leave the brevity penalty.
    penalty = math.exp(1 - 5 / 4)
    assert corpus_bleu(["a b c d"], ["a b c d e"]) == pytest.approx(penalty)
    assert sentence_bleu(["a b c d"], ["a b c d e"]).tolist() == pytest.approx([penalty])
    # Chinese is compared by characters: a whole sentence would be a single word.
    assert corpus_bleu(["今天天气好"], ["今天天气很好"]) > 0.3
