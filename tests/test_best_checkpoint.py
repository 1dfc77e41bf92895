"""Runs that compare evaluations: the best checkpoint, early stopping, time limits, named sets."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pytest
from test_distributed import byte_tokenizer, run_config, train_in_processes, write_model_and_data

from lorax_ft.config import Config
from lorax_ft.interop import load
from lorax_ft.run import steps
from lorax_ft.run.checkpoints import resolve_checkpoint
from lorax_ft.run.log import LOG, PLOT, read_log
from lorax_ft.run.loop import train
from lorax_ft.run.summary import Result

ADAPTER = "adapter/adapter_model.safetensors"
# What the evaluations of the runs below find. Step 4 is the best; two evaluations later they end.
LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5, 12: 0.4}


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_model_and_data(folder)
    return folder


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations during training find `LOSSES`."""

    def losses(job: Any, state: Any) -> dict[str, float]:
        return {"validation_loss": LOSSES[int(state.step)]}

    monkeypatch.setattr(steps, "validation_metrics", losses)


def config(
    folder: Path,
    out: Path,
    *,
    last: int = 12,
    data: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> Config:
    base = run_config(folder, "lora", last)
    shared = {"eval_every": 2, "load_best": True, "patience": 2, "output": str(out)}
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, **shared | fields),
        data=dataclasses.replace(base.data, **data),
        eval=dataclasses.replace(base.eval, exact_match_rows=0, samples=0),
    )


def run(*args: Any, **fields: Any) -> Result:
    result = train(config(*args, **fields))
    assert result is not None
    return result


