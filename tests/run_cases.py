"""Short runs of the real main(), for the tests of runs."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import lorax_ft as lft
from lorax_ft.run.log import LOG, PLOT, read_log

ROOT = Path(__file__).parent.parent
SHORT = [
    "--eval.rows",
    "8",
    "--eval.exact_match_rows",
    "2",
    "--eval.samples",
    "1",
    "--eval.max_new_tokens",
    "4",
]
SHORT += ["--train.batch_size", "8", "--mesh.fsdp", "2", "--mesh.tensor", "1"]

CONFIGS = [
    path.stem
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in ("smollm2_gsm8k", "own", "qwen2_5_7b_ceval")
]

Main = Callable[..., int]


def slow_cases(cases: Iterable[Any], slow: Container[Any]) -> list[Any]:
    """The cases, of which those in `slow` belong to the second tier."""
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]


def last_of_each(argv: Sequence[object]) -> list[str]:
    """The command line without options that a later one of the same name replaces.

    Tests change one of a list of usual options by giving it again, which the scripts refuse.
    """
    groups: dict[str, list[str]] = {}
    name = ""
    for argument in map(str, argv):
        if argument.startswith("--"):
            name = argument.partition("=")[0]
            # Last, as the position of what was repeated does not matter.
            groups.pop(name, None)
        groups.setdefault(name, []).append(argument)
    return [argument for group in groups.values() for argument in group]


def config(name: str) -> tuple[str, str]:
    return "--config", str(ROOT / "configs" / f"{name}.py")


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder) if "loss" in line}


def trained(main: Main, name: str, folder: Path, *options: object) -> dict[int, float]:
    """The losses of the first three steps of a config."""
    steps = [*config(name), *SHORT, "--optim.schedule", "constant", "--train.steps", 3, *options]
    assert main(*steps, "--train.output", folder / "whole") == 0
    return losses(folder / "whole")


def resumed(main: Main, name: str, folder: Path) -> dict[int, float]:
    """The same; also crash between the second and third step, resume, and check that both agree."""
    expected = trained(main, name, folder, "--train.save_every", 2)
    whole, crashed = folder / "whole", folder / "crashed"
    shutil.copytree(whole, crashed)
    saved = (
        ("model", "model.safetensors")
        if name == "full"
        else ("adapter", "adapter_model.safetensors")
    )
    shutil.rmtree(crashed / "checkpoints/3")
    (crashed / "finished.json").unlink()
    shutil.rmtree(crashed / saved[0])
    (crashed / saved[0]).mkdir()
    (crashed / saved[0] / "README.md").write_text("a person's")
    lines = (crashed / LOG).read_text().splitlines(keepends=True)
    (crashed / LOG).write_text("".join(lines[:3]) + '{"step": 3, "lo')
    (crashed / PLOT).unlink()
    steps = [
        *config(name),
        *SHORT,
        "--optim.schedule",
        "constant",
        "--train.steps",
        3,
        "--train.save_every",
        2,
    ]
    assert main(*steps, "--train.output", crashed, "--train.resume") == 0
    assert losses(crashed) == expected
    assert [json.loads(line)["step"] for line in (crashed / LOG).open()] == [0, 1, 2, 3, 3]
    assert (crashed / saved[0] / "README.md").read_text() == "a person's"
    assert (crashed.joinpath(*saved)).read_bytes() == (whole.joinpath(*saved)).read_bytes()
    assert (crashed / PLOT).stat().st_size > 10_000
    assert lft.Config.from_json((crashed / "config.json").read_text()).train.resume == "always"
    return expected


def script_main(name: str) -> Any:
    """The main() of a command, which scripts/ has too."""
    return importlib.import_module(f"lorax_ft.commands.{name}").main
