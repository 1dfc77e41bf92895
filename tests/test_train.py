"""The real main(): every config trains, stops and resumes."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from run_cases import CONFIGS, SHORT, Main, config, losses, resumed, slow_cases, trained

import lorax_ft as lft
from lorax_ft.config import EMBEDDED_DATA
from lorax_ft.run.log import LOG, PLOT, Log, read_log
from lorax_ft.run.progress import Progress

# The first three losses of every config. They change only if the computation changes.
GOLDEN = {
    "combined": (5.0425, 2.2301, 2.0018),
    "corda": (5.1320, 2.2421, 1.9750),
    "dora": (5.1320, 3.1406, 2.2295),
    "eva": (5.1320, 2.1638, 1.5700),
    "full": (5.1320, 2.2900, 2.1647),
    "ia3": (5.1320, 2.0839, 2.2747),
    "miss": (5.1320, 2.6499, 2.0049),
    "loftq": (5.1768, 3.1781, 2.3680),
    "lora": (5.1320, 3.2186, 2.2792),
    "lora_fa": (5.1320, 2.6614, 2.0639),
    "lora_ga": (5.1320, 3.0800, 2.0744),
    "lora_one": (3.6870, 2.3200, 2.0522),  # it starts one full fine-tuning step ahead
    "lora_plus": (5.1320, 2.1389, 1.6312),
    "lora_muon": (5.1320, 4.3471, 2.6036),
    "riemannian": (5.1320, 3.2846, 2.3939),
    "milora": (5.1320, 2.5801, 1.9970),
    "neftune": (5.0425, 3.2802, 2.3766),
    "olora": (5.1320, 2.5085, 2.0601),
    "orthogonal": (5.1320, 2.0643, 1.9974),
    "pissa": (5.1320, 2.3646, 2.1024),
    "qdora": (5.0234, 3.0345, 2.3073),
    "qlora": (5.0234, 3.5315, 2.7433),
    "qpissa": (5.2084, 2.2096, 2.0239),
    "vera": (5.1320, 4.5707, 4.5799),
    "loha": (5.1320, 4.3580, 4.1008),
    "lokr": (5.1320, 4.0229, 3.3921),
    "shira": (5.1320, 2.7565, 2.0750),
    "hira": (5.1320, 4.1235, 3.4333),
    "oft": (5.1320, 2.2523, 2.2914),
    "mica": (5.1320, 2.2459, 1.8932),
    "bottleneck": (5.1320, 3.3647, 2.2584),
    "new_tokens": (4.8546, 3.1981, 2.2556),
    "alora": (5.1320, 3.3971, 2.4007),
    "prompt_tuning": (4.3859, 3.1334, 2.6083),
    "p_tuning": (4.3042, 2.8860, 2.7425),
    "prefix_tuning": (5.0527, 4.2281, 3.3105),
    "p_tuning_v2": (4.3859, 3.5734, 3.0335),
    "rslora": (5.1320, 3.2186, 2.2792),  # alpha / √r equals LoRA's scale here
}

RESUMED = ("combined", "full", "lora_fa", "lora_ga", "qpissa")

pytestmark = pytest.mark.usefixtures("standard_promotion")


FIRST_TIER = {"combined", "dora", "full", "lora"}


@pytest.mark.parametrize("name", slow_cases(CONFIGS, {*CONFIGS} - FIRST_TIER))
def test_a_config_trains(name: str, main: Main, tmp_path: Path) -> None:
    """A run resumed after a crash equals an uninterrupted one (the second tier: every config)."""
    found = resumed(main, name, tmp_path) if name in RESUMED else trained(main, name, tmp_path)
    assert [found[step] for step in (1, 2, 3)] == pytest.approx(GOLDEN[name], rel=1e-3)


def test_the_saved_adapter_gives_the_loss_that_training_ended_with(
    main: Main, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert (
        main(
            *config("combined"), *SHORT, "--train.steps", 4, "--train.output", out, "--eval.rows", 8
        )
        == 0
    )
    final = read_log(out)[-1]["validation_loss"]
    model = lft.load_model(lft.ModelConfig().path)
    tuned = lft.load_peft(out / "adapter", model)
    run = lft.Config.from_json((out / "config.json").read_text())
    from lorax_ft.data.batches import evaluation_batches
    from lorax_ft.data.dataset import load_data

    data = load_data(run.data, model.tokenizer, seed=run.train.seed)
    (batch,) = evaluation_batches(data.validation.rows, 8, max_length=run.data.max_length, limit=8)
    total, count = jax.jit(
        lft.make_eval_step(lft.supervised_loss(model, packed=False), layout=model.layout)
    )(tuned, batch)
    assert float(total / count) == pytest.approx(final, rel=1e-4)


def test_a_run_on_a_quantized_base_leaves_all_that_its_adapter_needs(
    main: Main, tmp_path: Path, capsys: Any
) -> None:
    """QPiSSA: the base minus A₀ B₀, bitwise the same after resuming, and usable by the scripts."""
    from lorax_ft.run.model_args import ModelArgs, load_with_adapter

    shared = [
        *config("pissa"),
        *SHORT,
        "--optim.schedule",
        "constant",
        "--quant.format",
        "nf4",
        "--quant.rounds",
        2,
    ]
    whole, halves, moved = tmp_path / "whole", tmp_path / "halves", tmp_path / "moved"
    assert main(*shared, "--train.steps", 3, "--train.output", whole) == 0
    said = capsys.readouterr().out
    assert str(whole / "nf4_base") in "".join(said.split())
    assert main(*shared, "--train.steps", 2, "--train.output", halves) == 0
    base = (whole / "nf4_base" / "model.safetensors").read_bytes()
    assert (halves / "nf4_base" / "model.safetensors").read_bytes() == base
    shutil.rmtree(halves / "nf4_base")  # it is computed again
    assert main(*shared, "--train.steps", 3, "--train.output", halves, "--train.resume") == 0
    assert (halves / "nf4_base" / "model.safetensors").read_bytes() == base
    assert (halves / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()

    halves.rename(moved)
    model, params = load_with_adapter(ModelArgs(run=str(moved)))
    assert model.base == f"{moved / 'nf4_base'} in nf4"
    run = lft.Config.from_json((moved / "config.json").read_text())
    from lorax_ft.data.batches import evaluation_batches
    from lorax_ft.data.dataset import load_data

    data = load_data(run.data, model.tokenizer, seed=run.train.seed)
    (batch,) = evaluation_batches(data.validation.rows, 8, max_length=run.data.max_length, limit=8)
    total, count = jax.jit(
        lft.make_eval_step(lft.supervised_loss(model, packed=False), layout=model.layout)
    )(params, batch)
    assert float(total / count) == pytest.approx(read_log(moved)[-1]["validation_loss"], rel=1e-4)

    capsys.readouterr()
    out = ["--train.output", tmp_path / "other", "--train.steps", 2]
    assert main(*shared, *out, "--quant.format", "int8") == 2
    assert (
        "a changed int8 base cannot be saved; use quant.format nf4, or adapter.keep_base"
        in capsys.readouterr().err
    )
    assert main(*shared, *out, "--adapter.continue_from", moved / "adapter") == 2
    assert f"was trained on {halves / 'nf4_base'}" in capsys.readouterr().err
    on = [
        "--adapter.continue_from",
        moved / "adapter",
        "--model.path",
        moved / "nf4_base",
        "--quant.format",
        "none",
    ]
    assert main(*shared, *on, "--train.output", moved, "--train.overwrite") == 2
    assert "lies in" in capsys.readouterr().err
    assert main(*shared, *on, *out) == 0
    assert not (tmp_path / "other" / "nf4_base").exists()
    assert read_log(tmp_path / "other")[0]["validation_loss"] == pytest.approx(
        read_log(moved)[-1]["validation_loss"], rel=1e-4
    )


def test_an_interrupted_run_loses_nothing(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ctrl-C ends the run after the current step with a checkpoint; resuming loses nothing."""
    steps = [*config("lora"), *SHORT, "--optim.schedule", "constant", "--train.steps", 5]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(*steps, "--train.output", whole) == 0
    advance = Progress.advance

    def stopped(self: Progress, step: int, *rest: Any) -> float:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return advance(self, step, *rest)

    monkeypatch.setattr(Progress, "advance", stopped)
    assert main(*steps, "--train.output", halves) == 130
    assert "interrupted after step 3; the same command goes on" in capsys.readouterr().err
    assert [path.name for path in (halves / "checkpoints").iterdir()] == ["3"]
    monkeypatch.undo()
    assert main(*steps, "--train.output", halves) == 0
    said = capsys.readouterr().out
    assert "Resuming from step 3 of 5." in said
    first = read_log(whole)[0]["validation_loss"]
    assert f"{first:.4f} → " in said  # from the start of the run, not from step 3
    assert losses(halves) == losses(whole)
    assert main(*steps, "--train.output", halves, "--train.resume", "--train.steps", 4) == 2
    assert (
        "is at step 5, beyond its end at step 4; give --train.steps 5 or more"
        in capsys.readouterr().err
    )


