"""Setup of a run: data, model, adapters, optimizer and the compiled step, all on the mesh."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.checks import alternatives
from lorax_ft.config import Config, TrainConfig
from lorax_ft.data.batches import Batches
from lorax_ft.data.dataset import Dataset
from lorax_ft.evaluation.multiple_choice import Encoded
from lorax_ft.interop.peft_experts import check_fused
from lorax_ft.lowrank.statistics import Measured
from lorax_ft.mesh_axes import ROW_AXES, row_devices
from lorax_ft.models.model import LoadedModel, Model
from lorax_ft.run.additions import with_additions
from lorax_ft.run.checkpoints import FOLDER, Checkpoints
from lorax_ft.run.fingerprint import fingerprint, leaf_checksums
from lorax_ft.run.inputs import check_inputs, load_base, load_dataset, load_questions
from lorax_ft.run.program import compile_step, jitted_evaluation
from lorax_ft.run.progress import progress_bar
from lorax_ft.run.remat import tokens_a_device, with_remat
from lorax_ft.run.report import make_console
from lorax_ft.run.standing import Standing
from lorax_ft.schema import init_schema
from lorax_ft.training.calibration import measured
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.state import fresh_state, owned_leaves, resumed_state
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, modules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to train."""

    config: Config
    mesh: Mesh
    data: Dataset
    batches: Batches
    steps: int
    """Steps of the whole run, including those before a resume."""
    model: Model
    """The model without its parameters: `frozen` holds the base that the adapters are added to."""
    state: TrainState
    """The state before the first step. The first step donates it."""
    frozen: Tree
    step: Any
    """The compiled training step."""
    evaluate: Any
    """The jitted evaluation step."""
    checkpoints: Checkpoints
    first_step: int
    """Steps that are already done: 0 for a new run."""
    questions: Encoded | None
    """The questions of eval.choices."""
    inputs: Mapping[str, str]
    """The fingerprint of the data and of the base."""
    frozen_checksums: Mapping[str, str]
    """Of the frozen leaves before the first step (`leaf_checksums`); empty without train.verify."""
    standing: Standing
    """How the run stood after those steps."""
    seconds: Mapping[str, float]
    """How long each part of the setup took."""

    def batch(self, step: int) -> tuple[dict[str, Array], int]:
        """Training batch number `step`, from 0, on the mesh, and its tokens without padding."""
        return _training_batch(self.batches, step, self.config, self.mesh)

    def epoch(self, step: int) -> float:
        """Passes over the training rows after `step` steps."""
        return step / self.batches.steps_per_epoch

    def is_due(self, step: int, every: int | str) -> bool:
        """As the function `is_due`, for the batches of this run."""
        return is_due(self.batches, step, every)


def is_due(batches: Batches, step: int, every: int | str) -> bool:
    """Whether what happens every N steps, or every "epoch", happens after this step.

    The end of an epoch is the step that takes its last row. With 0 no step is due.
    """
    if every == "epoch":
        rows, size = len(batches), batches.batch_size
        return step * size // rows > (step - 1) * size // rows
    return int(every) > 0 and step % int(every) == 0


def set_up(config: Config, *, folder: Path, resume: int | None = None) -> Job:
    """Load the model and the data, add adapters, check the contract, compile the step.

    Args:
      config: the run.
      folder: its output folder.
      resume: the step of the checkpoint to go on from; None: a new run.

    Raises:
      ValueError: the config, the data, the checkpoint or the mesh do not fit together.
      OSError: the disk has no room for a checkpoint.
    """
    timer = _Timer()
    mesh = run_mesh(config)
    check_inputs(config)
    model = load_base(config, mesh)
    with jax.set_mesh(mesh):
        model = with_additions(model, config)
    data = load_dataset(config, model)
    questions = load_questions(config.eval, model)
    timer.lap("model and data")
    inputs = fingerprint(model.params, data)
    timer.lap("checksums of both")

    batches = make_batches(config, data)
    steps = count_steps(config.train, batches)
    tx = make_optimizer(config.optim, steps=steps)
    checkpoints = Checkpoints(folder / FOLDER, keep=config.train.keep_checkpoints)
    standing = Standing()
    if resume is None:
        state, frozen = _new_state(model, tx, config, batches=batches, mesh=mesh)
    else:
        checkpoints.check_inputs(resume, inputs)
        _check_end(config, done=resume, steps=steps)
        restore = functools.partial(checkpoints.restore, step=resume)
        state, frozen = resumed_state(model, config.adapter, tx, mesh=mesh, restore=restore)
        standing = checkpoints.standing(resume, keeps_best=config.train.load_best)
    _check_state(state, frozen, config, checkpoints)
    # From here on `frozen` holds the base: what an init changed is deleted in the model's own.
    functions = with_remat(
        model.without_params(),
        config,
        tokens=tokens_a_device(config, mesh, data.max_length),
        held=sharding.bytes_a_device((state, frozen)),
    )
    del model
    timer.lap("adapters")
    frozen_checksums = leaf_checksums(frozen) if config.train.verify else {}
    timer.lap("checksums of the frozen weights")

    first_step = int(state.step)
    batch, _ = _training_batch(batches, first_step, config, mesh)
    step = compile_step(functions, tx, config, state=state, frozen=frozen, batch=batch, mesh=mesh)
    timer.lap("tracing and compiling the step")
    return Job(
        config=config,
        mesh=mesh,
        data=data,
        batches=batches,
        steps=steps,
        model=functions,
        state=state,
        frozen=frozen,
        step=step,
        evaluate=jitted_evaluation(functions),
        checkpoints=checkpoints,
        first_step=first_step,
        questions=questions,
        inputs=inputs,
        frozen_checksums=frozen_checksums,
        standing=standing,
        seconds=timer.seconds,
    )


