"""Which format a row has: its fields decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lorax_ft.data.fields import Fields, parse_renames
from lorax_ft.data.mistakes import refuse_label, refuse_preference, unknown_shape
from lorax_ft.data.rows import Row

Shape = Literal[
    "messages",
    "alpaca",
    "sharegpt",
    "multiple_choice",
    "question_answer",
    "prompt_completion",
    "text",
]
"""The format of a row, as `data.shape` names it."""

LETTERS = ("A", "B", "C", "D")
"""The choices of a multiple-choice question."""
# The order matters: a row may match several formats, and `detect_shape` takes the first.
REQUIRED: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "multiple_choice": ("question", *LETTERS, "answer"),
    "question_answer": ("question", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields that a row of each format must have."""
SYNONYMS: dict[Shape, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("conversation", "dialogue", "dialog", "chat")},
    "sharegpt": {},
    "alpaca": {"output": ("response", "completion", "answer"), "input": ("context",)},
    "multiple_choice": {"question": ("Question",), "answer": ("Answer",)},
    "question_answer": {
        "question": ("prompt", "query", "problem", "input"),
        "answer": ("response", "solution", "output"),
    },
    "prompt_completion": {},
    "text": {"text": ("content",)},
}
"""Other names of those fields, taken if no format has all of its own names."""


def detect_shape(row: Row, *, fields: Sequence[str] = ()) -> Shape:
    """Returns the first format whose required fields the row has, after the renames in `fields`.

    Raises:
      ValueError: the row matches no format or is for another kind of training, or a rename refers
        to a field that the row lacks.

    >>> row = Row(fields={"question": "1 + 1?", "solution": "2"}, where="")
    >>> detect_shape(row, fields=["answer=solution"])
    'question_answer'
    """
    renames = parse_renames(tuple(fields)).row
    # A wrong rename gets its own error. The one below would only say that no format matches.
    view = Fields(row.fields, row.where, renames=renames, synonyms={})
    for name in renames:
        view.check_renamed(name)
    # A rename says which format is meant.
    candidates: list[Shape] = []
    for shape, required in REQUIRED.items():
        if set(required) & set(renames):
            candidates.append(shape)
    if not candidates:
        candidates = list(REQUIRED)
    # Many data sets have a column of all the text beside the ones that it was made of.
    conversational = [shape for shape in candidates if shape != "text"]
    for shape in conversational:
        if _has_required(row, shape, renames, synonyms=False):
            if shape == "prompt_completion" and not renames:
                refuse_label(row)
            return shape
    # A rename may say that one of the two answers is the one to train on.
    if not {"chosen", "rejected"} & set(renames.values()):
        refuse_preference(row)
    for shape in conversational:
        if _has_required(row, shape, renames, synonyms=True):
            _check_clear(row, shape, renames)
            return shape
    is_turn = "role" in row.fields
    if "text" in candidates and not is_turn and _has_required(row, "text", renames, synonyms=True):
        return "text"
    raise unknown_shape(row, REQUIRED)


def fitting_shape(row: Row, *, usual: Shape, fields: Sequence[str] = ()) -> Shape:
    """Returns the format of a row in a set of rows that are usually of another format.

    Files that were made of several have rows of several formats, each with nulls in the columns of
    the others. A row that fits no format keeps the usual one, whose error says what it lacks.
    """
    renames = parse_renames(tuple(fields)).row
    view = Fields(row.fields, row.where, renames=renames, synonyms=SYNONYMS[usual])
    # A row that has some of the usual fields is an incomplete one, not one of another format.
    if any(view.find(name) is not None for name in REQUIRED[usual]):
        return usual
    for shape in REQUIRED:
        if _has_required(row, shape, renames, synonyms=False):
            return shape
    return usual


def _has_required(row: Row, shape: Shape, renames: Mapping[str, str], *, synonyms: bool) -> bool:
    """Whether a row has values for the required fields of a format."""
    known = SYNONYMS[shape] if synonyms else {}
    view = Fields(row.fields, row.where, renames=renames, synonyms=known)
    for name in REQUIRED[shape]:
        actual = view.find(name)
        if actual is None:
            return False
        value = row.fields[actual]
        # A CSV file has an empty text where another row has a conversation.
        if value == "" and shape in ("messages", "sharegpt"):
            return False
        # Messages with an answer beside them are a prompt and its completion.
        if shape == "question_answer" and isinstance(value, list):
            return False
    return True


def _check_clear(row: Row, shape: Shape, renames: Mapping[str, str]) -> None:
    """Raise if several columns could be the same field of a format."""
    view = Fields(row.fields, row.where, renames=renames, synonyms=SYNONYMS[shape])
    for name in REQUIRED[shape]:
        found = [actual for actual in view.names(name) if row.fields.get(actual) is not None]
        if len(found) > 1:
            columns = " and ".join(found)
            options = " or ".join(f"--data.fields {name}={actual}" for actual in found)
            raise ValueError(f"{row.where}: {columns} could both be the {name}; give {options}")
