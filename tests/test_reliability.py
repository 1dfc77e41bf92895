"""A run survives: kills, signals, damaged checkpoints, exchanged inputs, a second run.

docs/RELIABILITY.md lists the faults. More kills are in tests/slow/test_kills.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from resume_cases import outcome, run_killed
from safetensors.numpy import load_file, save_file
from test_distributed import run_config, write_model_and_data

from lorax_ft.cli import one_line_errors
from lorax_ft.config import Config
from lorax_ft.run import setup, steps
from lorax_ft.run.checkpoints import Checkpoints, find_checkpoint, resolve_checkpoint
from lorax_ft.run.checksums import LATER
from lorax_ft.run.fingerprint import weights_checksums
from lorax_ft.run.folder import check_folder, make_folder
from lorax_ft.run.lock import locked
from lorax_ft.run.log import Log, read_log
from lorax_ft.run.loop import train
from lorax_ft.run.stop_signal import StopSignal


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model_and_data(folder)
    return folder


def config(folder: Path, out: Path, *, last: int = 4, **fields: Any) -> Config:
    base = run_config(folder, "lora", last)
    shared = {"output": str(out), "save_every": 1, "eval_every": 2, "load_best": True}
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, **shared | fields),
        eval=dataclasses.replace(base.eval, exact_match_rows=0, samples=0),
    )


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing interrupted, with the checkpoints of all steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with jax.numpy_dtype_promotion("standard"):
        assert train(config(folder, out, keep_checkpoints=9)) is not None
    return out


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same run, as if it had been killed after the checkpoint of step 3."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints/4")
    shutil.rmtree(out / "adapter")
    (out / "finished.json").unlink()
    return out


MOMENTS = (  # and more of them in tests/slow/test_kills.py
    "checkpoints/3 9",
    ".adapter- 4",  # the adapter is written
)


@pytest.mark.sampled(2)
def test_a_killed_run_ends_as_one_that_never_was(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines = run_killed(config(folder, out), ("never", *MOMENTS, "never"), tmp_path / "config.json")
    assert [line["killed"] for line in lines] == [False, *(True for _ in MOMENTS), False]
    expected, found = outcome(tmp_path / "run0"), outcome(tmp_path / "run1")
    assert found == expected
    assert not expected["hidden"]


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_byte_flipped_in_any_file_of_a_checkpoint_is_noticed(stopped: Path) -> None:
    checkpoints = stopped / "checkpoints"
    files = files_of(checkpoints / "3")
    assert len(files) > 20
    for file in files:
        original = file.read_bytes()
        flip(file)
        found = find_checkpoint(checkpoints)
        # orbax writes two files last, and nothing is read from them (the next test).
        if file.name in LATER and file.parent.name == "3":
            assert found == (3, {})
        else:
            assert found.step == 2, file
            assert list(found.damaged) == [3]
        file.write_bytes(original)
    assert find_checkpoint(checkpoints) == (3, {})
    for missing in ("checksums.json", files[0].relative_to(checkpoints / "3")):
        (checkpoints / "3" / missing).unlink()
        assert find_checkpoint(checkpoints).step == 2


@pytest.mark.parametrize("damage", ["flipped", "metadata"])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    folder: Path, whole: Path, stopped: Path, damage: str
) -> None:
    newest = stopped / "checkpoints/3"
    arrays = max(files_of(newest / "state"), key=lambda file: file.stat().st_size)
    expected: Any = pytest.warns(UserWarning, match="step 3 .* is damaged .* over for step 2")
    if damage == "flipped":
        flip(arrays)
    else:
        for name in LATER:
            flip(newest / name)
        expected = contextlib.nullcontext()
    with expected:
        train(config(folder, stopped, keep_checkpoints=9))
    assert outcome(stopped) == outcome(whole)


def test_where_all_checkpoints_are_damaged_nothing_is_deleted(folder: Path, stopped: Path) -> None:
    for step in (1, 2, 3):
        flip(stopped / f"checkpoints/{step}/standing/metadata")
    with pytest.raises(ValueError, match=r"are damaged .*standing/metadata has another checksum"):
        train(config(folder, stopped))
    assert len(list((stopped / "checkpoints").iterdir())) == 3
    with pytest.raises(ValueError, match="no intact checkpoint"):
        resolve_checkpoint(stopped, "latest")


def test_a_damaged_checkpoint_is_not_used_by_the_other_scripts(whole: Path, stopped: Path) -> None:
    flip(stopped / "checkpoints/3/owned/manifest.ocdbt")
    with pytest.warns(UserWarning, match="passed over for step 2"):
        assert resolve_checkpoint(stopped, "latest") == 2
    with pytest.raises(ValueError, match=r"step 3 is damaged \(owned/manifest.ocdbt has another"):
        resolve_checkpoint(stopped, 3)


def test_a_damaged_best_checkpoint_is_chosen_anew(folder: Path, stopped: Path) -> None:
    checkpoints = Checkpoints(stopped / "checkpoints", keep=9)
    assert checkpoints.standing(3, keeps_best=True).best_step == 2
    flip(stopped / "checkpoints/2/state/_METADATA")
    with pytest.warns(UserWarning, match="best step 2 .* is damaged; .* anew from step 3"):
        assert checkpoints.standing(3, keeps_best=True).best_step is None


def test_exchanged_data_and_weights_are_noticed(folder: Path, stopped: Path) -> None:
    """The files have the same size and names; one character, or one bit of a weight, differs."""
    inputs = stopped.parent / "inputs"
    shutil.copytree(folder, inputs)
    here = config(inputs, stopped)
    settings = dataclasses.replace(here, train=dataclasses.replace(here.train, resume="never"))
    (stopped / "config.json").write_text(settings.to_json())
    data = inputs / "data.jsonl"
    original = data.read_text()
    data.write_text(original.replace('"7+1?"', '"7+2?"'))
    with pytest.raises(ValueError, match=r"training rows are not those .* same data\.train"):
        train(here)
    data.write_text(original)
    weights = inputs / "model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"].view(np.uint32)[3, 5] ^= 1
    save_file(tensors, weights, metadata={"format": "pt"})
    named = r"weights of layers/mlp/up_proj/kernel are not those .* the same model\.path"
    with pytest.raises(ValueError, match=named):
        train(here)
    # Refused, and not touched.
    assert find_checkpoint(stopped / "checkpoints") == (3, {})
    assert len(read_log(stopped)) > 4


def test_checksums_of_weights_do_not_depend_on_the_mesh() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 16, 8)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    place = jax.NamedSharding(mesh, jax.P(None, "a", "b"))
    found = []
    for array in (jax.numpy.asarray(kernel), jax.device_put(kernel, place)):
        found.append(weights_checksums({"layer": {"kernel": array}}))
    swapped = kernel.copy()
    swapped[0, [0, 1]] = kernel[0, [1, 0]]
    found.append(weights_checksums({"layer": {"kernel": jax.numpy.asarray(swapped)}}))
    assert found[0] == found[1]
    assert found[2] != found[0]


def test_a_second_run_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep/run"
    with locked(out):
        with pytest.raises(ValueError, match=r"another run \(process \d+ on .*\) writes to"):
            train(config(folder, out))
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
    # What a killed run leaves is a file, and no lock.
    out.mkdir(parents=True)
    (out / ".lock").write_text("process 1 on another host")
    with locked(out):
        pass
    assert not list(out.iterdir())


def test_a_run_that_has_ended_says_so(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train(config(folder, out)) is None
    assert "has ended, and its results are in place" in " ".join(capsys.readouterr().out.split())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # With more steps it goes on.
    start = check_folder(config(folder, out, last=5))
    assert (start.step, start.finished) == (4, False)


def test_what_resume_refuses(folder: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.seed is 1, but the run to resume in .* had 0"):
        check_folder(config(folder, stopped, seed=1))
    with pytest.raises(ValueError, match="already holds a run"):
        check_folder(config(folder, stopped, resume="never"))
    with pytest.raises(ValueError, match="there is no run to resume"):
        check_folder(config(folder, tmp_path / "new", resume="always"))
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        check_folder(config(folder, stopped, resume="always"))
    # The same command begins a run again that was killed before its first checkpoint.
    assert check_folder(config(folder, stopped)).step is None
    # The flag of older configs.
    assert Config.from_json(json.dumps({"train": {"resume": True}})).train.resume == "always"
    assert Config.from_json(json.dumps({"train": {"resume": False}})).train.resume == "auto"


@pytest.mark.parametrize("lost", ["data.jsonl", "model/model.safetensors", "model/tokenizer.json"])
def test_a_file_vanishes_while_the_run_loads(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: str,
) -> None:
    """Between the look at the data and its use: one line, and no output folder."""
    inputs = tmp_path / "inputs"
    shutil.copytree(folder, inputs)
    load = setup.load_base

    def lose(*args: Any) -> Any:
        (inputs / lost).unlink()
        return load(*args)

    monkeypatch.setattr(setup, "load_base", lose)
    with pytest.raises(SystemExit) as end, one_line_errors():
        train(config(inputs, tmp_path / "run"))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(inputs / lost.partition("/")[0]) in said
    assert not (tmp_path / "run").exists()


def test_what_kills_leave_behind_is_cleaned_up(folder: Path, stopped: Path) -> None:
    """Also an adapter folder that was being replaced: a user's files in it come back."""
    scratch = stopped / ".adapter-x1y2"
    (scratch / "new").mkdir(parents=True)
    (scratch / "old").mkdir()
    (scratch / "old/notes.txt").write_text("a person's")
    (stopped / ".old-z").mkdir()
    (stopped / ".config.json").write_text("{")
    (stopped / ".mine").write_text("a person's")
    run = config(folder, stopped)
    make_folder(run, check_folder(run))
    hidden = [path.name for path in stopped.iterdir() if path.name.startswith(".")]
    assert hidden == [".mine"]
    assert (stopped / "adapter/notes.txt").read_text() == "a person's"


