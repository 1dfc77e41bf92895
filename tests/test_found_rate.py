"""`optim.learning_rate find`: the run trains at the rate that its short runs chose."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from run_cases import ROOT, Main, config

import lorax_ft as lft
from lorax_ft.config import Config, OptimConfig
from lorax_ft.run.log import read_log
from lorax_ft.sweep import rate as rate_room
from lorax_ft.sweep.rate import rate_by_width, with_found_rate
from lorax_ft.training.optimizer import make_optimizer

SHORT = [
    *("--train.steps", "3", "--train.batch_size", "8", "--eval.rows", "8"),
    *("--eval.exact_match_rows", "0", "--eval.samples", "0", "--mesh.data", "1"),
]


@pytest.mark.slow
def test_a_run_trains_at_the_rate_that_it_found(
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    few_devices: None,
    standard_promotion: None,
) -> None:
    """Of 2e-6 and 2e-3, three steps of the embedded task tell which is better."""
    monkeypatch.setattr(rate_room, "EXPONENTS", (-2.0, 1.0, 4.0))
    argv = [*config("lora"), *SHORT, "--optim.learning_rate", "find"]
    assert main(*argv, "--train.output", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "optim.learning_rate 0.002 has the lowest loss of 3 rates, 3 steps each" in printed
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["optim"]["learning_rate"] == 0.002
    rates = [line["learning_rate/lora_a"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert max(rates) == pytest.approx(0.002)
    # A resumed run keeps the rate, and looks for no other.
    more = [arg if arg != "3" else "4" for arg in argv]
    assert main(*more, "--train.output", tmp_path / "run", "--train.resume") == 0
    assert "Finding the learning rate" not in capsys.readouterr().out
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["optim"]["learning_rate"] == 0.002


def test_a_folder_that_cannot_be_used_is_an_error_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("a person's")
    monkeypatch.setattr(rate_room, "find_rate", lambda config, console: pytest.fail("searched"))
    run = lft.load_config(ROOT / "configs/lora.py")
    train = dataclasses.replace(run.train, output=str(tmp_path / "run"))
    run = dataclasses.replace(run, train=train, optim=OptimConfig(learning_rate="find"))
    with pytest.raises(ValueError, match="not empty"):
        with_found_rate(run)


def test_auto_is_the_rule_by_width(
    main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    few_devices: None,
    standard_promotion: None,
) -> None:
    """The embedded model is 128 wide: 5e-4 · (2000 / 128)^0.781."""
    argv = [*config("lora"), *SHORT, "--optim.learning_rate", "auto", "--dry_run"]
    assert main(*argv, "--train.output", tmp_path / "run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "optim.learning_rate auto: 0.004279 for a width of 128 (LoRA Without Regret" in printed
    assert "learning_rate 0.004279" in printed
    for option, said in (
        (("--adapter.alpha", "16"), "is a rule for adapter.alpha 32, and it is 16"),
        (("--adapter.scaling", "rank_stabilized"), "adapter.scaling standard, and it is"),
        (("--prompt.kind", "prompt", "--adapter.targets"), "rule for LoRA, and adapter.targets"),
        (("--optim.optimizer", "lion"), "is a rule for Adam, and optim.optimizer is lion"),
    ):
        assert main(*argv, *option, "--train.output", tmp_path / "run") == 2
        assert said in capsys.readouterr().err


def test_qwens_rate_hardly_depends_on_the_width() -> None:
    assert rate_by_width(4096, family="qwen3") == pytest.approx(4.73e-4, rel=1e-3)
    assert rate_by_width(4096, family="llama", in_full=True) == pytest.approx(2.857e-5, rel=1e-3)


def test_elsewhere_the_rate_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="give a number"):
        make_optimizer(OptimConfig(learning_rate="find"), steps=1)
    with pytest.raises(ValueError, match=r"optim\.learning_rate is 'fnd'.*did you mean 'find'"):
        OptimConfig(learning_rate="fnd")  # type: ignore[arg-type]
    assert Config.from_json(Config(optim=OptimConfig(learning_rate="find")).to_json())
