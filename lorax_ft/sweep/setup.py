"""Setup of a sweep: model and data loaded once, an adapter for each point, all stacked.

Letters: K adapters, M microbatches, B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.data.batches import Batches, evaluation_batches
from lorax_ft.data.dataset import Dataset, depends_on_seed
from lorax_ft.mesh_axes import ROW_AXES, TOKEN_AXIS
from lorax_ft.models.model import LoadedModel, Model
from lorax_ft.run.additions import with_additions
from lorax_ft.run.inputs import check_inputs, load_base, load_dataset
from lorax_ft.run.program import check_contract, step_key
from lorax_ft.run.remat import tokens_a_device, with_remat
from lorax_ft.run.room import check_room
from lorax_ft.run.setup import count_steps, make_batches, run_mesh
from lorax_ft.run.validation import METRIC
from lorax_ft.sweep.agree import shared_values
from lorax_ft.sweep.axes import Point
from lorax_ft.sweep.program import Program, compile_program
from lorax_ft.sweep.stack import Shapes, shapes_of, stack, take, unstack
from lorax_ft.sweep.starts import make_leaves, shared_base
from lorax_ft.training.optimizer import make_optimizer, peak_rates, with_peak_rates
from lorax_ft.training.state import owned_leaves
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, combine

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """The model and the data of a sweep, which several of its generations may use."""

    mesh: Mesh
    model: LoadedModel
    """What all points share; each has additions of its own (`with_additions`)."""
    datasets: dict[Any, Dataset]
    """By all of a run that its data depend on (`Loaded.dataset`)."""
    programs: dict[Any, Program]
    """By all that a program depends on (`SweepJob.compile`)."""

    def dataset(self, config: Config) -> Dataset:
        """The data of a run, loaded at the first call for its like."""
        # Seeds share a dataset unless its validation rows are held out by the seed.
        seed = config.train.seed if depends_on_seed(config.data) else 0
        # The invocation is looked for in the samples.
        kind = (seed, config.prompt.count, config.adapter.invocation)
        if kind not in self.datasets:
            with jax.set_mesh(self.mesh):
                model = with_additions(self.model, config)
            self.datasets[kind] = load_dataset(config, model)
        return self.datasets[kind]

    def steps(self, config: Config) -> int:
        """The steps of a run."""
        return count_steps(config.train, make_batches(config, self.dataset(config)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepJob:
    """K runs that are ready to train together."""

    points: list[Point]
    mesh: Mesh
    model: Model
    """The model without its parameters."""
    base: Tree
    """The frozen leaves that all adapters share."""
    state: TrainState
    """The state before the first step, each leaf `[K, ...]`."""
    owned: Tree
    """The frozen leaves of the adapters, `[K, ...]`."""
    shapes: list[Shapes]
    """The shapes of the leaves of each adapter, without padding."""
    data: list[Dataset]
    """Of each point; the same object where points share it."""
    batches: list[Batches]
    steps: int
    keys: Array
    """The key that each step folds its number into, `[K]`."""
    programs: dict[Any, Program]
    """As in `Loaded`."""

    @property
    def config(self) -> Config:
        """The config of the first point: what is not varied is the same in all."""
        return self.points[0].config

    def batch(self, members: Sequence[int], step: int) -> tuple[dict[str, Array], int]:
        """Training batch number `step` of some adapters, `[K, M, B, T]`, and its tokens."""
        microbatches = self.config.train.microbatches
        # The seed shuffles the rows: adapters of one seed see the same ones.
        by_seed: dict[int, HostBatch] = {}
        rows = []
        for k in members:
            seed = self.points[k].config.train.seed
            if seed not in by_seed:
                by_seed[seed] = self.batches[k].batch(step)
            rows.append(by_seed[seed])
        tokens = 0
        for batch in rows:
            # Segment 0 is padding.
            tokens += int((batch["segment_ids"] > 0).sum())
        # As a single run splits its rows; neither K nor M is split.
        place = NamedSharding(self.mesh, P(None, None, ROW_AXES, TOKEN_AXIS))
        placed = {}
        for name in rows[0]:
            stacked = np.stack([batch[name] for batch in rows])  # [K, B, T]
            k, _, length = stacked.shape
            by_microbatch = stacked.reshape(k, microbatches, -1, length)  # [K, M, B, T]
            placed[name] = sharding.place(by_microbatch, place)
        return placed, tokens

    def validation_batches(self, members: Sequence[int]) -> Iterator[tuple[str, dict[str, Array]]]:
        """The metric and a batch of each validation set: `[B, T]`, or of each adapter its own."""
        shared = self.shares_validation
        place = sharding.batch_sharding(self.mesh, microbatched=not shared)
        # A reading for each adapter: validation rows are few, and read from disk.
        readers = members[:1] if shared else members
        for name in self.data[0].validation_sets:
            metric = f"{METRIC}/{name}" if name else METRIC
            streams = [self._evaluation_batches(self.data[k], name) for k in readers]
            for parts in zip(*streams, strict=True):
                batch = {}
                for field, values in parts[0].items():
                    stacked = values
                    if not shared:
                        stacked = np.stack([part[field] for part in parts])
                    batch[field] = sharding.place(stacked, place)
                yield metric, batch

    @property
    def shares_validation(self) -> bool:
        """Whether all points are evaluated on the same rows."""
        return all(data is self.data[0] for data in self.data)

    def _evaluation_batches(self, data: Dataset, name: str) -> Iterator[Any]:
        train = self.config.train
        size = train.batch_size // train.microbatches
        rows = data.validation_sets[name].rows
        limit = self.config.eval.rows
        return evaluation_batches(rows, size, max_length=data.max_length, limit=limit)

    def compile(self, members: Sequence[int], state: TrainState, owned: Tree) -> Program:
        """The program of as many adapters as there are members; compiled once."""
        # The values too: NEFTune's noise, for one, is in the program and not in the leaves.
        kind = (
            shared_values(self.config),
            self.steps,
            tuple(shapes_of(state.trained).items()),
            tuple(shapes_of(owned).items()),
            self.shares_validation,
        )
        if kind not in self.programs:
            batch, _ = self.batch(members, 0)
            self.programs[kind] = compile_program(
                self.model,
                self.config,
                steps=self.steps,
                state=state,
                owned=owned,
                base=self.base,
                batch=batch,
                keys=take(self.keys, members),
                mesh=self.mesh,
                shares_validation=self.shares_validation,
            )
            check_room(self.programs[kind].step)
        return self.programs[kind]

    def params(self, state: TrainState, k: int) -> Tree:
        """The parameters of adapter number k without padding, as a run of its own has them."""
        adapters = combine(state.trained, self.owned)
        return combine(self.base, unstack(adapters, k, self.shapes[k]))


def load(config: Config) -> Loaded:
    """The model of a sweep.

    Raises:
      ValueError: as for a single run, before any data is read but the first row.
    """
    mesh = run_mesh(config)
    check_inputs(config)
    return Loaded(mesh=mesh, model=load_base(config, mesh), datasets={}, programs={})


def set_up(points: Sequence[Point], loaded: Loaded) -> SweepJob:
    """Adapters, optimizer states and data of all points.

    Raises:
      ValueError: the points cannot share a program, or one of them is not valid for the model.
    """
    model, mesh = loaded.model, loaded.mesh
    data = [loaded.dataset(point.config) for point in points]
    batches = []
    for point, its_data in zip(points, data, strict=True):
        batches.append(make_batches(point.config, its_data))
    _check_data(points, data)
    steps = _count_steps(points, batches)
    leaves = make_leaves(points, model, batches, mesh)
    trained, owned = [], []
    shapes: list[Shapes] = []
    for its_trained, its_frozen in leaves:
        # Leaves such as the scale do not train, but are the adapter's own all the same.
        its_owned = owned_leaves(its_trained, its_frozen)
        trained.append(its_trained)
        owned.append(its_owned)
        shapes.append(shapes_of(combine(its_trained, its_owned)))
    base = shared_base(owned, [frozen for _, frozen in leaves])
    _check_read(points[0].config, model, leaves[0], batches[0], mesh)
    state = _make_state(points, stack(trained, mesh=mesh), steps=steps, mesh=mesh)
    keys = [step_key(point.config) for point in points]
    config = points[0].config
    # The adapters' tokens are in memory together.
    tokens = len(points) * tokens_a_device(config, mesh, data[0].max_length)
    held = sharding.bytes_a_device((base, state))
    return SweepJob(
        points=list(points),
        mesh=mesh,
        model=with_remat(model.without_params(), config, tokens=tokens, held=held),
        base=base,
        state=state,
        owned=stack(owned, mesh=mesh),
        shapes=shapes,
        data=data,
        batches=batches,
        steps=steps,
        keys=jax.device_put(jnp.stack(keys), sharding.replicated(mesh)),
        programs=loaded.programs,
    )


def _make_state(points: Sequence[Point], trained: Tree, *, steps: int, mesh: Mesh) -> TrainState:
    """The state of K adapters: moments of zeros, and each one's own rates."""
    count = len(points)
    # The rates of the first point are replaced below; the rest of its optimizer is that of all.
    tx = make_optimizer(points[0].config.optim, steps=steps)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), trained)
    places = jax.tree.map(lambda leaf: _unstacked(leaf.sharding), trained)
    # A moment lies where its parameter does. K, in front, is not split.
    opt_places = sharding.state_shardings(tx, one, places, mesh=mesh)
    opt_places = jax.tree.map(lambda place: NamedSharding(mesh, P(None, *place.spec)), opt_places)
    peaks = [peak_rates(point.config.optim) for point in points]
    stacked_peaks = {}
    for group in peaks[0]:
        rates = [own[group] for own in peaks]
        stacked_peaks[group] = np.array(rates, np.float32)

    def init(trained: Tree) -> Any:
        return with_peak_rates(jax.vmap(tx.init)(trained), stacked_peaks)

    opt_state = jax.jit(init, out_shardings=opt_places)(trained)
    step = sharding.place(np.zeros(count, np.int32), sharding.replicated(mesh))
    return TrainState(step, trained, opt_state)