def test_a_log_goes_on(tmp_path: Path) -> None:
    """A resumed log keeps the lines up to the resumed step, and drops those that a crash left."""
    lines = [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
    (tmp_path / LOG).write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    )
    log = Log(tmp_path, trackers=(), settings={}, resumed=2)
    assert read_log(tmp_path) == lines[:2]
    log.write(3, {"loss": 1.0})
    assert read_log(tmp_path) == [*lines[:2], {"step": 3, "loss": 1.0}]
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG, PLOT]


def test_overwriting_deletes_a_run_and_nothing_else(main: Main, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(*config("lora"), *SHORT, "--train.steps", 1, "--train.output", out) == 0
    (out / "notes.txt").write_text("mine")
    (out / "adapter/old").write_text("of the old run")
    overwriting = ["--train.steps", 2, "--train.output", out, "--train.overwrite"]
    assert main(*config("lora"), *SHORT, *overwriting) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "adapter/old").exists()
    assert len(losses(out)) == 2
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_an_adapter_trains_on(main: Main, tmp_path: Path, capsys: Any) -> None:
    """From a PEFT folder, as if its run had continued; also stopped and resumed."""
    first, second, halves = tmp_path / "first", tmp_path / "second", tmp_path / "halves"
    assert main(*config("combined"), *SHORT, "--train.steps", 3, "--train.output", first) == 0
    end = read_log(first)[-1]["validation_loss"]
    more = [
        *config("lora"),
        *SHORT,
        "--adapter.continue_from",
        first / "adapter",
        "--optim.schedule",
        "constant",
    ]
    assert main(*more, "--train.steps", 3, "--train.output", second) == 0
    log = read_log(second)
    assert log[0]["validation_loss"] == pytest.approx(end, rel=1e-4)
    assert log[-1]["validation_loss"] < end
    assert "32 + m" in capsys.readouterr().out  # PiSSA of rank 16, in PEFT's format
    assert main(*more, "--train.steps", 2, "--train.save_every", 1, "--train.output", halves) == 0
    first.rename(tmp_path / "moved")
    more[more.index(first / "adapter")] = tmp_path / "moved/adapter"
    assert main(*more, "--train.steps", 3, "--train.output", halves, "--train.resume") == 0
    assert losses(halves) == losses(second)
    saved = "adapter/adapter_model.safetensors"
    assert (halves / saved).read_bytes() == (second / saved).read_bytes()


