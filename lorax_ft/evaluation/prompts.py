"""The prompts of multiple-choice benchmarks.

A prompt is a header, the shots (questions with their answers), and the question up to its answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from lorax_ft.data.shapes import LETTERS
from lorax_ft.evaluation.benchmark import Format, Question, Subject

PromptStyle = Literal["standard", "lm-eval"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """The wording of a benchmark."""

    header: str
    """The first line, with {subject}."""
    answer: str
    """What stands before the answer."""
    space: str
    """What stands between that and the letter."""
    strip: bool = False
    """Whether white space around a question is removed."""


_ENGLISH = PromptFormat(
    header="The following are multiple choice questions (with answers) about {subject}.",
    answer="Answer:",
    space=" ",
)
_CHINESE = PromptFormat(
    header="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。",
    answer="答案：",
    space="",
)
PROMPTS: Mapping[tuple[Format, PromptStyle], PromptFormat] = {
    ("mmlu", "standard"): _ENGLISH,
    ("ceval", "standard"): _CHINESE,
    ("cmmlu", "standard"): _CHINESE,
    # As in the tasks mmlu, ceval-valid and cmmlu of lm-evaluation-harness 0.4, which has a space
    # before every answer.
    ("mmlu", "lm-eval"): dataclasses.replace(_ENGLISH, strip=True),
    ("ceval", "lm-eval"): PromptFormat(
        header="以下是中国关于{subject}的单项选择题，请选出其中的正确答案。",
        answer="答案：",
        space=" ",
        strip=True,
    ),
    ("cmmlu", "lm-eval"): PromptFormat(
        header="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。",
        answer="答案：",
        space=" ",
        strip=True,
    ),
}


def shots_text(subject: Subject, prompt_format: PromptFormat, *, shots: int) -> str:
    """The header and the shots, which all prompts of a subject start with."""
    header = prompt_format.header.format(subject=subject.title)
    parts = [header]
    # The first ones of dev, as in the benchmarks' own scripts: other shots give other scores.
    for question in subject.dev[:shots]:
        asked = question_text(question, prompt_format)
        parts.append(f"{asked}{prompt_format.space}{question.answer}")
    return "".join(f"{part}\n\n" for part in parts)


def question_text(question: Question, prompt_format: PromptFormat) -> str:
    """A question with its choices, up to the answer."""
    text = question.text.strip() if prompt_format.strip else question.text
    lines = [text]
    for letter, choice in zip(LETTERS, question.choices, strict=True):
        lines.append(f"{letter}. {choice}")
    lines.append(prompt_format.answer)
    return "\n".join(lines)


def prompts_of(subject: Subject, prompt_format: PromptFormat, *, shots: int) -> Sequence[str]:
    """The prompt of each question of a subject."""
    # Equal in all, so that `next_tokens` computes it once.
    before = shots_text(subject, prompt_format, shots=shots)
    prompts = []
    for question in subject.questions:
        prompts.append(before + question_text(question, prompt_format))
    return prompts
