"""An interrupted run is usable: the scripts take a checkpoint of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import SHORT, Main, config

from lorax_ft.config import Config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.adapters import with_norms
from lorax_ft.lowrank.intercept import adapt
from lorax_ft.models.model import LoadedModel
from lorax_ft.run.model_args import ModelArgs, load_with_adapter, locate
from lorax_ft.tree import Tree

TOKENS = jnp.arange(3, 35).reshape(2, 16)

# Inits that change the base, a quantized base, both, fully trained modules, other methods.
RUNS = {
    "lora": [],
    "pissa": [],
    "dora": [],
    "qlora": [],
    "qpissa": [],
    "loftq": [],
    "ia3": [],
    "miss": [],
    "full": [],
    "lora_fa": ["--adapter.train_whole", "embed_tokens", "norm"],
    "olora": ["--adapter.keep_base"],
    "rslora": ["--model.dtype", "bfloat16"],
}


def logits(model: LoadedModel, params: Tree) -> np.ndarray:
    params = with_norms(params, layout=model.layout)
    return np.asarray(adapt(model.apply)({"params": params}, TOKENS), np.float32)


def check_last_checkpoint(name: str, main: Main, tmp_path: Path, capsys: Any) -> None:
    """Runs two steps, and compares the checkpoint of the last one with the saved adapter."""
    run = tmp_path / "run"
    options = [*config(name), *SHORT, *RUNS[name], "--train.steps", "2"]
    options += ["--train.save_every", "1", "--optim.learning_rate", "0.01"]
    assert main(*options, "--train.output", run) == 0
    expected = logits(*load_with_adapter(ModelArgs(run=str(run))))
    model, params = load_with_adapter(ModelArgs(run=str(run), checkpoint="latest"))
    # A PEFT folder has a start as further columns on W, the run has W − s A₀ B₀: float32 rounds the
    # two differently (2e-5 for PiSSA).
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)
    assert "checkpoint of step 2" in capsys.readouterr().err
    earlier = load_with_adapter(ModelArgs(run=str(run), checkpoint="1"))
    assert np.abs(logits(*earlier) - expected).max() > 1e-4

    # Interrupted: there is nothing but the checkpoints, and a base that a changed init left.
    for saved in ("adapter", "model"):
        shutil.rmtree(run / saved, ignore_errors=True)
    with pytest.raises(ValueError, match="--checkpoint latest to use its state at step 2"):
        locate(ModelArgs(run=str(run)))
    out = tmp_path / "out"
    if name == "full":
        save_model(out, params, model)
        exported = load_model(out)
        np.testing.assert_allclose(logits(exported, exported.params), expected, atol=2e-5)
        return
    base = run / "nf4_base"
    save_peft(out, params, model, base=base if base.is_dir() else None)
    # A bfloat16 base rounds W − s A₀ B₀ and W differently.
    np.testing.assert_allclose(logits(model, load_peft(out, model)), expected, atol=1e-3)


# The others are in the second tier.
QUICK = ("pissa", "full")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", QUICK)
def test_the_last_checkpoint_is_what_the_run_saved(
    name: str, main: Main, tmp_path: Path, capsys: Any
) -> None:
    check_last_checkpoint(name, main, tmp_path, capsys)


def test_checkpoints_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--checkpoint goes with --run"):
        ModelArgs(model="base", checkpoint="latest")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(Config().to_json())
    with pytest.raises(ValueError, match="has saved no checkpoint"):
        locate(ModelArgs(run=str(run)))
    with pytest.raises(ValueError, match="has no checkpoint"):
        load_with_adapter(ModelArgs(run=str(run), checkpoint="best"))
