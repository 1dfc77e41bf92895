"""ROUGE and BLEU of generated texts, as rouge-score and sacrebleu compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The F1 of ROUGE-L of each answer, `[N]`, between 0 and 1 (Lin, 2004).

    Words are those of rouge-score: letters and digits of ASCII, stemmed. Other scripts, such as
    Chinese, have none, so use BLEU there.

    Raises:
      ValueError: rouge-score is not installed.
    """
    scorer = _import("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        score = scorer.score(reference, answer)["rougeL"]
        scores.append(score.fmeasure)
    return np.array(scores)


def sentence_bleu(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The smoothed BLEU of each answer by itself, `[N]`, between 0 and 1.

    Raises:
      ValueError: sacrebleu is not installed.
    """
    # Without n-grams that are longer than the answer, which would make its BLEU about 0.
    bleu = _bleu(references, effective_order=True)
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        percent = bleu.sentence_score(answer, [reference]).score
        scores.append(percent / 100)
    return np.array(scores)


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all answers together, between 0 and 1; as sacrebleu's, divided by 100.

    Raises:
      ValueError: sacrebleu is not installed.
    """
    score: float = _bleu(references).corpus_score(list(answers), [list(references)]).score
    return score / 100


def _bleu(references: Sequence[str], **options: Any) -> Any:
    """sacrebleu's BLEU, which splits Chinese into characters and other texts as mteval does."""
    letters = "".join(references)
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in letters)
    # One tokenization for all, or scores of single answers would not compare.
    is_chinese = 2 * chinese > len(letters.replace(" ", ""))
    tokenize = "zh" if is_chinese else "13a"
    return _import("sacrebleu.metrics").BLEU(tokenize=tokenize, **options)


def _import(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0].replace("_", "-")
        raise ValueError(f'{name} is not installed; run pip install "lorax_ft[eval]"') from error
