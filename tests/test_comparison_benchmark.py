"""Comparisons on a multiple-choice benchmark: how it is split, and how accuracies are judged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from benchmark_cases import CMMLU, write
from run_cases import SHORT, config, script_main

from lorax_ft.comparison.accuracy import ALL, accuracy_rows
from lorax_ft.comparison.benchmark import read_task
from lorax_ft.comparison.cost import Cost
from lorax_ft.comparison.design import Design
from lorax_ft.comparison.methods import METHODS
from lorax_ft.comparison.runs import MethodRuns, Run
from lorax_ft.config import EMBEDDED_MODEL, Config, DataConfig
from lorax_ft.data.dataset import load_split
from lorax_ft.interop.load import load_model

DESIGN = Design(rates=(1e-4, 1e-3, 1e-2), common_rate=1e-3, seeds=(0, 1, 2), search_seeds=1)


def questions(count: int, name: str) -> str:
    lines = [",Question,A,B,C,D,Answer"]
    lines += [f"{i},{name} {i}?,one,two,three,four,{'ABCD'[i % 4]}" for i in range(count)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {}
    for subject in ("anatomy", "ancient_chinese"):
        files[f"dev/{subject}.csv"] = questions(5, f"{subject} dev")
        files[f"test/{subject}.csv"] = questions(16, f"{subject} test")
    return write(tmp_path / "cmmlu", files)


def asked(file: str) -> list[str]:
    """The first line of each question of a file, and its answer."""
    found = []
    for line in Path(file).read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        found.append(f"{user['content'].splitlines()[-6]} {assistant['content']}")
    return found


def test_questions_are_split_three_ways(folder: Path, tmp_path: Path) -> None:
    """dev and half of the questions train, an eighth chooses, the rest judges; none does two."""
    task = read_task(str(folder))
    common = Config(data=DataConfig(validation=("old.jsonl", "other=b.jsonl"), shape="alpaca"))
    found = task.write(common, tmp_path / "data")
    sets = dict(entry.split("=") for entry in found.data.validation)
    assert list(sets) == ["choose", "test", "other"]
    trained = asked(found.data.train[0])
    assert trained[:7] == [
        *(f"anatomy dev {i}? {'ABCDA'[i]}" for i in range(5)),
        *("anatomy test 0? A", "anatomy test 1? B"),
    ]
    assert asked(sets["choose"])[:2] == ["anatomy test 4? A", "anatomy test 12? A"]
    places = [5, 6, 7, 13, 14, 15]
    assert asked(sets["test"])[:6] == [f"anatomy test {i}? {'ABCD'[i % 4]}" for i in places]
    assert len({*trained, *asked(sets["choose"]), *asked(sets["test"])}) == 2 * (5 + 16)
    assert task.categories == ["STEM"] * 6 + ["Social Sciences"] * 6
    assert found.data.shape == "auto"


def test_a_subject_with_too_few_questions(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"anatomy of .* has 4 questions; a comparison needs at"):
        read_task(str(folder), limit=4)
    (folder / "dev/anatomy.csv").unlink()
    with pytest.raises(ValueError, match=r"the subject anatomy .* has no dev rows"):
        read_task(str(folder))
    with pytest.raises(ValueError, match="dev rows, but there are 5 shots"):
        read_task(str(write(tmp_path / "few", CMMLU)))


def test_a_question_is_asked_as_it_is_trained(folder: Path, tmp_path: Path) -> None:
    """The prompt of a tested question starts the row that would train it; the letter follows."""
    task = read_task(str(folder))
    model = load_model(EMBEDDED_MODEL)
    common = Config(data=DataConfig(system="Be brief.", max_length=512))
    data = task.write(common, tmp_path / "data").data
    encoded = task.encode(model)
    file = dict(entry.split("=") for entry in data.validation)["test"]
    split, _ = load_split(data, file, model.tokenizer)
    assert len(split.rows) == len(encoded.prompts) == 12
    for (sample,), prompt, answer in zip(split.rows, encoded.prompts, encoded.answers, strict=True):
        length = len(prompt)
        np.testing.assert_array_equal(sample.tokens[:length], prompt)
        assert sample.tokens[length] == encoded.letters[answer]
        assert sample.mask[length]
        assert not sample.mask[:length].any()


@pytest.mark.slow
def test_the_script_asks_the_questions(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    few_devices: None,
    standard_promotion: None,
) -> None:
    """At rates of nearly 0 each run answers as the model did before training."""
    argv = [
        *("compare.py", *config("lora"), *SHORT, "--train.steps", "1", "--mesh.data", "1"),
        *("--methods", "lora", "--rates", "1e-12", "2e-12", "4e-12", "--common_rate", "2e-12"),
        *("--seeds", "0", "--train.output", str(tmp_path / "run")),
        *("--benchmark", str(folder), "--data.max_length", "512"),
    ]
    monkeypatch.setattr("sys.argv", argv)
    script_main("compare")()
    output = tmp_path / "run-comparison"
    figures = json.loads((output / "comparison.json").read_text())
    before, lora = figures["tables"]["accuracy_at_common_rate"]
    assert before["label"] == "before training"
    assert lora["categories"] == before["categories"]
    answers = [run["correct"] for run in figures["methods"]["lora"]["runs"] if run["correct"]]
    # At two rates, or at one that is both.
    assert len(answers) in (1, 2)
    assert len(answers[0]) == 12
    assert "| before training |" in (output / "comparison.md").read_text()
    said = capsys.readouterr().out
    assert "before training" in said
    assert "Social Sciences" in said


def methods(answers: dict[str, list[str]]) -> dict[str, MethodRuns]:
    """Methods with the answers of each seed at the common rate."""
    found = {}
    for name, of_seeds in answers.items():
        runs = []
        for seed, correct in enumerate(of_seeds):
            losses = {"choose": 1.0, "test": 1.0}
            runs.append(
                Run(
                    rate=1e-3,
                    seed=seed,
                    losses=losses,
                    first_losses=losses,
                    curve=(),
                    correct=correct,
                )
            )
        found[name] = MethodRuns(
            method=METHODS[name],
            runs=tuple(runs),
            best_rate=1e-3,
            at_edge=False,
            steps=2,
            cost=Cost(parameters=1, seconds_per_step=1.0, memory=None),
        )
    return found


def test_accuracies_by_hand() -> None:
    found = methods(
        {
            "lora": ["1100", "1100", "1100"],
            "dora": ["1110", "1110", "1100"],
            "pissa": ["0000", "0000", "0000"],
        }
    )
    rates = dict.fromkeys(found, 1e-3)
    categories = ["STEM", "STEM", "Other", "Other"]
    rows = accuracy_rows(found, rates, DESIGN, categories, before="0001")
    before, lora, dora, pissa = rows
    assert before.label == "before training"
    assert before.categories[ALL].mean == 0.25
    assert before.categories["STEM"].mean == 0
    assert before.over_seeds.mean == -0.25
    assert lora.verdict == "reference"
    assert {name: share.mean for name, share in lora.categories.items()} == {
        "STEM": 1.0,
        "Other": 0.0,
        "all": 0.5,
    }
    # Over seeds: 0.25, 0.25, 0; over questions: 0, 0, 2/3, 0.
    assert dora.over_seeds.mean == pytest.approx(1 / 6)
    assert dora.over_seeds.half_width == pytest.approx(4.302653 * 0.25 / 3, rel=1e-5)
    error = np.std([0, 0, 2 / 3, 0], ddof=1) / 2
    assert dora.over_questions.half_width == pytest.approx(1.959964 * error, rel=1e-6)
    assert dora.verdict == "noise"
    # No seed differs, but four questions are too few to tell.
    assert pissa.over_seeds.half_width == 0
    assert pissa.over_questions.half_width == pytest.approx(1.96 * math.sqrt(1 / 3) / 2, rel=1e-3)
    assert pissa.verdict == "noise"


def test_many_questions_tell(folder: Path) -> None:
    found = methods({"lora": ["10" * 50] * 3, "dora": ["1" * 100] * 3, "pissa": ["0" * 100] * 3})
    rates = dict.fromkeys(found, 1e-3)
    rows = accuracy_rows(found, rates, DESIGN, ["STEM"] * 100, before="0" * 100)
    assert [row.verdict for row in rows] == ["worse", "reference", "better", "worse"]
