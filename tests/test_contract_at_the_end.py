"""A run that ends checks its frozen weights and reads back what it saved; one that hangs ends."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from resume_cases import PROGRAM
from safetensors.numpy import load_file, save_file
from test_distributed import run_config, write_model_and_data

from lorax_ft.config import AdapterConfig, Config, QuantConfig
from lorax_ft.run import loop
from lorax_ft.run.checkpoints import find_checkpoint
from lorax_ft.run.loop import train

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model_and_data(folder)
    return folder


def config(folder: Path, out: Path, *, last: int = 2, **fields: Any) -> Config:
    base = run_config(folder, "lora", last)
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, **{"output": str(out)} | fields),
        eval=dataclasses.replace(base.eval, exact_match_rows=0, samples=0),
    )


WHOLE = AdapterConfig(targets=(), train_whole=("all",))
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora and a norm": {"dora": True, "train_whole": ("norm",)},
    "pissa": {"init": "pissa"},  # a start in a base that is not quantized
    "dora from pissa": {"init": "pissa", "dora": True},
    "pissa on nf4": {"init": "pissa"},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES)
def test_the_saved_adapter_gives_the_trained_logits(
    folder: Path, tmp_path: Path, case: str
) -> None:
    base = config(folder, tmp_path / "run")
    adapter = dataclasses.replace(base.adapter, **CASES[case])
    if "nf4" in case:
        base = dataclasses.replace(base, quant=QuantConfig(format="nf4"))
    result = train(dataclasses.replace(base, adapter=adapter))
    assert result is not None
    said = "frozen weights bitwise unchanged; adapter read again gives the trained model's logits"
    assert result.verified.startswith(said)
    assert result.verified.endswith(" s")


def test_the_saved_model_is_bitwise_the_trained_one(folder: Path, tmp_path: Path) -> None:
    base = dataclasses.replace(config(folder, tmp_path / "run"), adapter=WHOLE)
    result = train(base)
    assert result is not None
    assert "the model read again is bitwise the trained one" in result.verified


def save_damaged(monkeypatch: pytest.MonkeyPatch, file: str, name: str) -> None:
    """Change one tensor of what a run saves."""
    save = loop._save

    def damaged(*args: Any, **options: Any) -> Path:
        saved = save(*args, **options)
        tensors = load_file(saved / file)
        tensors[name] = tensors[name] * 1.5
        save_file(tensors, saved / file, metadata={"format": "pt"})
        return saved

    monkeypatch.setattr(loop, "_save", damaged)


def test_an_adapter_that_is_not_the_trained_one_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_damaged(monkeypatch, "adapter_model.safetensors", name)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="does not give the logits of the trained model: they"):
        train(config(folder, out, last=4))
    assert not (out / "finished.json").exists()
    # The same command saves the adapter again; without the check the damage stays.
    assert train(config(folder, out, last=4, verify=False)) is not None
    monkeypatch.undo()
    assert find_checkpoint(out / "checkpoints").step == 4


def test_a_model_that_is_not_the_trained_one_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_damaged(monkeypatch, "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    base = dataclasses.replace(config(folder, tmp_path / "run"), adapter=WHOLE)
    with pytest.raises(ValueError, match=r"not hold the trained layers/mlp/up_proj/kernel"):
        train(base)


def test_frozen_weights_that_change_are_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_steps = loop.run_steps

    def changing(job: Any, *args: Any) -> Any:
        end = run_steps(job, *args)
        layer = job.frozen["layers"]["mlp"]["up_proj"]
        layer["kernel"] = layer["kernel"].at[1, 3, 5].multiply(1 + 1e-6)
        return end

    monkeypatch.setattr(loop, "run_steps", changing)
    with pytest.raises(ValueError, match=r"1 frozen leaves changed .* layers/mlp/up_proj/kernel"):
        train(config(folder, tmp_path / "run"))


def test_a_step_that_hangs_ends_the_process(folder: Path, tmp_path: Path) -> None:
    """With the place where it hangs and a status that is not 0; the same command goes on."""
    out = tmp_path / "run"
    hung = config(folder, out, last=4, save_every=1, step_timeout=3.0)
    (tmp_path / "config.json").write_text(hung.to_json())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    program = PROGRAM.with_name("hung_run.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(tmp_path / "config.json")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "Timeout (0:00:03)!" in done.stderr
    assert "in hang" in done.stderr
    assert "_record" in done.stderr or "_train_step" in done.stderr
    assert find_checkpoint(out / "checkpoints").step == 2
    result = train(hung)
    assert result is not None
    assert result.steps == 4