def _unstacked(place: NamedSharding) -> NamedSharding:
    """The sharding of one adapter's leaf."""
    return NamedSharding(place.mesh, P(*place.spec[1:]))


def _check_data(points: Sequence[Point], data: Sequence[Dataset]) -> None:
    """Raise if points cannot be compared, or their rows have other shapes."""
    if not data[0].validation.rows:
        raise ValueError(
            "a sweep compares its points by their validation loss, and there are no validation "
            "rows; give data.validation or data.validation_rows"
        )
    # With data.max_length auto, the rows of another seed may have a longest one of another length.
    lengths = {its.max_length: point for its, point in zip(data, points, strict=True)}
    if len(lengths) > 1:
        found = ", ".join(f"{length} at {point.name}" for length, point in lengths.items())
        raise ValueError(f"data.max_length auto gives {found}; give one number")


def _count_steps(points: Sequence[Point], batches: Sequence[Batches]) -> int:
    """The steps of all points."""
    counts: dict[int, Point] = {}
    # Packing fills rows in order, so an epoch of another seed may have more or fewer of them.
    for point, its in zip(points, batches, strict=True):
        counts.setdefault(count_steps(point.config.train, its), point)
    if len(counts) > 1:
        found = ", ".join(f"{steps} steps at {point.name}" for steps, point in counts.items())
        raise ValueError(f"train.epochs gives {found}; give --train.steps")
    return next(iter(counts))


def _check_read(
    config: Config, model: LoadedModel, leaves: tuple[Tree, Tree], batches: Batches, mesh: Mesh
) -> None:
    """Raise if the loss does not read every trained leaf of the first point."""
    trained, frozen = leaves
    batch = sharding.place_batch(batches.batch(0), mesh, microbatches=config.train.microbatches)
    state = TrainState(jnp.zeros((), jnp.int32), trained, None)
    check_contract(model, state, frozen, batch=batch, packed=config.data.pack)