def count_steps(config: TrainConfig, batches: Batches) -> int:
    """The steps of a run: train.steps, or those of train.epochs."""
    if config.steps is not None:
        return config.steps
    epochs = 1.0 if config.epochs is None else config.epochs
    return max(round(epochs * batches.steps_per_epoch), 1)


def run_mesh(config: Config) -> Mesh:
    """The mesh of the config, checked against the batch size.

    Raises:
      ValueError: as `make_mesh` and `check_rows`.
    """
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    return mesh


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raise if the rows of a microbatch do not divide over the devices of a mesh.

    Raises:
      ValueError: they do not; the error says which numbers would.
    """
    train = config.train
    rows = train.batch_size // train.microbatches
    devices = row_devices(mesh)
    if rows % devices == 0:
        return
    unit = devices * train.microbatches
    below = train.batch_size // unit * unit
    fitting = alternatives([size for size in (below, below + unit) if size > 0])
    way_out = f"a batch_size of {fitting} would"
    if devices % rows == 0 and config.mesh.expert == 1:
        context = config.mesh.context * devices // rows
        way_out += f"; or split each row, with mesh.context {context}"
    raise ValueError(
        f"train.batch_size {train.batch_size} / train.microbatches {train.microbatches} gives "
        f"{rows} rows, which do not divide over {' × '.join(ROW_AXES)} = {devices} "
        f"devices; {way_out}"
    )


def make_batches(config: Config, data: Dataset) -> Batches:
    """The training batches of a run."""
    return Batches(
        rows=data.train.rows,
        sets=data.train.sets,
        batch_size=config.train.batch_size,
        max_length=data.max_length,
        seed=config.train.seed,
    )


def _training_batch(
    batches: Batches, step: int, config: Config, mesh: Mesh
) -> tuple[dict[str, Array], int]:
    """Batch number `step` on the mesh, `[M, B, T]`, and its tokens without padding."""
    batch = batches.batch(step)
    # Counted on the host, before the batch is spread over the devices. Padding has segment 0.
    tokens = int((batch["segment_ids"] > 0).sum())
    placed = sharding.place_batch(batch, mesh, microbatches=config.train.microbatches)
    return placed, tokens


def _new_state(
    model: LoadedModel,
    tx: optax.GradientTransformation,
    config: Config,
    *,
    batches: Batches,
    mesh: Mesh,
) -> tuple[TrainState, Tree]:
    """The state of a new run, and its frozen leaves; the model's parameters are consumed."""
    # Adapters and steps (`step_key`) each have their own stream of random numbers.
    key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
    with progress_bar(make_console(), f"initializing with {config.adapter.init}") as advance:
        return fresh_state(
            model,
            config.adapter,
            tx,
            mesh=mesh,
            key=key,
            rounds=config.quant.rounds,
            statistics=run_statistics(model, config, batches, mesh),
            donate=True,
            advance=advance,
        )


def _check_end(config: Config, *, done: int, steps: int) -> None:
    """Raise if a run has already made more steps than it is to have."""
    if done > steps:
        raise ValueError(
            f"the run in {config.train.output} is at step {done}, beyond its end at step {steps}; "
            f"give --train.steps {done} or more, or another --train.output"
        )


def _check_state(state: TrainState, frozen: Tree, config: Config, checkpoints: Checkpoints) -> None:
    """Raise where PEFT could not hold the adapters, or the disk their checkpoints."""
    if config.adapter.targets:
        check_fused(modules(state.trained))
    checkpoints.check_room(state, owned_leaves(state.trained, frozen))


def run_statistics(
    model: LoadedModel, config: Config, batches: Batches, mesh: Mesh
) -> Iterator[Measured]:
    """The statistics of the first training batches that a data-driven init needs, else none.

    They are measured while they are taken.
    """
    adapter, size = config.adapter, batches.batch_size
    needs_data = init_schema(adapter.init).statistic is not None
    if not needs_data or adapter.continue_from is not None or not adapter.targets:
        return
    if adapter.calibration_batches * size > len(batches):
        raise ValueError(
            f"adapter.calibration_batches {adapter.calibration_batches} of train.batch_size "
            f"{size} take more rows than the {len(batches)} to train on; lower one of them"
        )
    # Gradients take a backward pass, so calibration uses the microbatches that fit in memory.
    rows = size // config.train.microbatches
    placed = []
    for i in range(adapter.calibration_batches):
        batch = batches.batch(i)
        for first in range(0, size, rows):
            part = {name: values[first : first + rows] for name, values in batch.items()}
            placed.append(sharding.place_batch(part, mesh))
    statistics = measured(model, adapter, placed, packed=config.data.pack)
    while True:
        # Not around a loop with `yield`, which would set the mesh for whoever takes them too.
        with jax.set_mesh(mesh):
            one = next(statistics, None)
        if one is None:
            return
        yield one


class _Timer:
    """Measures the parts of the setup."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap under this name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
