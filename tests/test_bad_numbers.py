"""Numbers that go wrong: losses, gradients, batches without labels, weights, adapter folders.

docs/RELIABILITY.md lists the faults.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resume_cases import outcome
from safetensors.numpy import load_file, save_file
from test_distributed import run_config, write_model_and_data

import lorax_ft as lft
from lorax_ft.config import Config
from lorax_ft.data.chat import Sample
from lorax_ft.data.packing import collate
from lorax_ft.interop.lazy_tensor import all_finite
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft
from lorax_ft.models.model import Model
from lorax_ft.run import program, steps
from lorax_ft.run.checkpoints import find_checkpoint
from lorax_ft.run.diagnosis import diagnose, find_spikes
from lorax_ft.run.log import read_log
from lorax_ft.run.loop import train
from lorax_ft.run.standing import Standing
from lorax_ft.training.losses import supervised_loss
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.step import TrainState, make_train_step
from lorax_ft.tree import flatten

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model_and_data(folder)
    return folder


def config(folder: Path, out: Path, *, last: int = 5, **fields: Any) -> Config:
    base = run_config(folder, "lora", last)
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, **{"output": str(out), "save_every": 1} | fields),
        eval=dataclasses.replace(base.eval, exact_match_rows=0, samples=0),
    )


def bad_steps(monkeypatch: pytest.MonkeyPatch, *bad: int, value: float = np.nan) -> None:
    """Make the gradients of these steps (from 1) not finite."""
    make = program.make_train_step

    def with_bad_loss(loss: Any, tx: Any, *, layout: Any) -> Any:
        def step(state: Any, frozen: Any, batch: Any, key: Any) -> Any:
            is_bad = jnp.isin(state.step + 1, jnp.array(bad))

            def damaged(*args: Any) -> Any:
                total, weight, metrics = loss(*args)
                return total * jnp.where(is_bad, value, 1.0), weight, metrics

            return make(damaged, tx, layout=layout)(state, frozen, batch, key)

        return step

    monkeypatch.setattr(program, "make_train_step", with_bad_loss)


# The step.


Stepped = tuple[Any, TrainState, Any]
"""A jitted step, its state and its frozen leaves."""


@pytest.fixture(scope="module")
def stepped(model: Model) -> Stepped:
    with jax.numpy_dtype_promotion("standard"):
        return step_of(model)


def step_of(model: Model) -> Stepped:
    config = lft.AdapterConfig(rank=2)
    trained, frozen = lft.partition(
        lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(1))
    )
    optim = lft.OptimConfig(learning_rate=1e-2, weight_decay=0.1)
    tx = make_optimizer(optim, steps=9)
    loss = supervised_loss(model, packed=False)

    def scaled(params: Any, batch: Any, key: Any) -> Any:
        value, weight, metrics = loss(params, batch, key)
        factor = batch["factor"][0, 0]  # NaN, infinite or 1
        return jnp.where(factor == 1, value, value * factor), weight, metrics

    step = jax.jit(make_train_step(scaled, tx, layout=model.layout))
    state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    # Moments that are not 0, so that a step with gradients of 0 would move the leaves.
    state, _ = step(state, frozen, batch_of(2), jax.random.key(0))
    return step, state, frozen


def batch_of(*factors: float, labeled: tuple[bool, ...] = ()) -> dict[str, np.ndarray]:
    """A microbatch for each factor; those that are not `labeled` have no labels."""
    rng = np.random.default_rng(0)
    parts = []
    for i, factor in enumerate(factors):
        labels = np.full(8, labeled[i] if labeled else True)
        rows = [[Sample(rng.integers(0, 97, 8).astype(np.int32), labels)] for _ in range(2)]
        part = collate(rows, 8)
        part["factor"] = np.full((2, 8), factor, np.float32)
        parts.append(part)
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("factors", [(np.nan,), (np.inf,), (-np.inf, 1.0), (1.0, 1e38)])
def test_a_step_that_is_not_finite_changes_nothing(stepped: Stepped, factors: Any) -> None:
    """Neither leaves nor moments nor counts, bitwise; 1e38 overflows in the gradients alone."""
    step, state, frozen = stepped
    after, metrics = step(state, frozen, batch_of(*factors), jax.random.key(0))
    assert bits((after.trained, after.opt_state)) == bits((state.trained, state.opt_state))
    assert (int(after.step), float(metrics["skipped"])) == (int(state.step) + 1, 1)


def test_gradients_may_be_bad_where_the_loss_is_not(stepped: Stepped) -> None:
    step, state, frozen = stepped
    after, metrics = step(state, frozen, batch_of(3e36), jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert bits(after.opt_state) == bits(state.opt_state)


def test_a_batch_without_labels_changes_nothing(stepped: Stepped) -> None:
    """0 / 0 would be NaN; momentum and decay would move the leaves."""
    step, state, frozen = stepped
    batch = batch_of(1.0, labeled=(False,))
    after, metrics = step(state, frozen, batch, jax.random.key(0))
    assert bits((after.trained, after.opt_state)) == bits((state.trained, state.opt_state))
    assert {name: float(metrics[name]) for name in ("loss", "weight", "grad_norm", "skipped")} == {
        "loss": 0,
        "weight": 0,
        "grad_norm": 0,
        "skipped": 1,
    }


def test_a_microbatch_without_labels_counts_for_nothing(stepped: Stepped) -> None:
    """Each microbatch counts by its labels: two of them, one without any, are the other alone."""
    step, state, frozen = stepped
    both = batch_of(1.0, 1.0, labeled=(True, False))
    alone = {name: values[:1] for name, values in both.items()}
    got, metrics = step(state, frozen, both, jax.random.key(0))
    expected, expected_metrics = step(state, frozen, alone, jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    assert float(metrics["skipped"]) == 0
    for path, leaf in flatten(expected.trained).items():
        np.testing.assert_allclose(flatten(got.trained)[path], leaf, rtol=1e-5, atol=1e-7)


def test_bfloat16_overflows(decoder: Callable[..., Model]) -> None:
    """A float32 factor between bfloat16's largest number and its own is infinite in bfloat16."""
    step, state, frozen = step_of(decoder(dtype="bfloat16"))
    trained = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3.4e38), state.trained)
    state = state._replace(trained=trained)
    after, metrics = step(state, frozen, batch_of(1.0), jax.random.key(0))
    assert float(metrics["skipped"]) == 1
    assert bits((after.trained, after.opt_state)) == bits((state.trained, state.opt_state))


