"""Faults around a run: few open files, a damaged compilation cache, little memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resume_cases import outcome
from test_distributed import write_model_and_data
from test_reliability import config

from lorax_ft.config import Config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model_and_data(folder)
    return folder


def named(settings: Config, output: Path) -> Config:
    return dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, output=str(output))
    )


def run(settings: Config, limits: str = "true", **environment: str) -> tuple[int, str]:
    """The command in a shell that sets limits first; returns its status and what it said."""
    file = Path(settings.train.output).with_suffix(".json")
    file.write_text(settings.to_json())
    root = Path(__file__).parents[2]
    command = f"{limits} && exec {sys.executable} -m lorax_ft train --config {file}"
    done = subprocess.run(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""} | environment,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Config:
    """A run that met no fault."""
    settings = config(inputs, inputs / "whole")
    code, said = run(settings)
    assert code == 0, said
    return settings


@pytest.mark.parametrize("files", [16, 32, 64])
def test_few_open_files(whole: Config, tmp_path: Path, files: int) -> None:
    settings = named(whole, tmp_path / "run")
    code, said = run(settings, f"ulimit -n {files}")
    assert "Traceback" not in said, said
    if code:
        assert code == 2, said
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "open only" in error or "Too many open files" in error
        assert "ulimit -n" in error
        assert run(settings)[0] == 0
    assert outcome(tmp_path / "run") == outcome(Path(whole.train.output))


def test_a_damaged_compilation_cache(whole: Config, tmp_path: Path) -> None:
    """A bit flipped in each of its files: JAX warns, and compiles anew."""
    cache = tmp_path / "cache"
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    assert run(named(whole, tmp_path / "first"), **environment)[0] == 0
    files = [file for file in cache.iterdir() if file.name.endswith("-cache")]
    assert len(files) > 5
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    code, said = run(named(whole, tmp_path / "second"), **environment)
    assert code == 0, said
    assert "Traceback" not in said
    expected = outcome(Path(whole.train.output))
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second") == expected


def test_too_little_memory_for_a_step(whole: Config, tmp_path: Path) -> None:
    """Said before the first step: the step needs more address space than the process may have."""
    settings = named(whole, tmp_path / "run")
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, batch_size=400_000)
    )
    code, said = run(settings, "ulimit -v 8000000")
    assert code == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "(ulimit -v) has" in error
    assert "plan" in error
    assert not (tmp_path / "run").exists()
