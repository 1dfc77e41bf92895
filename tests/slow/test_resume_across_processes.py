"""A run goes on with another number of processes and another mesh as if it never had stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_distributed import run_config, train_in_processes, write_model_and_data

from lorax_ft.config import Config, MeshConfig
from lorax_ft.run.log import read_log

FOUR = MeshConfig()
FSDP = MeshConfig(data=1, fsdp=4)
TENSOR = MeshConfig(data=1, fsdp=2, tensor=2)
SPLIT = MeshConfig(data=2, fsdp=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, the data, and the log of one process that never stopped."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model_and_data(folder)
    train_part(folder, config(folder, "whole", 6, FOUR), processes=1)
    return folder


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, FOUR), (1, TENSOR)),
        ((1, FSDP), (2, FOUR)),
        ((2, FSDP), (2, TENSOR)),
        ((2, TENSOR), (2, SPLIT)),
    ],
    ids=["2 to 1", "1 to 2", "2 fsdp to tensor", "2 tensor to data and fsdp"],
)
def test_the_loss_curve_is_the_same(
    folder: Path,
    request: pytest.FixtureRequest,
    first: tuple[int, MeshConfig],
    then: tuple[int, MeshConfig],
) -> None:
    name = request.node.callspec.id.replace(" ", "_")
    for steps, (processes, mesh) in ((3, first), (6, then)):
        part = config(folder, name, steps, mesh, resume=steps == 6)
        train_part(folder, part, processes=processes)
    expected, got = read_log(folder / "whole"), read_log(folder / name)
    assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3, 4, 5]
    for key in ("loss", "validation_loss"):
        # By step: a run that stops at step 3 is evaluated there once more.
        values = [
            {line["step"]: line[key] for line in log if key in line} for log in (expected, got)
        ]
        assert values[1] == pytest.approx(values[0], rel=1e-5), key
    assert expected[-1]["best_step"] == got[-1]["best_step"] == 3


def config(
    folder: Path, name: str, steps: int, mesh: MeshConfig, *, resume: bool = False
) -> Config:
    """A run whose validation loss is lowest at step 3, so that its patience ends it after 5."""
    plain = run_config(folder, "lora", steps, resume=resume)
    return dataclasses.replace(
        plain,
        optim=dataclasses.replace(plain.optim, learning_rate=5e-2),
        train=dataclasses.replace(
            plain.train,
            output=str(folder / name),
            eval_every=1,
            load_best=True,
            patience=2,
        ),
        eval=dataclasses.replace(plain.eval, exact_match_rows=0, samples=0),
        mesh=mesh,
    )


def train_part(folder: Path, part: Config, *, processes: int) -> None:
    """Train on four devices, those of one process or two of each of two."""
    file = folder / "part.json"
    file.write_text(part.to_json())
    train_in_processes(folder, [file], processes=processes, devices=4 // processes)
