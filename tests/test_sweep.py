"""Sweeps: K adapters in one program are K runs of their own."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from test_distributed import run_config, write_model_and_data

import lorax_ft as lft
from lorax_ft.config import Config, load_config
from lorax_ft.config.python_file import config_file
from lorax_ft.run import setup as run_setup
from lorax_ft.run.program import step_key
from lorax_ft.run.stop_signal import StopSignal
from lorax_ft.schema import is_adapter
from lorax_ft.sweep import setup
from lorax_ft.sweep.agree import check_axes, with_shared_base
from lorax_ft.sweep.axes import Axis, parse_axes, product
from lorax_ft.sweep.halving import groups, rung_ends, survivors
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.rate import find_rate
from lorax_ft.sweep.results import read_lines
from lorax_ft.sweep.run import sweep
from lorax_ft.tree import combine, flatten

pytestmark = pytest.mark.usefixtures("few_devices")

STEPS = 4
# Adam's first updates are the signs of gradients, which rounding flips where one is nearly 0.
EPS = 1e-3


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    write_model_and_data(folder)
    return folder


def changed(config: Config, **fields: Any) -> Config:
    """The config with "section__field" replaced."""
    for name, value in fields.items():
        section, _, field = name.partition("__")
        new = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: new})
    return config


def base_config(folder: Path, **fields: Any) -> Config:
    config = changed(run_config(folder, "lora", STEPS), optim__eps=EPS, train__batch_size=4)
    config = changed(config, mesh__data=1, train__output=str(folder / "out"))
    return changed(config, **fields)


def make_job(config: Config, *entries: str) -> setup.SweepJob:
    axes = parse_axes(entries)
    check_axes(axes)
    lists = [axis for axis in axes if isinstance(axis, Axis)]
    return setup.set_up(with_shared_base(product(config, lists)), setup.load(config))


def curves(job: setup.SweepJob) -> tuple[np.ndarray, Any]:
    """The training losses `[steps, K]`, and the last state."""
    members = list(range(len(job.points)))
    program = job.compile(members, job.state, job.owned)
    state, losses = job.state, []
    for step in range(job.steps):
        batch, _ = job.batch(members, step)
        state, metrics = program.step(state, job.owned, job.base, batch, job.keys)
        losses.append(metrics["loss"])
    return np.array(losses), state


def solo_curve(config: Config, folder: Path) -> tuple[list[float], Any]:
    job = run_setup.set_up(config, folder=folder)
    state, losses = job.state, []
    for step in range(job.steps):
        batch, _ = job.batch(step)
        state, metrics = job.step(state, job.frozen, batch, step_key(config))
        losses.append(float(metrics["loss"]))
    return losses, combine(state.trained, job.frozen)


SOFT_PROMPT = {"prompt__kind": "prompt", "prompt__virtual_tokens": 4}
CASES: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "rates": (
        {"train__neftune_alpha": 5.0, "adapter__dropout": 0.1},
        ["optim.learning_rate=1e-3,1e-2", "optim.lora_plus_ratio=1,4"],
    ),
    "seeds, sharded": ({"mesh__fsdp": 4}, ["train.seed=0,1", "adapter.alpha=4,16"]),
    "ranks and inits": (
        {},
        ["adapter.rank=2,6", "adapter.init=kaiming,pissa", "adapter.scaling=rank_stabilized"],
    ),
    "targets": ({}, ["adapter.targets=q_proj v_proj,all-linear", "adapter.layers=,1"]),
    "dora": ({"adapter__dora": True}, ["optim.magnitude_ratio=0.5,2", "train.seed=3"]),
    "qlora": ({"quant__format": "nf4", "data__pack": True}, ["adapter.rank=2,4"]),
    "miss": ({"adapter__method": "miss", "train__microbatches": 2}, ["adapter.rank=2,4"]),
    "pissa on nf4": (
        {"quant__format": "nf4", "adapter__init": "pissa"},
        ["optim.learning_rate=1e-3,1e-2"],
    ),
    "prompt tuning": (
        {**SOFT_PROMPT, "adapter__targets": ()},
        ["prompt.init=random", "train.seed=0,1"],
    ),
    "p-tuning": (
        {**SOFT_PROMPT, "prompt__encoder": "lstm", "adapter__targets": (), "data__pack": True},
        ["optim.learning_rate=1e-3,1e-2"],
    ),
    "prefix tuning beside lora": (
        {**SOFT_PROMPT, "prompt__kind": "prefix", "prompt__encoder": "mlp"},
        ["optim.prompt_ratio=1,10", "adapter.rank=2,4"],
    ),
    "p-tuning v2, sharded": (
        {**SOFT_PROMPT, "prompt__kind": "prefix", "adapter__targets": (), "mesh__fsdp": 4},
        ["prompt.init=vocabulary,random", "train.seed=0,1"],
    ),
    "bottleneck": ({"adapter__method": "bottleneck"}, ["adapter.rank=2,4"]),
    "alora": ({"adapter__invocation": "<|im_start|>assistant"}, ["adapter.rank=2,4"]),
    "tokens": (
        {"data__new_tokens": ("+1?",), "adapter__trainable_tokens": ("<|im_end|>",)},
        ["optim.learning_rate=1e-3,1e-2", "train.seed=0,1"],
    ),
    "tokens alone": (
        {"adapter__trainable_tokens": ("<|im_end|>", 5), "adapter__targets": ()},
        ["optim.learning_rate=1e-3,1e-2"],
    ),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES)
def test_each_curve_is_that_of_a_run_of_its_own(folder: Path, tmp_path: Path, case: str) -> None:
    fields, entries = CASES[case]
    if fields.get("train__microbatches"):
        fields = fields | {"train__batch_size": 8}
    job = make_job(base_config(folder, **fields), *entries)
    together, state = curves(job)
    # Points that trained alike would hide one that got another's settings.
    assert len({tuple(curve) for curve in together.T}) == len(job.points)
    for k, point in enumerate(job.points):
        alone, params = solo_curve(point.config, tmp_path)
        np.testing.assert_allclose(together[:, k], alone, rtol=1e-5, atol=1e-5)
        mine = flatten(job.params(state, k))
        theirs = flatten(params)
        assert mine.keys() == theirs.keys()
        for path, leaf in theirs.items():
            if is_adapter(path):
                np.testing.assert_allclose(mine[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_the_program_holds_no_copy_of_the_base_for_each_adapter(folder: Path) -> None:
    count = 7  # no size of the model
    config = base_config(folder, data__max_length=44, adapter__rank=3)
    job = make_job(config, f"optim.learning_rate=1e-4..1e-2:{count}")
    program = job.compile(list(range(count)), job.state, job.owned)
    shapes = set(re.findall(r"f32\[([\d,]+)\]", program.step.as_text()))
    for path, leaf in flatten(job.base).items():
        size = ",".join(map(str, leaf.shape))
        stacked = {f"{count},{size}"}
        if path.startswith("layers/"):
            layers, *rest = leaf.shape
            inner = ",".join(map(str, rest))
            stacked |= {f"{layers},{count},{inner}", f"{count},{inner}"}
        if leaf.ndim >= 2 and "norm" not in path:
            assert size in shapes, path
            assert not stacked & shapes, path
    # Temporaries of each adapter are those of a run of its own.
    alone = make_job(config, "optim.learning_rate=1e-3")
    solo = alone.compile([0], alone.state, alone.owned)
    sizes = [its.step.memory_analysis().temp_size_in_bytes for its in (solo, program)]
    assert sizes[1] < 1.25 * count * sizes[0]


def test_base_matrices_meet_the_rows_of_all_adapters_at_once(folder: Path) -> None:
    job = make_job(base_config(folder), "optim.learning_rate=1e-4..1e-2:8")
    members = list(range(8))
    text = job.compile(members, job.state, job.owned).step.as_text()
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    rows = 8 * 4 * 48  # adapters, rows of each, tokens
    layers = job.model.config
    assert f"{rows},{layers.mlp_width}" in products
    # A has an axis of adapters: x A is a product for each.
    assert f"8,{4 * 48},4" in products


def run_sweep(config: Config, *entries: str, **options: Any) -> Any:
    return sweep(config, entries, **options)


def results_of(folder: Path) -> list[dict[str, Any]]:
    return read_lines(Path(f"{folder}-sweep") / "results.jsonl")


def test_a_sweep_leaves_results_and_the_best_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    config = base_config(folder, train__output=str(out), train__eval_every=2)
    result = run_sweep(config, "optim.learning_rate=1e-3,3e-2", "train.seed=0,1", parallel=3)
    assert result.steps == STEPS
    lines = results_of(out)
    assert len(lines) == 4 * 3  # points, evaluations
    best = min((line for line in lines if line["step"] == STEPS), key=_loss)
    assert result.loss == best["validation_loss"]
    assert result.best.settings["optim.learning_rate"] == best["optim.learning_rate"]
    # The best point as a config file, and its adapter on the base as it was.
    made = load_config(result.folder / "best.py")
    assert made == result.best.config
    model = lft.load_model(config.model.path)
    params = lft.load_peft(result.folder / "adapter", model)
    alone, trained = solo_curve(made, tmp_path)
    for path, leaf in flatten(trained).items():
        if path.endswith(("lora_a", "lora_b")):
            np.testing.assert_allclose(flatten(params)[path], leaf, atol=1e-4)
    losses = read_lines(result.folder / "losses.jsonl")
    assert [line["points"] for line in losses] == [[0, 1]] * STEPS + [[2, 3]] * STEPS
    k = result.best.number
    mine = [line["loss"][line["points"].index(k)] for line in losses if k in line["points"]]
    np.testing.assert_allclose(mine, alone, rtol=1e-5)
    assert (result.folder / "sweep.png").stat().st_size > 10_000
    assert "best" in capsys.readouterr().out


def _loss(line: dict[str, Any]) -> float:
    return float(line["validation_loss"])


def test_a_sweep_saves_the_best_soft_prompt(folder: Path, tmp_path: Path) -> None:
    """Without targets it is no adapter of a kernel, and no model that trained in full."""
    config = base_config(folder, **SOFT_PROMPT, adapter__targets=(), train__steps=2)
    config = changed(config, train__output=str(tmp_path / "run"))
    result = run_sweep(config, "optim.learning_rate=1e-3,3e-2")
    assert load_config(result.folder / "best.py") == result.best.config
    model = lft.load_model(config.model.path)
    params = lft.load_peft(result.folder / "adapter", model)
    assert params["soft_prompt"]["prompt_embedding"].shape == (4, model.config.width)


def test_a_sweep_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="a sweep runs in one process, and here are 2"):
        sweep(Config(), ["optim.learning_rate=1e-4,1e-3"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("budget", ["full", "halve"])
def test_an_interrupted_sweep_comes_to_the_same_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: Any
) -> None:
    entries = ("optim.learning_rate=1e-3,3e-3,1e-2,3e-2",)
    options = {"parallel": 3, "budget": budget}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = base_config(folder, train__steps=6, train__eval_every=2)
    run_sweep(changed(config, train__output=str(whole)), *entries, **options)

    # Updates of adapters after which a signal comes.
    for number in (3, 9, 13):
        fields = {"train__output": str(stopped)}
        with monkeypatch.context() as patch:
            patch.setattr(StopSignal, "requested", lambda self, n, number=number: n >= number)
            with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
                run_sweep(changed(config, **fields), *entries, **options)
    run_sweep(changed(config, **fields), *entries, **options)
    assert results_of(stopped) == results_of(whole)
    for name in ("losses.jsonl", "adapter/adapter_model.safetensors"):
        ours, theirs = (Path(f"{out}-sweep") / name for out in (stopped, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    if budget == "halve":
        last = {line["point"] for line in results_of(whole) if line["step"] == 6}
        assert len(last) == 1


def test_one_adapter_that_diverges_does_not_end_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = base_config(folder, train__output=str(tmp_path / "run"), optim__optimizer="sgd")
    config = changed(config, optim__clip_norm=0.0, optim__schedule="constant")
    result = run_sweep(config, "optim.learning_rate=1e-2,1e30", "optim.weight_decay=0")
    assert math.isinf(result.losses["optim.learning_rate 1e+30, optim.weight_decay 0"])
    assert result.best.settings["optim.learning_rate"] == 1e-2
    lines = results_of(tmp_path / "run")
    assert [line["point"] for line in lines if "diverged" in line] == [1]
    assert "diverged at step" in capsys.readouterr().out
    alone, _ = solo_curve(result.best.config, tmp_path)
    losses = [line["loss"][0] for line in read_lines(result.folder / "losses.jsonl")]
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_a_sweep_whose_points_all_diverge_is_an_error(folder: Path, tmp_path: Path) -> None:
    """For a sweep; a search beyond the best rate goes on with what it has (`run_points`)."""
    config = base_config(folder, train__output=str(tmp_path / "run"), optim__optimizer="sgd")
    config = changed(config, optim__clip_norm=0.0, optim__schedule="constant")
    entry = "optim.learning_rate=1e30,1e31"
    points = product(config, [Axis(field="optim.learning_rate", values=(1e30, 1e31))])
    job = setup.set_up(points, setup.load(config))
    swept = run_points(job, Console(quiet=True), folder=None, parallel=2)
    assert set(swept.results.diverged) == {0, 1}
    with pytest.raises(ValueError, match="all points of the sweep diverged"):
        run_sweep(config, entry)


MISTAKES = {
    "optim.lerning_rate=1e-3": "did you mean optim.learning_rate?",
    "lr=1e-3": "use --optim.learning_rate for --lr",
    "optim.learning_rate": 'is not of the form "section.field=value,value"',
    "optim.learning_rate=fast,1": "--optim.learning_rate is 'fast'; it takes",
    "adapter.init=kaimin": "--adapter.init is 'kaimin'; it takes",
    "adapter.rank=0,4": "adapter.rank is 0; it must be above 0",
    "adapter.rank=4,4": "has the value 4 twice",
    "optim.learning_rate=1e-2..1e-3": "the second number must be the larger",
    "optim.learning_rate=1e-3..1e-2": "is a range; give --trials N",
    "adapter.dropout=0,0.1": "adapter.dropout has the values 0, 0.1, but it is part of",
    "optim.schedule=cosine,linear": "run a sweep for each value",
    "data.max_length=16,32": "data.max_length has the values 16, 32",
    "adapter.dora=true,false": "decides which leaves an adapter has",
    "prompt.kind=prompt,prefix": "decides which leaves an adapter has",
    "prompt.virtual_tokens=4,8": "decides which leaves an adapter has",
    "adapter.invocation=a,b": "decides which leaves an adapter has",
    "adapter.trainable_tokens=1,2": "decides which leaves an adapter has",
}


@pytest.mark.parametrize("entry", MISTAKES)
def test_what_cannot_share_a_program_is_an_error(folder: Path, entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(MISTAKES[entry])) as caught:
        run_sweep(base_config(folder), entry)
    assert "\n" not in str(caught.value)


def test_options_that_a_sweep_does_not_follow_are_errors(folder: Path, tmp_path: Path) -> None:
    rates = "optim.learning_rate=1e-3,1e-2"
    best = changed(base_config(folder), train__eval_every=1)
    with pytest.raises(ValueError, match=r"train\.load_best is True, but a sweep"):
        run_sweep(changed(best, train__load_best=True), rates)
    with pytest.raises(ValueError, match="no sweep to resume"):
        run_sweep(base_config(folder, train__resume="always"), rates)
    with pytest.raises(ValueError, match="pissa changes the quantized base"):
        run_sweep(base_config(folder, adapter__init="pissa", quant__format="nf4"), "train.seed=0,1")
    with pytest.raises(ValueError, match="loftq changes the quantized base"):
        run_sweep(base_config(folder, adapter__init="loftq", quant__format="nf4"), "train.seed=0,1")
    (tmp_path / "run-sweep").mkdir()
    (tmp_path / "run-sweep" / "notes.txt").write_text("a person's")
    with pytest.raises(ValueError, match="holds no sweep"):
        run_sweep(base_config(folder, train__output=str(tmp_path / "run")), rates)


def test_axes_are_values_of_their_fields() -> None:
    found = parse_axes(
        [
            "optim.learning_rate=1e-4..1e-2:3",
            "train.seed=0..3:4",
            "adapter.rank=1..64:7",
            "adapter.targets=q_proj v_proj,all-linear",
            "adapter.svd_iterations=None,4",
            "adapter.dora=true",
        ]
    )
    assert [axis.values for axis in found if isinstance(axis, Axis)] == [
        (1e-4, 1e-3, 1e-2),
        (0, 1, 2, 3),
        (1, 2, 4, 8, 16, 32, 64),
        (("q_proj", "v_proj"), ("all-linear",)),
        (None, 4),
        (True,),
    ]


def test_halving_keeps_settings_and_groups_are_of_one_size() -> None:
    assert rung_ends("halve", settings=8, steps=100) == [25, 50, 75, 100]
    assert rung_ends("halve", settings=3, steps=2) == [1, 2]
    assert rung_ends("halve", settings=1, steps=10) == [10]
    assert survivors([[4], [0], [2]]) == [0, 4]
    assert groups(list(range(9)), 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_config_file_holds_any_config(tmp_path: Path) -> None:
    files = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
    for file in files:
        config = changed(load_config(file), eval__answer_pattern="#\"'\\ (\\d+)\n")
        written = tmp_path / f"{file.stem}.py"
        written.write_text(config_file(config, docstring="A config."))
        assert load_config(written) == config


def test_a_rate_is_found(folder: Path) -> None:
    config = base_config(folder, train__steps=25, optim__learning_rate=1e-3)
    rate, cost = find_rate(config)
    assert cost.steps == 20
    assert rate == min(cost.losses, key=lambda its: cost.losses[its])
    assert rate > 1e-3
    # More rates are tried where the best one is at the edge.
    highest = 1e-1
    assert len(cost.losses) >= 8
    assert rate < highest or len(cost.losses) > 8
    json.dumps(dataclasses.asdict(cost))


def test_optuna_asks_and_a_resumed_sweep_asks_again(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    entries = ("optim.learning_rate=1e-4..1e-1", "adapter.rank=2,4", "train.seed=0,1")
    config = base_config(folder, train__output=str(tmp_path / "run"))
    result = run_sweep(config, *entries, trials=6, parallel=4)
    lines = results_of(tmp_path / "run")
    last = [line for line in lines if line["step"] == STEPS]
    assert len(last) == 12
    assert len({line["optim.learning_rate"] for line in last}) == 6
    # As if it had been killed in its last generation.
    kept = [line for line in lines if line["point"] < 8]
    file = result.folder / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(result.folder / "checkpoints" / "2")
    again = run_sweep(changed(config, train__resume="always"), *entries, trials=6, parallel=4)
    assert results_of(tmp_path / "run") == lines
    assert again.best == result.best