def test_a_line_of_the_log_is_not_written_twice(tmp_path: Path) -> None:
    """A run that is killed between its last line and its adapter writes the line again."""
    for resumed in (0, 2, 2):
        with Log(tmp_path, trackers=(), settings={}, resumed=resumed) as log:
            log.write(2, {"loss": 1.0})
            log.write(2, {"validation_loss": 2.0})
    assert [list(line) for line in read_log(tmp_path)] == [
        ["step", "loss"],
        ["step", "validation_loss"],
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_the_run_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def load(*args: Any, **options: Any) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("lorax_ft.run.loop.set_up", load)
    handlers = [signal.getsignal(each) for each in signal.Signals if each != signal.SIGKILL]
    with pytest.raises(KeyboardInterrupt, match="interrupted; the same command goes on"):
        train(config(folder, tmp_path / "run"))
    assert not list(tmp_path.iterdir())
    assert [signal.getsignal(each) for each in signal.Signals if each != signal.SIGKILL] == handlers


def test_a_signal_while_the_run_evaluates_saves_at_once(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    measure = steps.validation_metrics

    def evaluate(job: Any, state: Any) -> dict[str, float]:
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGHUP)
            raise AssertionError("the evaluation goes on")
        return measure(job, state)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "validation_metrics", evaluate)
        with pytest.raises(KeyboardInterrupt, match="interrupted after step 2; the same command"):
            train(config(folder, out, keep_checkpoints=9))
    assert find_checkpoint(out / "checkpoints") == (2, {})
    train(config(folder, out, keep_checkpoints=9))
    assert outcome(out) == outcome(whole)


def test_a_second_signal_stops_at_once() -> None:
    with StopSignal() as stop_signal, stop_signal.waiting():
        signal.raise_signal(signal.SIGINT)
        assert stop_signal.requested(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_that_are_ignored_stay_ignored() -> None:
    """As under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
