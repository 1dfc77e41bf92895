"""Runs that are killed over and over end as one that never was, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from resume_cases import outcome, run_killed
from test_distributed import write_model_and_data
from test_reliability import MOMENTS, config

KILLS = 50
AIMED = (
    ".config.json 1",  # the folder is prepared
    "checkpoints/1 3",  # the first checkpoint is written, so the run begins again
    *MOMENTS,
    "trainer_log 3",
    "checksums.json 1",
    "commit_success 4",  # the checkpoint is renamed into place
    "trainer_log 1",  # the log of a run that goes on is mended
    ".adapter- 9",
    "finished.json 1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model_and_data(folder)
    return folder


def test_kills_at_aimed_moments(folder: Path, tmp_path: Path) -> None:
    run = config(folder, tmp_path / "run", last=6)
    lines = run_killed(run, ("never", *AIMED, "never"), tmp_path / "config.json")
    assert sum(line["killed"] for line in lines) >= len(AIMED) - 1
    ended = [path for path in sorted(tmp_path.glob("run?")) if path.is_dir()]
    assert len(ended) >= 2
    for path in ended[1:]:
        assert outcome(path) == outcome(ended[0]), path


def test_kills_at_random_moments(folder: Path, tmp_path: Path) -> None:
    """Half of them at file operations, half at any time after the first second."""
    run = config(folder, tmp_path / "run", last=6)
    (first,) = run_killed(run, ("never",), tmp_path / "config.json")
    expected = outcome(tmp_path / "run0")
    (tmp_path / "run0").rename(tmp_path / "whole")
    drawn = random.Random(0)
    kills = comparisons = 0
    while kills < KILLS:
        moments = []
        for _ in range(8):
            event = f"event {drawn.randint(1, first['events'])}"
            moments.append(drawn.choice([event, f"seconds {drawn.uniform(1, 8):.2f}"]))
        lines = run_killed(run, (*moments, "never"), tmp_path / "config.json")
        kills += sum(line["killed"] for line in lines)
        for path in sorted(tmp_path.glob("run[0-9]*")):
            assert outcome(path) == expected, (path, moments)
            path.rename(tmp_path / f"compared{comparisons}")
            comparisons += 1
    print(f"{kills} kills, {comparisons} runs compared")
