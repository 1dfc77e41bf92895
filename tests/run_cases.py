"""Short runs by the real main, for the tests of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorax_ft.training.log import read_log

ROOT = Path(__file__).parent.parent
SHORT = ["--eval.rows", "8", "--eval.exact_match_rows", "2", "--eval.samples", "1", "--eval.max_new_tokens", "4"]
SHORT += ["--train.batch_size", "8", "--mesh.fsdp", "2", "--mesh.tensor", "1"]

Main = Callable[..., int]


def config(name: str) -> tuple[str, str]:
    return "--config", str(ROOT / "configs" / f"{name}.py")


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder) if "loss" in line}
