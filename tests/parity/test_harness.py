"""lm-evaluation-harness scores our model as it scores transformers', and as we do. Needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
from benchmark_cases import CMMLU, write  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from test_choices import random_checkpoint  # noqa: E402

from lorax_ft.evaluation.benchmark import read_benchmark  # noqa: E402
from lorax_ft.evaluation.harness import LoraxLM  # noqa: E402
from lorax_ft.evaluation.multiple_choice import encode_benchmark, evaluate_choices  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402

# The harness's own task cmmlu, on local files.
CHOICES = """
task: local_{subject}
dataset_path: csv
dataset_kwargs:
  data_files:
    dev: {folder}/dev/{subject}.csv
    test: {folder}/test/{subject}.csv
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
output_type: multiple_choice
description: "以下是关于{title}的单项选择题，请直接给出正确答案的选项。\\n\\n"
doc_to_text: "{{{{Question.strip()}}}}\\nA. {{{{A}}}}\\nB. {{{{B}}}}\\n\
C. {{{{C}}}}\\nD. {{{{D}}}}\\n答案："
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(Answer)}}}}"
metric_list:
  - metric: acc
"""
TEXTS = """
task: local_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/texts.jsonl
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
"""
MORE: dict[str, str] = {
    "multiple_choice": 'doc_to_choice: ["one and two", "x", " then three"]\n'
    "doc_to_target: 0\nmetric_list:\n  - metric: acc\n",
    "loglikelihood_rolling": 'doc_to_text: ""\nmetric_list:\n  - metric: byte_perplexity\n',
    "generate_until": 'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 12\n'
    "metric_list:\n  - metric: exact_match\n",
}


def results_of(model: Any, folder: Path, tasks: list[str], shots: int) -> dict[str, Any]:
    """What the harness finds, with what the model answered to each question."""
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return found


def pair(folder: Path) -> tuple[Any, LoraxLM, Any]:
    theirs = HFLM(pretrained=random_checkpoint(folder), tokenizer=str(folder), device="cpu")
    ours = load_model(folder)
    return theirs, LoraxLM.of(ours, ours.params), ours


def responses(found: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.filterwarnings("ignore")
def test_choices_by_all_roads(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", CMMLU)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    titles = {"agronomy": "农学", "virology": "病毒学"}
    for subject, title in titles.items():
        text = CHOICES.format(subject=subject, title=title, folder=folder)
        (tasks / f"{subject}.yaml").write_text(text, encoding="utf-8")
    names = [f"local_{subject}" for subject in titles]
    theirs, harness, ours = pair(tmp_path / "model")
    by_theirs = results_of(theirs, tasks, names, 2)
    by_ours = results_of(harness, tasks, names, 2)

    benchmark = read_benchmark(folder, shots=2)
    encoded = encode_benchmark(benchmark, ours, shots=2, style="lm-eval")
    choices = evaluate_choices(ours, ours.params, encoded)
    for subject in titles:
        name = f"local_{subject}"
        mine = np.array(encoded.subjects) == subject
        accuracy = by_theirs["results"][name]["acc,none"]
        assert by_ours["results"][name]["acc,none"] == accuracy
        assert choices.correct[mine].mean() == accuracy
        expected = np.array(
            [[float(score) for score, _ in row] for row in responses(by_theirs, name)]
        )
        found = np.array([[float(score) for score, _ in row] for row in responses(by_ours, name)])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        # A letter may be two tokens here, of which the first is a space before all of them.
        own = choices.log_probs[mine]
        np.testing.assert_allclose(own - own[:, :1], expected - expected[:, :1], atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MORE)
def test_other_requests(tmp_path: Path, kind: str) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    # The last is longer than the model's 512 positions.
    lines = ['{"text": "What is twelve?"}', '{"text": "It"}', '{"text": "' + "so far " * 400 + '"}']
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = TEXTS.format(kind=kind, folder=tmp_path)
    for line in MORE[kind].splitlines():
        # YAML refuses a key twice.
        name = line.partition(":")[0]
        text = "\n".join(each for each in text.splitlines() if not each.startswith(f"{name}:"))
    (tasks / "task.yaml").write_text(f"{text}\n{MORE[kind]}", encoding="utf-8")
    theirs, harness, _ = pair(tmp_path / "model")
    expected = responses(results_of(theirs, tasks, [f"local_{kind}"], 0), f"local_{kind}")
    found = responses(results_of(harness, tasks, [f"local_{kind}"], 0), f"local_{kind}")
    if kind == "generate_until":
        assert found == expected
        return
    for own, other in zip(found, expected, strict=True):
        if kind == "multiple_choice":
            assert [greedy for _, greedy in own] == [greedy for _, greedy in other]
            own, other = [score for score, _ in own], [score for score, _ in other]
        np.testing.assert_allclose(
            np.array(own, np.float64), np.array(other, np.float64), rtol=1e-5, atol=1e-4
        )