@pytest.mark.usefixtures("judged")
def test_the_best_step_is_saved_and_patience_ends_the_run(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    result = run(folder, out)
    assert (result.steps, result.saved_step) == (8, 4)
    said = " ".join(capsys.readouterr().out.split())  # cells of the table wrap
    assert "8 of 12: no new lowest validation loss in 2 evaluations (train.patience)" in said
    assert "best step" in said
    kept = sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    assert kept == [4, 8]
    assert [resolve_checkpoint(out, which) for which in ("best", "latest")] == [4, 8]
    # The adapter is that of a run that ends at step 4, and the losses are of these weights.
    short = run(folder, tmp_path / "short", last=4, patience=0)
    assert (out / ADAPTER).read_bytes() == (tmp_path / "short" / ADAPTER).read_bytes()
    log = read_log(out)
    assert [line["step"] for line in log if "validation_loss" in line] == [0, 2, 4, 6, 8]
    assert log[-1]["best_step"] == 4
    assert log[-1]["best_validation_loss"] == result.after.loss
    assert short.saved_step == 4


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("crashed_at", [4, 8])
def test_a_crashed_run_comes_to_the_same_end(folder: Path, tmp_path: Path, crashed_at: int) -> None:
    """Killed after the checkpoint of a step, before anything that follows it."""
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    run(folder, whole, save_every=2, keep_checkpoints=9)
    shutil.copytree(whole, crashed)
    shutil.rmtree(crashed / "adapter")
    (crashed / "finished.json").unlink()
    for path in (crashed / "checkpoints").iterdir():
        if int(path.name) > crashed_at:
            shutil.rmtree(path)
    result = run(folder, crashed, save_every=2, keep_checkpoints=9)
    assert (result.steps, result.saved_step) == (8, 4)
    assert (crashed / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    for name in ("loss", "validation_loss", "best_step"):
        curves = []
        for out in (whole, crashed):
            curves.append({line["step"]: line[name] for line in read_log(out) if name in line})
        assert curves[0] == curves[1], name


@pytest.mark.slow
@pytest.mark.usefixtures("judged")
def test_an_interrupt_at_an_evaluation_loses_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is saved at once, and the resumed run evaluates first."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(steps.StopSignal, "requested", lambda self, step: step == 4)
        with pytest.raises(KeyboardInterrupt, match="interrupted after step 4"):
            run(folder, out)
    assert [line["step"] for line in read_log(out) if "validation_loss" in line] == [0, 2]
    result = run(folder, out)
    assert (result.steps, result.saved_step) == (8, 4)
    assert [line["step"] for line in read_log(out) if "validation_loss" in line] == [0, 2, 4, 6, 8]
    # Started once more, a run that is out of patience trains no further; with more of it, it does.
    assert train(config(folder, out)) is None
    (out / "finished.json").unlink()
    assert run(folder, out).steps == 8
    assert run(folder, out, patience=3).saved_step == 12


def test_a_time_limit_ends_a_run_which_can_go_on(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    fields = {"load_best": False, "patience": 0, "eval_every": 0, "last": 4}
    result = run(folder, out, max_minutes=1e-9, **fields)
    assert (result.steps, result.ended_early) == (0, "1e-09 minutes are over (train.max_minutes)")
    assert "0 of 4: 1e-09 minutes are over (train.max_minutes)" in capsys.readouterr().out
    assert (out / ADAPTER).exists()


def test_named_validation_sets(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Each has a loss, the first one is the metric, and the epoch's end is evaluated."""
    rows = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(rows[:3]))
    (tmp_path / "b.jsonl").write_text("".join(rows[3:10]))
    sets = (f"hard={tmp_path}/b.jsonl", f"easy={tmp_path}/a.jsonl")
    data = {"validation": sets, "max_length": "auto"}
    out = tmp_path / "run"
    fields = {"eval_every": "epoch", "patience": 0, "load_best": False}
    result = run(folder, out, last=11, data=data, profile=2, batch_size=16, **fields)
    log = read_log(out)
    # 40 rows in batches of 16: the second, third and fifth batch take the last row of an epoch.
    found = [line["step"] for line in log if "validation_loss/hard" in line]
    assert found == [0, 3, 5, 8, 10, 11]
    assert all(("validation_loss/easy" in line) == ("validation_loss/hard" in line) for line in log)
    assert result.after.loss == result.after.losses["validation_loss/hard"]
    assert result.saved_step == 11
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "Validation: hard 7 rows, easy 3 rows.",
        "rows of 32 tokens",
        "step 3: validation loss hard ",
        "validation loss easy",
        "tokens/s",
        "peak memory",
    ):
        assert part in said
    assert list((out / "profile").rglob("*.xplane.pb"))
    assert (out / PLOT).stat().st_size > 10_000
    assert all(line["epoch"] == line["step"] * 16 / 40 for line in log if "epoch" in line)


def test_a_length_beyond_the_positions_is_refused_before_the_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_params(*args: Any, **options: Any) -> Any:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(load, "load_params", load_params)
    with pytest.raises(ValueError, match="max_length is 100000, but the model has 64 positions"):
        run(folder, tmp_path / "run", data={"max_length": 100_000})


@pytest.mark.parametrize(
    ("fields", "data", "problem"),
    [
        ({}, {"validation_rows": 0}, "train.load_best is True, but there are no validation rows"),
        ({}, {"max_length": 4096, "pack": True, "train": ("LONG",)}, "but the model has 64 posi"),
    ],
)
def test_what_does_not_fit_ends_before_training(
    folder: Path, tmp_path: Path, fields: Any, data: dict[str, Any], problem: str
) -> None:
    long = {"question": "why? " * 20, "answer": "so"}
    (tmp_path / "long.jsonl").write_text(12 * (json.dumps(long) + "\n"))
    if data.get("train") == ("LONG",):
        data = data | {"train": (str(tmp_path / "long.jsonl"),)}
    with pytest.raises(ValueError, match=problem):
        run(folder, tmp_path / "run", data=data, **fields)
    assert not (tmp_path / "run").exists()


def test_a_token_beyond_the_vocabulary_in_validation_rows(folder: Path, tmp_path: Path) -> None:
    """JAX would read past the embeddings, and the loss would be NaN."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    row = {"question": "<extra>?", "answer": "1"}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    wrong = config(
        folder, tmp_path / "run", data={"validation": (f"own={tmp_path}/validation.jsonl",)}
    )
    wrong = dataclasses.replace(wrong, model=dataclasses.replace(wrong.model, path=str(model)))
    with pytest.raises(ValueError, match=r"token 258 in the validation rows own, .* 258 tokens"):
        train(wrong)


@pytest.mark.slow
def test_two_processes_choose_the_same_step(folder: Path, tmp_path: Path) -> None:
    """A rate that is far too high makes each evaluation worse; then a limit of time."""
    first = config(folder, tmp_path / "first", patience=1, last=8)
    first = dataclasses.replace(first, optim=dataclasses.replace(first.optim, learning_rate=3.0))
    timed = config(folder, tmp_path / "timed", max_minutes=1e-9)
    for name, one in {"first": first, "timed": timed}.items():
        (tmp_path / f"{name}.json").write_text(one.to_json())
    files = [tmp_path / "first.json", tmp_path / "timed.json"]
    train_in_processes(tmp_path, files, processes=2, devices=2)
    ends = []
    for i in range(2):
        lines = (tmp_path / f"process{i}.out").read_text().splitlines()
        ends.append([json.loads(line)["steps"] for line in lines if line.startswith("{")])
    assert ends[0] == ends[1]
    log = read_log(tmp_path / "first")
    losses = [(line["validation_loss"], line["step"]) for line in log if "validation_loss" in line]
    best = min(losses[1:])[1]
    assert resolve_checkpoint(tmp_path / "first", "best") == best
    assert ends[0][0] == losses[-1][1]
    assert ends[0][1] == 0


def test_pandas_reads_the_log(folder: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    out = tmp_path / "run"
    run(folder, out, last=2, patience=0)
    table = pandas.read_json(out / LOG, lines=True)
    assert table["step"].tolist() == [0, 1, 2, 2]
    assert table["loss"].notna().tolist() == [False, True, True, False]
    rates = [name for name in table.columns if name.startswith("learning_rate/")]
    assert rates
    assert np.isfinite(table[rates].iloc[1:3]).all(axis=None)