def test_a_dry_run_shows_everything_and_writes_nothing(
    main: Main, tmp_path: Path, capsys: Any
) -> None:
    assert (
        main(
            *config("dora"),
            *SHORT,
            "--train.output",
            tmp_path / "run",
            "--data.max_length",
            60,
            "--dry-run",
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "150 steps of 8 rows.",
        "Many samples are truncated: --data.max_length is 60, and 95% of",
        "would fit in 68.",
        "layers/self_attn/q_proj",
        "16 + m",
        "trainable parameters",
        "optimizer",
        "⟦",
        "<|im_start|>assistant",
    ):
        assert part in said
    assert not (tmp_path / "run").exists()


def test_losses_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(
    main: Main, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    bad = ["--optim.learning_rate", "1e30", "--train.steps", 9, "--train.max_skipped", 2]
    assert main(*config("lora"), *SHORT, *bad, "--train.output", out) == 2
    error = capsys.readouterr().err
    assert "3 steps of the last 4 were skipped, the last one at step 4" in error
    assert error.count("\n") == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["4"]
    assert math.isfinite(losses(out)[1])


@pytest.mark.parametrize("filling", ["before", "meanwhile"])
def test_a_checkpoint_that_does_not_fit_on_the_disk(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, filling: str
) -> None:
    """Before the run starts nothing is written; later, existing checkpoints are kept."""
    left = iter([10**9, 10**9, 10**6] if filling == "meanwhile" else [10**6])
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=next(left)))
    out = tmp_path / "run"
    assert (
        main(
            *config("lora"),
            *SHORT,
            "--train.steps",
            2,
            "--train.save_every",
            1,
            "--train.output",
            out,
        )
        == 2
    )
    error = capsys.readouterr().err
    reason = "No space left on device: a checkpoint takes 2.8 MB, and 1.0 MB are free"
    assert error == f"error: {out.absolute()}/checkpoints: {reason}\n"
    assert [path.name for path in out.glob("checkpoints/*")] == (
        ["1"] if filling == "meanwhile" else []
    )
    assert out.exists() == (filling == "meanwhile")


def test_the_embedded_questions_are_distinct() -> None:
    parts = [
        (Path(EMBEDDED_DATA) / f"{split}.jsonl").read_text().splitlines()
        for split in ("train", "test")
    ]
    questions = [[json.loads(line)["question"] for line in part] for part in parts]
    assert len({*questions[0], *questions[1]}) == len(questions[0]) + len(questions[1]) == 3400
    workings = [{json.loads(line)["answer"] for line in part} for part in parts]
    # Few test answers occur in the training data, so memorizing answers does not help.
    assert len(workings[0] & workings[1]) < 0.1 * len(workings[1])
