"""Everything a run needs before its first step: data, model, adapters, optimiser, each on the mesh."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from lorax_ft.config import Config
from lorax_ft.data.batches import Batches, Dataset, load_data
from lorax_ft.interop.load import load_model
from lorax_ft.lowrank.adapters import add_adapters, attach_adapters, partition
from lorax_ft.models.llama import SHARDING_RULES
from lorax_ft.models.model import Model
from lorax_ft.training import contract, sharding
from lorax_ft.training.checkpoints import Checkpoints
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.step import TrainState, batch_loss, make_eval_step, make_train_step
from lorax_ft.tree import Tree, combine, flatten, split, unflatten


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
    """
    clock = _Clock()
    mesh = sharding.make_mesh(config.mesh)
    _check_mesh(config, mesh)
    model = _load(config, mesh)
    data = load_data(config.data, model.tokenizer, seed=config.train.seed)
    _check_vocabulary(data, model)
    clock.lap("model and data")
    train = config.train
    batches = Batches(
        rows=data.train.rows, batch_size=train.batch_size, max_length=config.data.max_length, seed=train.seed
    )
    steps = train.steps or max(round(train.epochs * batches.steps_per_epoch), 1)
    tx = make_optimizer(config.optim, steps=steps)
    checkpoints = Checkpoints(folder / "checkpoints", keep=train.keep_checkpoints)
    state, frozen, model = _state(config, model, tx, checkpoints if train.resume else None, mesh=mesh)
    clock.lap("adapters")
    evaluate = jax.jit(make_eval_step(model, packed=False))
    job = Job(
        config=config, mesh=mesh, data=data, batches=batches, steps=steps, model=model, state=state, frozen=frozen,
        step=None, evaluate=evaluate, checkpoints=checkpoints, first_step=int(state.step), seconds=clock.laps,
    )  # fmt: skip
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
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(job.mesh)))
    return jitted.lower(job.state, job.frozen, batch, step_key(config)).compile()


def step_key(config: Config) -> Array:
    """The key that dropout and noise are folded from, step by step."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 1)


def _load(config: Config, mesh: Mesh) -> Model:
    """The base, each leaf on its devices."""

    def place(path: str, array: np.ndarray) -> Array:
        shapes = unflatten({path: array})
        return sharding.place(array, flatten(sharding.param_shardings(shapes, SHARDING_RULES, mesh=mesh))[path])

    m = config.model
    return load_model(m.path, revision=m.revision, dtype=m.dtype, attention=m.attention, remat=m.remat, place=place)


def _state(
    config: Config, model: Model, tx: optax.GradientTransformation, resume: Checkpoints | None, *, mesh: Mesh
) -> tuple[TrainState, Tree, Model]:
    """The state to train from, the frozen leaves, and the model with the base that stands beside the adapters."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
    whole = config.adapter.train_whole
    # The shapes of the tree with adapters, from a trace: the exact SVD runs on the host and cannot be traced.
    traceable = dataclasses.replace(config.adapter, pissa_iterations=0)
    shapes = jax.eval_shape(
        lambda p: _float32_whole(add_adapters(p, traceable, layout=model.layout, key=key), whole), model.params
    )
    shardings = flatten(sharding.param_shardings(shapes, SHARDING_RULES, mesh=mesh))
    trained_shapes, _ = partition(shapes, whole=whole)
    trained_shardings = unflatten({path: shardings[path] for path in flatten(trained_shapes)})
    state_shardings = TrainState(
        step=sharding.replicated(mesh),  # type: ignore[arg-type]
        trained=trained_shardings,
        opt_state=sharding.state_shardings(tx, trained_shapes, trained_shardings, mesh=mesh),
    )
    if resume is None:
        params = _float32_whole(add_adapters(model.params, config.adapter, layout=model.layout, key=key), whole)
        contract.check_scales(params)
        params = unflatten({path: _move(leaf, shardings[path]) for path, leaf in flatten(params).items()})
        trained, frozen = partition(params, whole=whole)
        opt_state = jax.jit(tx.init, out_shardings=state_shardings.opt_state)(trained)
        state = TrainState(sharding.place(np.zeros((), np.int32), state_shardings.step), trained, opt_state)  # type: ignore[arg-type]
    else:
        owned_shapes = _owned(shapes, whole)
        abstract = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32), trained_shapes, jax.eval_shape(tx.init, trained_shapes)
        )
        placed = jax.tree.map(_with_sharding, abstract, state_shardings)
        owned = unflatten({p: _with_sharding(s, shardings[p]) for p, s in flatten(owned_shapes).items()})
        state, owned = resume.restore(placed, owned)
        adapters = {p: v for p, v in flatten(combine(state.trained, owned)).items() if p not in flatten(model.params)}
        _, frozen = partition(attach_adapters(model.params, unflatten(adapters)), whole=whole)
    base, _ = split(combine(state.trained, frozen), lambda path: path in flatten(model.params))
    return state, frozen, dataclasses.replace(model, params=base)


def _owned(params: Tree, whole: tuple[str, ...]) -> Tree:
    """The frozen leaves that belong to the fine-tuning: scales and starts."""
    trained, _ = partition(params, whole=whole)
    owned, _ = partition(params, by="ownership", whole=whole)
    return split(owned, lambda path: path not in flatten(trained))[0]


def owned_leaves(job: Job) -> Tree:
    """The frozen leaves of a job that a checkpoint needs: scales and starts."""
    return _owned(combine(job.state.trained, job.frozen), job.config.adapter.train_whole)


def _float32_whole(params: Tree, whole: tuple[str, ...]) -> Tree:
    """The parameters with modules that train whole in float32, since bfloat16 rounds small updates away."""
    trained, frozen = partition(params, whole=whole)
    return combine(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained), frozen)


def _move(leaf: Array, target: Any) -> Array:
    if leaf.sharding == target:
        return leaf
    return sharding.place(np.asarray(leaf), target) if leaf.is_fully_addressable else jax.device_put(leaf, target)


def _with_sharding(leaf: Any, target: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target)


def _check_contract(job: Job, batch: dict[str, Array]) -> None:
    """Every leaf that trains is read by the loss."""
    first = {name: rows[0] for name, rows in batch.items()}

    def loss(trained: Tree) -> Array:
        from lorax_ft.lowrank.adapters import with_norms

        return batch_loss(job.model, with_norms(combine(trained, job.frozen)), first, packed=job.config.data.pack)

    contract.check_read(loss, job.state.trained)


def _check_mesh(config: Config, mesh: Mesh) -> None:
    rows, devices = config.train.batch_size // config.train.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % devices:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} in {config.train.microbatches} microbatches gives {rows} rows, "
            f"which do not divide over data × fsdp = {devices} devices"
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
