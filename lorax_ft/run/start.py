"""Everything a run needs before its first step: data, model, adapters, optimizer, each on the mesh."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.data.batches import Batches, Dataset, check_sources, load_data
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft
from lorax_ft.interop.peft_config import read_config
from lorax_ft.lowrank.adapters import with_norms
from lorax_ft.lowrank.groups import fully_trained
from lorax_ft.lowrank.starts import CHANGES_BASE
from lorax_ft.lowrank.statistics import STATISTICS
from lorax_ft.models.model import Model
from lorax_ft.run.checkpoints import Checkpoints
from lorax_ft.run.progress import working
from lorax_ft.run.report import make_console
from lorax_ft.sharding import DECODER_RULES
from lorax_ft.training import contract
from lorax_ft.training.calibration import calibrate
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.state import base_of, fresh_state, owned_leaves, resumed_state
from lorax_ft.training.step import TrainState, batch_loss, make_eval_step, make_train_step
from lorax_ft.tree import Tree, combine, flatten, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to start."""

    config: Config
    mesh: Mesh
    data: Dataset
    batches: Batches
    steps: int
    model: Model
    """Its parameters are the base beside the adapters: without the start, where an init took it out."""
    state: TrainState
    frozen: Tree
    step: Any
    """The compiled training step."""
    evaluate: Any
    """The jitted evaluation step."""
    checkpoints: Checkpoints
    first_step: int
    """0, or the step to go on from."""
    seconds: Mapping[str, float]
    """How long the parts of the start took."""

    def batch(self, step: int) -> tuple[dict[str, Array], int]:
        """Training batch number `step` on the mesh, and its tokens without padding."""
        batch = self.batches.batch(step)
        placed = sharding.place_batch(batch, self.mesh, microbatches=self.config.train.microbatches)
        return placed, int((batch["segment_ids"] > 0).sum())


def start(config: Config, *, folder: Path) -> Job:
    """Load, add adapters, check the contract, compile.

    Args:
      config: the run.
      folder: its output folder.

    Raises:
      ValueError: anything in the config, the data, the checkpoint or the mesh does not fit.
      OSError: the disk has no room for a checkpoint.
    """
    clock = _Clock()
    _check_quantization(config)
    mesh = sharding.make_mesh(config.mesh)
    _check_mesh(config, mesh)
    check_sources(config.data)
    model = _load(config, mesh)
    _check_quantized(model, config)
    if model.tokenizer is None:
        raise ValueError(
            f"{config.model.path} holds no tokenizer; put its tokenizer.json beside the weights"
        )
    if config.adapter.continue_from is not None:
        model = _with_adapter(model, config)
    data = load_data(config.data, model.tokenizer, seed=config.train.seed)
    _check_vocabulary(data, model)
    clock.lap("model and data")
    train = config.train
    batches = Batches(
        rows=data.train.rows,
        batch_size=train.batch_size,
        max_length=config.data.max_length,
        seed=train.seed,
    )
    steps = train.steps or max(round(train.epochs * batches.steps_per_epoch), 1)
    tx = make_optimizer(config.optim, steps=steps)
    checkpoints = Checkpoints(folder / "checkpoints", keep=train.keep_checkpoints)
    if train.resume:
        state, frozen = resumed_state(model, config.adapter, tx, mesh=mesh, checkpoints=checkpoints)
        if int(state.step) > steps:
            raise ValueError(
                f"the run in {folder} is at step {int(state.step)}, beyond its end at step {steps}; give --train.steps "
                f"{int(state.step)} or more, or another --train.output"
            )
    else:
        key = jax.random.fold_in(jax.random.key(train.seed), 0)
        statistics = _measured(model, config, batches, mesh)
        if statistics:
            clock.lap("calibration")
        with working(make_console(), f"starting from {config.adapter.init}") as advance:
            state, frozen = fresh_state(
                model,
                config.adapter,
                tx,
                mesh=mesh,
                key=key,
                rounds=config.quant.rounds,
                statistics=statistics,
                advance=advance,
            )
    checkpoints.check_room(state, owned_leaves(state.trained, frozen))
    model = base_of(model, state, frozen)
    clock.lap("adapters")
    evaluate = jax.jit(make_eval_step(model, packed=False))
    job = Job(
        config=config,
        mesh=mesh,
        data=data,
        batches=batches,
        steps=steps,
        model=model,
        state=state,
        frozen=frozen,
        step=None,
        evaluate=evaluate,
        checkpoints=checkpoints,
        first_step=int(state.step),
        seconds=clock.laps,
    )
    batch, _ = job.batch(job.first_step)
    _check_contract(job, batch)
    compiled = compile_step(job, tx, batch)
    clock.lap("tracing and compiling the step")
    return dataclasses.replace(job, step=compiled)


