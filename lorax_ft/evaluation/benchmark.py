"""Multiple-choice benchmarks in the file formats of MMLU, C-Eval and CMMLU."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from lorax_ft.config import ASSETS
from lorax_ft.data.readers import csv_rows
from lorax_ft.data.shapes import LETTERS

Format = Literal["mmlu", "ceval", "cmmlu"]
Split = Literal["auto", "val", "test"]

CATEGORIES = ("STEM", "Social Sciences", "Humanities", "Other")
OTHER = "Other"

COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "mmlu": ("question", "a", "b", "c", "d", "answer"),
    "ceval": ("id", "question", "a", "b", "c", "d", "answer", "explanation"),
    "cmmlu": ("", "question", "a", "b", "c", "d", "answer"),
}
"""The columns of each format. MMLU's files have no header."""
SUFFIXED: tuple[Format, ...] = ("mmlu", "ceval")
"""The formats whose files are called SUBJECT_SPLIT.csv; others are called SUBJECT.csv."""
FORMATS = (
    "MMLU (question, A, B, C, D, answer, without header), C-Eval (header id,question,A,B,C,D,"
    "answer,explanation) and CMMLU (header ,Question,A,B,C,D,Answer)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question with four choices."""

    text: str
    choices: tuple[str, ...]
    answer: str
    """The letter of the correct choice."""
    place: str
    """File and line, for errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The questions of a subject, and those that are shown with their answers."""

    name: str
    title: str
    """The subject as prompts name it."""
    category: str
    dev: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The subjects of a benchmark."""

    format: Format
    split: str
    subjects: tuple[Subject, ...]


def read_benchmark(
    folder: str | Path,
    *,
    split: Split = "auto",
    subjects: Sequence[str] = (),
    shots: int = 5,
    limit: int | None = None,
) -> Benchmark:
    """Reads a folder with the subfolders dev and test, or dev, val and test, of .csv files.

    Args:
      folder: the folder, or the one above it whose subfolder is `data`, as in MMLU's archive.
      split: the split to read. auto takes test, or val if the files of test hold no answers, as
        C-Eval's.
      subjects: names of the subjects to read; empty reads all.
      shots: how many rows of dev each subject needs.
      limit: how many questions of a subject to read, from the first; None reads all.

    Raises:
      ValueError: there is no such benchmark, a file has another format (the error says its line),
        or a subject has too few rows in dev.
    """
    root = _root(Path(folder).expanduser())
    split = _split(root, split)
    files = sorted((root / split).glob("*.csv"))
    benchmark_format = _format_of(files[0])
    known = known_subjects(benchmark_format)
    by_name = {}
    for file in files:
        by_name[_subject_name(file, split, benchmark_format)] = file
    # A misspelled name is an error, and not a subject less.
    for name in subjects:
        if name not in by_name:
            raise ValueError(f"{root / split} has no subject {name}; it has {', '.join(by_name)}")
    read = []
    for name, file in by_name.items():
        if subjects and name not in subjects:
            continue
        # Subjects that the benchmark itself does not have may stand beside the others.
        row = known.get(name, {"title": name.replace("_", " "), "category": OTHER})
        questions = _read_file(file, benchmark_format)
        subject = Subject(
            name=name,
            title=row["title"],
            category=row["category"],
            dev=_read_dev(root, name, benchmark_format, shots=shots, file=file),
            questions=tuple(questions[:limit]),
        )
        read.append(subject)
    return Benchmark(format=benchmark_format, split=split, subjects=tuple(read))


@functools.cache
def known_subjects(benchmark_format: Format) -> Mapping[str, Mapping[str, str]]:
    """The subjects of a benchmark by name, each with its title and category.

    They are those of its authors. CMMLU's own fifth category, China specific, overlaps the others
    and is left out.
    """
    file = ASSETS / "benchmarks" / f"{benchmark_format}.json"
    subjects: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return subjects


def _root(folder: Path) -> Path:
    """The folder that holds dev."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    for root in (folder, folder / "data"):
        # Without shots, dev is not needed.
        if (root / "test").is_dir() or (root / "val").is_dir():
            return root
    raise ValueError(
        f"{folder} has no subfolder test or val with .csv files; the formats are {FORMATS}"
    )


def _split(root: Path, split: Split) -> Literal["val", "test"]:
    """The split to read, which has files."""
    if split != "auto":
        if not list((root / split).glob("*.csv")):
            raise ValueError(f"{root / split} has no .csv files")
        return split
    for name in ("test", "val"):
        files = sorted((root / name).glob("*.csv"))
        if files and _has_answers(files[0]):
            return name
    raise ValueError(f"{root} has no .csv files with answers in test or val")


def _has_answers(file: Path) -> bool:
    """Whether the questions of a file have answers, which C-Eval's test split keeps to itself."""
    _, row = next(_rows(file), (1, []))
    header = _lowered(row)
    # Only C-Eval's files start with these two columns.
    return header[:2] != ["id", "question"] or "answer" in header


def _subject_name(file: Path, split: str, benchmark_format: Format) -> str:
    if benchmark_format in SUFFIXED:
        return file.stem.removesuffix(f"_{split}")
    return file.stem


def _format_of(file: Path) -> Format:
    """The format that the first row of a file has."""
    _, row = next(_rows(file), (1, []))
    header = _lowered(row)
    # Up to the answer: only the files of dev have explanations.
    if header[:7] == list(COLUMNS["ceval"][:7]):
        return "ceval"
    # Its first column, the index of a data frame, has no name.
    if header[1:] == list(COLUMNS["cmmlu"][1:]):
        return "cmmlu"
    if header[:6] == list(COLUMNS["ceval"][:6]):
        raise ValueError(f"{file}, line 1: the file has no answers; use the split val")
    # MMLU's files have no header, so their first row is a question.
    if len(row) == len(COLUMNS["mmlu"]) and row[-1].strip() in LETTERS:
        return "mmlu"
    raise ValueError(
        f"{file}, line 1: a row of {len(row)} columns that ends in {_end(row)} is of no known "
        f"format; the formats are {FORMATS}"
    )


def _read_dev(
    root: Path, name: str, benchmark_format: Format, *, shots: int, file: Path
) -> tuple[Question, ...]:
    """The first rows of dev."""
    if not shots:
        return ()
    suffix = "_dev" if benchmark_format in SUFFIXED else ""
    dev = root / "dev" / f"{name}{suffix}.csv"
    if not dev.is_file():
        raise ValueError(
            f"the subject {name} ({file}) has no dev rows: there is no {dev}; give shots 0, or "
            "choose other subjects"
        )
    questions = _read_file(dev, benchmark_format)
    if len(questions) < shots:
        raise ValueError(
            f"{dev} has {len(questions)} dev rows, but there are {shots} shots; give shots "
            f"{len(questions)} or less"
        )
    return tuple(questions[:shots])


def _read_file(file: Path, benchmark_format: Format) -> list[Question]:
    """The questions of a file.

    Raises:
      ValueError: a row is not of the format, or there is none.
    """
    columns = COLUMNS[benchmark_format]
    rows = list(_rows(file))
    first = rows[0][1] if rows else []
    if benchmark_format != "mmlu":
        # C-Eval's explanations are in dev only.
        header = _lowered(first)
        names = [name for name in columns if name not in ("", "explanation")]
        if [name for name in header if name in names] != names:
            raise ValueError(
                f"{file}, line 1: the header is {','.join(first)}, but the other files have "
                f"{','.join(columns)}"
            )
        rows = rows[1:]
    if not rows:
        raise ValueError(f"{file} has no questions")
    # Further columns behind these are fine, but then every row has them.
    width = len(columns) if benchmark_format == "mmlu" else len(first)
    place = columns.index("question")
    questions = []
    for line, row in rows:
        where = f"{file}, line {line}"
        if len(row) != width:
            raise ValueError(f"{where}: {len(row)} columns, expected {width}")
        # In all formats the four choices and the answer follow the question.
        text, *choices, answer = row[place : place + 6]
        if answer.strip() not in LETTERS:
            raise ValueError(f"{where}: the answer is {answer!r}; it must be A, B, C or D")
        question = Question(text=text, choices=tuple(choices), answer=answer.strip(), place=where)
        questions.append(question)
    return questions


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a .csv file that are not empty, each with the line on which it starts."""
    return csv_rows(str(file))


def _lowered(row: Sequence[str]) -> list[str]:
    return [cell.strip().lower() for cell in row]


def _end(row: Sequence[str]) -> str:
    return repr(row[-1][:40]) if row else "nothing"