def test_a_sample_of_no_tokens() -> None:
    empty = Sample(np.zeros(0, np.int32), np.zeros(0, np.bool_))
    one = Sample(np.array([5, 6, 7], np.int32), np.ones(3, np.bool_))
    batch = collate([[empty, one, empty], [empty]], 4)
    assert batch["tokens"].tolist() == [[5, 6, 7, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[6, 7, 0, 0], [0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


# The run.


def test_skipped_steps_are_shown_logged_and_counted_and_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bad_steps(monkeypatch, 1, 3)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(config(folder, whole, keep_checkpoints=9))
    assert result is not None
    assert result.skipped == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "step 1 is skipped: the loss is nan, the gradient norm nan" in said
    assert "2 skipped" in said
    assert "skipped 2 steps with a loss not finite" in said
    lines = [line for line in read_log(whole) if "loss" in line]
    assert [line["step"] for line in lines if line.get("skipped")] == [1, 3]
    assert [line["loss"] is None for line in lines] == [True, False, True, False, False]
    # Bitwise as before where it goes on after a skipped step.
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "adapter")
    (stopped / "finished.json").unlink()
    for step in (4, 5):
        shutil.rmtree(stopped / f"checkpoints/{step}")
    again = train(config(folder, stopped, keep_checkpoints=9))
    assert again is not None
    assert again.skipped == 2
    assert outcome(stopped) == outcome(whole)


def test_too_many_skipped_steps_end_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_steps(monkeypatch, 3, 4, value=np.inf)
    out = tmp_path / "run"
    said = (
        r"2 steps of the last 5 were skipped, the last one at step 4, .* \(train\.max_skipped 1\); "
        r"the checkpoint of step 5 has the weights without them; begin anew .* lower "
        r"optim\.learning_rate \(it was 0\.01\)$"
    )
    with pytest.raises(ValueError, match=said):
        train(config(folder, out, last=9, max_skipped=1, save_every=0))
    assert find_checkpoint(out / "checkpoints") == (5, {})
    assert not (out / "finished.json").exists()


def test_no_checkpoint_has_weights_that_are_not_finite(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of a learning rate that no float holds times an update."""
    monkeypatch.setattr(steps, "CHECKED_UPDATES", 0)
    bad_steps(monkeypatch, 1, value=1e4)  # finite
    base = config(folder, tmp_path / "run", last=1)
    optim = dataclasses.replace(base.optim, learning_rate=1e38, clip_norm=0.0, optimizer="sgd")
    with pytest.raises(ValueError, match="weights at step 1 are no longer finite"):
        train(dataclasses.replace(base, optim=optim))
    assert find_checkpoint(tmp_path / "run/checkpoints") == (None, {})


def test_skips_are_counted_within_a_window() -> None:
    standing = Standing()
    for step in (1, 2, 150, 249, 250):
        standing = standing.skips(step)
    assert (standing.skipped, standing.skipped_lately) == (5, (249, 250))
    read = Standing(**json.loads(json.dumps(dataclasses.asdict(standing))))
    assert read.skips(300) == standing.skips(300)


# Spikes.


def test_spikes_of_the_loss_are_found_and_reported() -> None:
    rng = np.random.default_rng(0)
    losses = np.linspace(3, 1, 200) + rng.normal(0, 0.05, 200)
    losses[[5, 120]] = 9
    lines: list[dict[str, Any]] = [
        {"step": i + 1, "loss": float(loss), "grad_norm": 1.0} for i, loss in enumerate(losses)
    ]
    (spike,) = find_spikes(lines)  # at step 6 there is too little to compare with
    assert (spike.step, spike.loss) == (121, 9)
    assert spike.usual == pytest.approx(2.0, abs=0.3)
    (warning,) = diagnose(lines, before=None, after=None, learning_rate=1e-3)
    assert "spiked once, the most at step 121, from 2." in warning
    losses[120] = 2.2
    assert not find_spikes([{"step": 1, "loss": float(loss)} for loss in losses])


def test_a_spike_is_shown_while_the_run_trains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("lorax_ft.run.diagnosis.SPIKE_FEWEST", 2)
    bad_steps(monkeypatch, 4, value=40.0)
    assert train(config(folder, tmp_path / "run", save_every=0, verify=False)) is not None
    assert "step 4: the loss rose to " in " ".join(capsys.readouterr().out.split())


# Weights.


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_numbers_that_are_not_finite_are_found(value: float, dtype: Any) -> None:
    largest = jnp.finfo(dtype).max
    array = np.array([[0.0, -0.0, 1.5], [float(largest), -float(largest), 3]]).astype(dtype)
    assert all_finite(array)
    array[1, 2] = value
    assert not all_finite(array)
    assert not all_finite(array.T)
    assert all_finite(array[:1])
    assert all_finite(array[:0])


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int32, np.int64])
def test_integers_are_always_finite(dtype: Any) -> None:
    """A folder of SHiRA holds the positions of its weights."""
    assert all_finite(np.array([0, 1, 0]).astype(dtype))


def changed(file: Path, name: str, value: float) -> None:
    """Write a value into the middle of a tensor of a file."""
    tensors = load_file(file)
    tensor = tensors[name].copy()
    tensor.reshape(-1)[tensor.size // 2] = value
    save_file(tensors | {name: tensor}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "dtype", "quant"),
    [
        (np.nan, "float32", None),
        (-np.inf, "bfloat16", None),
        (3.4e38, "bfloat16", None),  # finite in the file
        (np.nan, "float32", "nf4"),
    ],
)
def test_bad_weights_are_named(
    folder: Path, tmp_path: Path, value: float, dtype: Any, quant: Any
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    changed(tmp_path / "model/model.safetensors", name, value)
    options = lft.QuantConfig(format=quant) if quant else None
    with pytest.raises(ValueError, match=rf"model: {name} holds values that are not finite"):
        load_model(tmp_path / "model", dtype=dtype, quant=options)


def test_bad_scales_of_a_quantized_checkpoint_are_named(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    changed(tmp_path / "model/model.safetensors", f"{name}.nested_absmax", np.nan)
    with pytest.raises(ValueError, match=rf"{name}: its absmax holds values that are not finite"):
        load_model(tmp_path / "model")


def test_a_bad_adapter_folder_is_named(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder / "model")
    adapter = lft.AdapterConfig(rank=2)
    params = lft.add_adapters(model.params, adapter, layout=model.layout, key=jax.random.key(0))
    lft.save_peft(tmp_path / "adapter", params, model, config=adapter)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    name = sorted(load_file(weights))[3]
    changed(weights, name, np.inf)
    with pytest.raises(ValueError, match=rf"adapter: {name} holds values that are not finite"):
        load_peft(tmp_path / "adapter", model)
