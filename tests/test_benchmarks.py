"""Multiple-choice files and prompts, and means with their standard errors, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from benchmark_cases import CEVAL, CMMLU, MMLU, write

from lorax_ft.evaluation.benchmark import CATEGORIES, known_subjects, read_benchmark
from lorax_ft.evaluation.estimates import macro, micro, ratio
from lorax_ft.evaluation.items import Items, estimates
from lorax_ft.evaluation.math_answers import final_number, majority
from lorax_ft.evaluation.prompts import PROMPTS, prompts_of


def test_formats_are_found_in_the_files(tmp_path: Path) -> None:
    mmlu = read_benchmark(write(tmp_path / "mmlu" / "data", MMLU).parent, shots=2)
    assert (mmlu.format, mmlu.split) == ("mmlu", "test")
    assert [subject.name for subject in mmlu.subjects] == ["astronomy", "philosophy"]
    assert [subject.category for subject in mmlu.subjects] == ["STEM", "Humanities"]
    assert mmlu.subjects[0].dev[1].text == "Which planet, by size, is third?"
    assert mmlu.subjects[0].questions[1].choices == ("a moon", "a star", "a comet", "a planet")

    ceval = read_benchmark(write(tmp_path / "ceval", CEVAL), shots=1)
    # The answers of C-Eval's test split are not public.
    assert (ceval.format, ceval.split) == ("ceval", "val")
    assert [subject.category for subject in ceval.subjects] == ["STEM", "Humanities"]
    assert ceval.subjects[1].dev[0].text == "法律的作用，包括____"
    assert ceval.subjects[1].questions[0].answer == "A"

    cmmlu = read_benchmark(write(tmp_path / "cmmlu", CMMLU), shots=2)
    assert (cmmlu.format, cmmlu.split) == ("cmmlu", "test")
    assert [len(subject.questions) for subject in cmmlu.subjects] == [2, 1]
    assert cmmlu.subjects[0].title == "农学"


def test_splits_subjects_and_limits(tmp_path: Path) -> None:
    folder = write(tmp_path, MMLU)
    val = read_benchmark(folder, split="val", subjects=["philosophy"], shots=0)
    assert [question.answer for question in val.subjects[0].questions] == ["C"]
    assert val.subjects[0].dev == ()
    limited = read_benchmark(folder, shots=1, limit=2)
    assert [len(subject.questions) for subject in limited.subjects] == [2, 1]


def test_subjects_of_the_benchmarks() -> None:
    sizes = {}
    for name in ("mmlu", "ceval", "cmmlu"):
        categories = [row["category"] for row in known_subjects(name).values()]
        sizes[name] = tuple(categories.count(category) for category in CATEGORIES)
    # As in the tables of the papers: MMLU 57, C-Eval 52, CMMLU 67 subjects.
    assert sizes == {"mmlu": (19, 12, 13, 13), "ceval": (20, 10, 11, 11), "cmmlu": (17, 22, 13, 15)}


HEADER = ",Question,A,B,C,D,Answer\n"


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("test/agronomy.csv", HEADER + "0,q,a,b,c,d,A\n1,q,a,b,c,A\n", "line 3: 6 columns, exp"),
        ("test/agronomy.csv", HEADER + '0,"q\nq",a,b,c,d,A\n1,q,a,b,c,d,E\n', "line 4: the answ"),
        ("test/agronomy.csv", HEADER, "has no questions"),
        ("test/agronomy.csv", "text,label\nq,1\n", "line 1: a row of 2 columns"),
        ("test/agronomy.csv", "", "line 1: a row of 0 columns that ends in nothing"),
        ("test/virology.csv", "q,a,b,c,d,A\n", "line 1: the header is q,a,b,c,d,A, but"),
        ("test/virology.csv", HEADER + '0,q,a"b,"c"c,c,d,A\n', "line 2: not CSV"),
        ("dev/virology.csv", HEADER + "0,q,a,b,c,d,A\n", "has 1 dev rows, but there are 2 shots"),
        ("dev/virology.csv", None, "the subject virology .* has no dev rows"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str | None, error: str) -> None:
    folder = write(tmp_path, CMMLU)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=error):
        read_benchmark(folder, shots=2)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        read_benchmark(tmp_path / "missing")
    with pytest.raises(ValueError, match="no subfolder test or val"):
        read_benchmark(tmp_path)
    folder = write(tmp_path, CMMLU)
    with pytest.raises(ValueError, match=r"no subject law; it has agronomy, virology"):
        read_benchmark(folder, subjects=["law"])
    (folder / "test" / "agronomy.csv").write_bytes("土壤".encode("gbk"))
    with pytest.raises(ValueError, match=r"agronomy.csv, line 1: not UTF-8"):
        read_benchmark(folder, shots=1)
    ceval = write(tmp_path / "ceval", CEVAL)
    with pytest.raises(ValueError, match=r"law_test.csv, line 1: the file has no answers"):
        read_benchmark(ceval, split="test", shots=1)


def test_prompts_character_by_character(tmp_path: Path) -> None:
    mmlu = read_benchmark(write(tmp_path / "mmlu", MMLU), shots=1)
    assert prompts_of(mmlu.subjects[0], PROMPTS["mmlu", "standard"], shots=1)[0] == (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        "How many moons has Mars?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: C\n\n"
        "Which star is nearest?\nA. Sirius\nB. Vega\nC. the Sun\nD. Rigel\nAnswer:"
    )
    ceval = read_benchmark(write(tmp_path / "ceval", CEVAL), shots=1)
    assert prompts_of(ceval.subjects[1], PROMPTS["ceval", "standard"], shots=1)[0] == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
        "法律的作用，包括____\nA. 规范作用\nB. 社会作用\nC. 两者\nD. 都不是\n答案：C\n\n"
        "宪法是____\nA. 根本法\nB. 民法\nC. 刑法\nD. 商法\n答案："
    )
    cmmlu = read_benchmark(write(tmp_path / "cmmlu", CMMLU), shots=0)
    assert prompts_of(cmmlu.subjects[1], PROMPTS["cmmlu", "standard"], shots=0) == [
        "以下是中国关于病毒学考试的单项选择题，请选出其中的正确答案。\n\n"
        "流感是\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    ]
    cmmlu = read_benchmark(tmp_path / "cmmlu", shots=1)
    assert prompts_of(cmmlu.subjects[1], PROMPTS["cmmlu", "lm-eval"], shots=1)[0] == (
        "以下是关于病毒学的单项选择题，请直接给出正确答案的选项。\n\n"
        "病毒是\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案： A\n\n"
        "流感是\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    )


def test_standard_errors_by_hand() -> None:
    # Three of four: s² = (3 · 0.25² + 0.75²) / 3 = 0.25, so the error is 0.5 / √4.
    estimate = micro(np.array([1.0, 1, 0, 1]))
    assert (estimate.mean, estimate.error, estimate.count) == (0.75, 0.25, 4)
    assert estimate.interval == pytest.approx((0.75 - 1.96 * 0.25, 0.75 + 1.96 * 0.25), abs=1e-4)
    assert micro(np.array([1.0])).error is None

    # Means 0.75 with error 0.25, and 0.5 with error 0.5: their mean has √(0.0625 + 0.25) / 2.
    averaged = macro(np.array([1.0, 1, 0, 1, 1, 0]), ["a"] * 4 + ["b"] * 2)
    assert averaged.mean == 0.625
    assert averaged.error == pytest.approx(math.sqrt(0.3125) / 2)
    assert macro(np.array([1.0, 1, 0]), ["a", "a", "b"]).error is None

    # Rows whose losses are 9 in all on 6 tokens, so 1.5 each, and what is left of each row.
    loss = ratio(np.array([2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    squares = (2 - 1.5) ** 2 + (3 - 3) ** 2 + (4 - 4.5) ** 2
    assert loss.mean == 1.5
    assert loss.error == pytest.approx(math.sqrt(3 / 2 * squares) / 6)


def test_categories_and_paired_differences() -> None:
    subjects = ("law", "law", "law", "art", "physics", "physics")
    categories = ("Humanities",) * 4 + ("STEM",) * 2
    base = Items(values=np.array([1.0, 0, 0, 1, 0, 1]), subjects=subjects, categories=categories)
    adapted = Items(values=np.array([1.0, 1, 0, 1, 0, 0]), subjects=subjects, categories=categories)
    scores = estimates(base)
    assert scores.total.mean == 0.5
    assert scores.macro is not None
    assert scores.macro.mean == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)
    assert list(scores.categories) == ["STEM", "Humanities"]
    in_micro, in_macro = scores.categories["Humanities"]
    assert (in_micro.mean, in_macro.mean) == (0.5, pytest.approx(2 / 3))
    assert scores.subjects["law"].count == 3
    # One gained, one lost: 0 on average, s² = 2 / 5.
    paired = estimates(adapted.minus(base)).total
    assert paired.mean == 0
    assert paired.error == pytest.approx(math.sqrt(2 / 5 / 6))


def test_numbers_of_solutions() -> None:
    cases = {
        "72 / 2 = 36\n#### 36": "36",
        "#### 1,008": "1008",
        "first #### 3, then #### -4.": "-4",
        "She has $1,250.50 left, that is all.": "1250.5",
        "It is 7.0 in the end.": "7",
        "no number": None,
        "#### none, but 5": "5",
    }
    assert {text: final_number(text) for text in cases} == cases
    assert majority(["3", "4", "4", None]) == "4"
    assert majority(["4", "3"]) == "4"
    assert majority([None, None]) is None
