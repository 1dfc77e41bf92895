"""Packed rows whose tokens are split over the devices of two processes train as on one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from test_distributed import run_config, train_in_processes, write_model_and_data

from lorax_ft.config import Config, MeshConfig
from lorax_ft.run.log import read_log

STEPS = 5
RUNS = {"one": (1, MeshConfig()), "two": (2, MeshConfig(data=1, context=8))}
"""The processes, and the mesh of their eight devices."""


def test_the_loss_curve_is_that_of_one_process(tmp_path: Path) -> None:
    write_model_and_data(tmp_path)
    for name, (processes, mesh) in RUNS.items():
        file = tmp_path / f"{name}.json"
        file.write_text(packed(tmp_path, name, mesh).to_json())
        train_in_processes(tmp_path, [file], processes=processes, devices=8 // processes)
    logs = [read_log(tmp_path / name) for name in RUNS]
    for key, count in {"loss": STEPS, "grad_norm": STEPS, "validation_loss": 2}.items():
        expected, got = ([line[key] for line in log if key in line] for log in logs)
        assert len(expected) == count
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=key)
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in RUNS)
    assert two.keys() == one.keys()
    for key, leaf in one.items():
        np.testing.assert_allclose(two[key], leaf, atol=1e-3, err_msg=key)


def packed(folder: Path, name: str, mesh: MeshConfig) -> Config:
    """Rows of 128 tokens, which hold several samples."""
    plain = run_config(folder, "lora", STEPS)
    return dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, pack=True, max_length=128),
        train=dataclasses.replace(plain.train, output=str(folder / name)),
        eval=dataclasses.replace(plain.eval, exact_match_rows=0, samples=0),
        mesh=mesh,
    )
