"""Scores of a model: shared starts, losses, tasks with an adapter, and the script."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_cases import CMMLU, write
from generation_cases import make_tokenizer
from run_cases import SHORT, Main, config

from lorax_ft.commands import evaluate as evaluate_command
from lorax_ft.config import EMBEDDED_DATA, EMBEDDED_MODEL, AdapterConfig, DataConfig, MeshConfig
from lorax_ft.data.chat import Sample
from lorax_ft.data.packing import collate
from lorax_ft.evaluation.benchmark import read_benchmark
from lorax_ft.evaluation.likelihood import row_losses
from lorax_ft.evaluation.multiple_choice import encode_benchmark, evaluate_choices
from lorax_ft.evaluation.next_token import next_tokens, padded, shared_length
from lorax_ft.evaluation.tasks import Vote, gsm8k_task
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import save_peft
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.models.config import LayerType, LinearAttention
from lorax_ft.models.model import LoadedModel, Model
from lorax_ft.models.rope import Rope
from lorax_ft.run.log import read_log
from lorax_ft.sharding import DECODER_RULES, make_mesh, param_shardings
from lorax_ft.training.losses import supervised_loss
from lorax_ft.tree import Tree

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load_model(EMBEDDED_MODEL)


def prompts(*lengths: int, shared: int = 0) -> list[np.ndarray]:
    """Random tokens, the first ones in common."""
    rng = np.random.default_rng(0)
    start = rng.integers(1, 97, shared)
    return [np.concatenate([start, rng.integers(1, 97, n - shared)]) for n in lengths]


def by_full_forward(model: Model, params: Tree, rows: list[np.ndarray]) -> np.ndarray:
    """Log-probabilities after each row, `[N, V]`, without a cache."""
    tokens = np.zeros((len(rows), 64), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    logits = jax.jit(model.apply)({"params": params}, tokens)
    last = [logits[i, len(row) - 1] for i, row in enumerate(rows)]
    return np.array(jax.nn.log_softmax(jnp.array(last)))


ROPE = Rope(dims=8, theta=1e4)
LINEAR = LinearAttention(key_heads=2, value_heads=4, key_dim=8, value_dim=8, conv_width=4)
LAYERS = {
    "attention": (LayerType(rope=ROPE),),
    "windows": (LayerType(rope=ROPE, window=9), LayerType(rope=ROPE), LayerType(rope=None)),
    "linear": (*[LayerType(rope=None, linear=LINEAR)] * 2, LayerType(rope=ROPE)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layers", LAYERS)
def test_a_shared_start_changes_nothing(layers: str, decoder: Callable[..., Model]) -> None:
    model: Any = decoder(layer_types=LAYERS[layers])
    rows = prompts(45, 60, 41, 64, shared=40)
    alone = prompts(7, 3)
    targets = np.tile(np.arange(4, 8), (6, 1))
    groups = [*["a"] * 4, *["b"] * 2]
    expected = by_full_forward(model, model.params, rows + alone)
    counted: list[int] = []
    found = next_tokens(
        model,
        model.params,
        rows + alone,
        targets,
        groups=groups,
        batch_tokens=64,
        advance=counted.append,
    )
    np.testing.assert_allclose(found.log_probs, expected[:, 4:8], atol=1e-4)
    np.testing.assert_array_equal(found.best, expected.argmax(axis=1))
    assert sum(counted) == 6
    assert len(counted) > 2


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_adapters(case: str, model: Any, params: Callable[[str], Tree]) -> None:
    rows = prompts(45, 60, 41, shared=40)
    targets = np.tile(np.arange(4), (3, 1))
    groups = ["a"] * 3
    found = next_tokens(model, params(case), rows, targets, groups=groups)
    expected = by_full_forward(model, params(case), rows)[:, :4]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-5)
    base = next_tokens(model, model.params, rows, targets, groups=groups)
    assert np.abs(base.log_probs - found.log_probs).max() > 1e-3


def test_sharded_is_unsharded(model: Any, params: Callable[[str], Tree]) -> None:
    rows = prompts(45, 60, 41, 50, shared=40)
    targets = np.tile(np.arange(4), (4, 1))
    groups = ["a"] * 4
    expected = next_tokens(model, params("dora"), rows, targets, groups=groups)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(params("dora"), DECODER_RULES, layout=model.layout, mesh=mesh)
    placed = jax.device_put(params("dora"), shardings)
    found = next_tokens(model, placed, rows, targets, groups=groups)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)


def test_what_is_shared(model: Model) -> None:
    assert shared_length(prompts(45, 60, shared=40), model.config) == 40
    # Too little to be worth it, nothing in common, and one prompt alone.
    assert shared_length(prompts(45, 60, shared=8), model.config) == 0
    assert shared_length(prompts(45), model.config) == 0
    # A token of each prompt is left, even if they are equal.
    same = prompts(45, 45, shared=45)
    assert shared_length(same, model.config) == 44
    # The factors of longrope change at its original length.
    longrope = dataclasses.replace(
        ROPE,
        scaling="longrope",
        original_positions=50,
        short_factors=(1.0,) * 4,
        long_factors=(2.0,) * 4,
    )
    config = dataclasses.replace(model.config, layer_types=(LayerType(rope=longrope),))
    assert shared_length(prompts(45, 60, shared=40), config) == 0
    assert shared_length(prompts(45, 50, shared=40), config) == 40


def test_padded_lengths_are_few() -> None:
    lengths = {padded(n) for n in range(1, 2049)}
    assert len(lengths) < 32
    assert all(n <= padded(n) <= max(16, 1.25 * n) for n in range(1, 2049))


def test_row_losses_are_those_of_training(model: Any) -> None:
    rng = np.random.default_rng(0)
    samples = []
    for length in (5, 30, 1, 12):
        tokens = rng.integers(1, 97, length).astype(np.int32)
        samples.append(Sample(tokens, rng.random(length) < 0.6))
    losses = row_losses(model, model.params, samples, batch_tokens=64)
    batch = collate([[sample] for sample in samples], 32)
    loss = supervised_loss(model, packed=False)
    value, weight, _ = loss(model.params, {k: jnp.asarray(v) for k, v in batch.items()}, None)
    assert losses.tokens.sum() == float(weight)
    assert losses.sums.sum() == pytest.approx(float(value), rel=1e-5)
    assert losses.sums[2] == 0
    with pytest.raises(ValueError, match="text 1 has 66 tokens, but the model has 64 positions"):
        row_losses(model, model.params, [Sample(np.ones(66, np.int32), np.ones(66, bool))])


def test_letters_and_choices(embedded: LoadedModel, tmp_path: Path) -> None:
    benchmark = read_benchmark(write(tmp_path, CMMLU), shots=1)
    for style, chat in (("standard", False), ("lm-eval", False), ("standard", True)):
        encoded = encode_benchmark(benchmark, embedded, shots=1, style=style, chat=chat)
        letters = [embedded.tokenizer.decode(int(token)).strip() for token in encoded.letters]
        assert letters == ["A", "B", "C", "D"]
        assert encoded.subjects == ("agronomy", "agronomy", "virology")
        assert encoded.answers.tolist() == [0, 2, 1]
        shared = evaluate_choices(embedded, embedded.params, encoded)
        single = evaluate_choices(embedded, embedded.params, encoded, share=False)
        np.testing.assert_allclose(shared.log_probs, single.log_probs, atol=1e-4)
        assert shared.correct.tolist() == [
            float(row.argmax() == answer)
            for row, answer in zip(shared.log_probs, [0, 2, 1], strict=True)
        ]


def test_a_space_may_be_a_token_of_its_own(speaker: Any, tmp_path: Path) -> None:
    """This tokenizer has no token for the letters at all: all are unknown."""
    benchmark = read_benchmark(write(tmp_path, CMMLU), shots=0)
    with pytest.raises(ValueError, match="does not write each of A, B, C, D after"):
        encode_benchmark(benchmark, speaker, shots=0)
    without = dataclasses.replace(speaker, tokenizer=None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        encode_benchmark(benchmark, without, shots=0)
    assert make_tokenizer().decode([3]) == "<unk>"


def test_shots_that_do_not_fit(embedded: LoadedModel, tmp_path: Path) -> None:
    benchmark = read_benchmark(write(tmp_path, CMMLU), shots=2)
    lengths = []
    for shots in (0, 1, 2):
        encoded = encode_benchmark(benchmark, embedded, shots=shots)
        lengths.append(max(len(prompt) for prompt in encoded.prompts))
    short = dataclasses.replace(
        embedded, config=dataclasses.replace(embedded.config, max_positions=lengths[1])
    )
    error = rf"of 3 questions do not fit in the model's {lengths[1]} positions with 2 shots.*; 1 sh"
    with pytest.raises(ValueError, match=error):
        encode_benchmark(benchmark, short, shots=2)
    encode_benchmark(benchmark, short, shots=1)
    none = dataclasses.replace(
        embedded, config=dataclasses.replace(embedded.config, max_positions=9)
    )
    with pytest.raises(ValueError, match="some do not fit even without shots"):
        encode_benchmark(benchmark, none, shots=2)


def test_majority_vote(embedded: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "math.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = gsm8k_task(
        embedded,
        str(file),
        data=DataConfig(max_length="auto"),
        max_new_tokens=8,
        vote=Vote(samples=2, temperature=0.9),
    )
    counted: list[int] = []
    outcome = task.run(embedded.params, counted.append)
    assert sum(counted) == task.count == 9
    assert set(outcome.metrics) == {"exact_match", "maj@2"}
    assert all(len(line["samples"]) == 2 for line in outcome.answers)
    again = task.run(embedded.params, counted.append)
    assert outcome.answers == again.answers
    (tmp_path / "none.jsonl").write_text('{"question": "Why?", "answer": "So."}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"none.jsonl, question 1: the reference has no number"):
        gsm8k_task(
            embedded,
            str(tmp_path / "none.jsonl"),
            data=DataConfig(max_length="auto"),
            max_new_tokens=8,
        )


Script = Callable[..., int]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Script:
    """lorax-ft evaluate with a command line; returns its exit status."""

    def call(*argv: object) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        try:
            evaluate_command.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def test_script_with_an_adapter(
    evaluate: Script,
    embedded: LoadedModel,
    randomize: Callable[..., Tree],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = AdapterConfig(rank=4)
    params = add_adapters(embedded.params, config, layout=embedded.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", randomize(params), embedded, config=config)
    write(tmp_path / "cmmlu", CMMLU)
    output = tmp_path / "out"
    status = evaluate(
        *("--model", EMBEDDED_MODEL, "--adapter", tmp_path / "adapter", "--shots", "1"),
        *("--tasks", f"choices={tmp_path / 'cmmlu'}", f"loss={EMBEDDED_DATA}"),
        *("--data.split", "test", "--limit", "6", "--output", output),
        *("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    for words in ("cmmlu, in %", "micro average", "STEM", "virology", "perplexity", "on - base"):
        assert words in said.out
    choices, loss = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["results"]
    assert choices["settings"]["shots"] == 1
    accuracy = choices["scores"]["accuracy"]
    assert list(accuracy) == ["base", "off", "on"]
    assert accuracy["base"]["micro"]["count"] == 3
    assert set(accuracy["base"]["categories"]) == {"STEM", "Other"}
    assert loss["differences"]["loss"]["off - base"]["mean"] == 0
    on, base = loss["scores"]["loss"]["on"], loss["scores"]["loss"]["base"]
    difference = loss["differences"]["loss"]["on - base"]
    assert difference["mean"] == pytest.approx(on["mean"] - base["mean"])
    assert difference["error"] > 0
    answers = (output / "answers_1_cmmlu_on.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(answers[2])["reference"] == "B"
    assert (output / "evaluation.png").stat().st_size > 5000


@pytest.mark.slow
def test_accuracy_during_training(
    main: Main, evaluate: Script, tmp_path: Path, standard_promotion: None
) -> None:
    """A run logs its accuracy at each evaluation; that of its end is the script's."""
    folder = write(tmp_path / "cmmlu", CMMLU)
    output = tmp_path / "run"
    status = main(
        *(*config("lora"), *SHORT, "--train.output", output, "--train.steps", "4"),
        *("--train.eval_every", "2", "--eval.choices", folder, "--optim.learning_rate", "3e-2"),
    )
    assert status == 0
    lines = [line for line in read_log(output) if "accuracy" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    scored = tmp_path / "scored"
    task = f"choices={folder}"
    options = ("--shots", "0", "--chat", "--output", scored)
    assert evaluate("--run", output, "--tasks", task, *options) == 0
    (found,) = json.loads((scored / "evaluation.json").read_text(encoding="utf-8"))["results"]
    assert lines[-1]["accuracy"] == pytest.approx(
        found["scores"]["accuracy"]["on"]["micro"]["mean"]
    )


def test_questions_that_a_run_cannot_ask(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*config("lora"), *SHORT, "--train.output", tmp_path / "run")
    assert main(*options, "--eval.choices", tmp_path / "none") == 2
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    folder = write(tmp_path / "cmmlu", CMMLU)
    assert main(*options, "--eval.choices", folder, "--eval.shots", "3") == 2
    assert "has 2 dev rows, but there are 3 shots" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--tasks", "mmlu=x"], "--tasks mmlu=x is not KIND=PATH"),
        (["--tasks", "choices={folder}", "--shots", "6"], "shots is 6; it must be 0 to 5"),
        (["--tasks", "choices={folder}"], "has 2 dev rows, but there are 5 shots"),
        (["--tasks", "choices={folder}", "--subjects", "law"], "has no subject law"),
        (["--tasks", "choices=missing"], "there is no folder missing"),
        (["--tasks", "loss=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    evaluate: Script,
    tmp_path: Path,
    options: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write(tmp_path, CMMLU)
    filled = [option.format(folder=folder) for option in options]
    assert evaluate("--model", EMBEDDED_MODEL, *filled) == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1