def compile_step(job: Job, tx: optax.GradientTransformation, batch: dict[str, Array]) -> Any:
    """The training step, compiled for a batch of this shape."""
    config = job.config
    step = make_train_step(
        job.model,
        tx,
        packed=config.data.pack,
        dropout=config.adapter.dropout,
        neftune_alpha=config.train.neftune_alpha,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, job.state)
    jitted = jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(job.mesh))
    )
    with jax.set_mesh(job.mesh):  # by which the model keeps rows split (`split_rows`)
        return jitted.lower(job.state, job.frozen, batch, step_key(config)).compile()


def step_key(config: Config) -> Array:
    """The key that dropout and noise are folded from, step by step."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 1)


def _load(config: Config, mesh: Mesh) -> Model:
    """The base, each leaf on its devices."""

    def shardings(path: str, leaf: Any) -> Any:
        return flatten(sharding.param_shardings(unflatten({path: leaf}), DECODER_RULES, mesh=mesh))[
            path
        ]

    m = config.model
    return load_model(
        m.path,
        revision=m.revision,
        dtype=m.dtype,
        attention=m.attention,
        remat=m.remat,
        quant=config.quant,
        shardings=shardings,
    )


def _with_adapter(model: Model, config: Config) -> Model:
    """The model with the adapter that is to train on."""
    folder = Path(config.adapter.continue_from or "")
    params = load_peft(folder, model)
    for module in read_config(folder).get("modules_to_save") or ():
        if (
            module == "lm_head" and module not in params
        ):  # PEFT's copy of a tied table, which is one leaf here
            continue
        path = module.removeprefix("model.").replace(".", "/")
        if not fully_trained(path, config.adapter.train_whole):
            raise ValueError(
                f"{folder} holds {path}, trained whole; give --adapter.train_whole {path} to go on with it"
            )
    return dataclasses.replace(model, params=params)


def _measured(model: Model, config: Config, batches: Batches, mesh: Mesh) -> dict[str, np.ndarray]:
    """What an init from data starts from, measured on the first training batches; nothing for other inits."""
    adapter, size = config.adapter, batches.batch_size
    if adapter.init not in STATISTICS or adapter.continue_from is not None or not adapter.targets:
        return {}
    if adapter.calibration_batches * size > len(batches):
        raise ValueError(
            f"adapter.calibration_batches {adapter.calibration_batches} of train.batch_size {size} take more rows than "
            f"the {len(batches)} to train on; lower one of them"
        )
    m = config.train.microbatches  # of what fits into memory
    whole = (batches.batch(i) for i in range(adapter.calibration_batches))
    parts = (
        {k: v[j * size // m : (j + 1) * size // m] for k, v in batch.items()}
        for batch in whole
        for j in range(m)
    )
    placed = [sharding.place_batch(part, mesh) for part in parts]
    with working(make_console(), f"measuring for {adapter.init}") as advance, jax.set_mesh(mesh):
        return calibrate(model, adapter, placed, packed=config.data.pack, advance=advance)


def _check_contract(job: Job, batch: dict[str, Array]) -> None:
    """Every leaf that trains is read by the loss."""
    first = {name: rows[0] for name, rows in batch.items()}

    def loss(trained: Tree) -> Array:
        return batch_loss(
            job.model, with_norms(combine(trained, job.frozen)), first, packed=job.config.data.pack
        )

    contract.check_read(loss, job.state.trained)


def _check_mesh(config: Config, mesh: Mesh) -> None:
    rows, devices = (
        config.train.batch_size // config.train.microbatches,
        mesh.shape["data"] * mesh.shape["fsdp"],
    )
    if rows % devices:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} in {config.train.microbatches} microbatches gives {rows} "
            f"rows, which do not divide over data × fsdp = {devices} devices"
        )


def _check_quantization(config: Config) -> None:
    adapter = config.adapter
    changes = adapter.continue_from is None and adapter.init in CHANGES_BASE and not adapter.keep_base
    if changes and config.quant.format == "int8":
        raise ValueError(
            f"adapter.init {adapter.init} changes the base, and there is no file for one in int8; take quant.format nf4"
            + ("" if adapter.init == "loftq" else ", or adapter.keep_base")
        )


def _check_quantized(model: Model, config: Config) -> None:
    """Raise where a start is to win back what quantizing lost, and the model was quantized before."""
    adapter = config.adapter
    fits = adapter.continue_from is None and (adapter.init == "loftq" or config.quant.rounds > 1)
    if fits and model.prequantized:
        raise ValueError(
            f"{model.source} is in NF4 already, so what quantizing lost is not known; load the checkpoint that it came "
            "from, or take another adapter.init, and quant.rounds 1"
        )


def _check_vocabulary(data: Dataset, model: Model) -> None:
    largest = max(int(sample.tokens.max()) for row in data.train.rows for sample in row)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the model's vocabulary holds {model.config.vocab_size}: "
            "the tokenizer is not this checkpoint's"
        )


class _Clock:
    """Seconds of the parts of a start."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
