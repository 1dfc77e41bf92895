"""The contract at the end of a run: frozen weights are as they were, and the result reads back.

The adapter is read from its folder and put on the base that is in memory, so that there is no
second copy of it. An init such as PiSSA took its start out of that base, which the adapter in the
folder subtracts itself; it is added again as a product of the forward. A model that was trained in
full is compared with its folder leaf by leaf.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.interop.bucket import local_copy
from lorax_ft.interop.expert_stacks import split_experts
from lorax_ft.interop.huggingface import family_names, read_folder, stacks_experts
from lorax_ft.interop.lazy_tensor import Read
from lorax_ft.interop.params import Parts, load_params
from lorax_ft.interop.peft import load_peft
from lorax_ft.lowrank.adapters import with_norms
from lorax_ft.lowrank.terms import kept_start, low_rank
from lorax_ft.models.model import WITHOUT_START, LoadedModel, Model
from lorax_ft.run.fingerprint import leaf_checksums
from lorax_ft.run.setup import Job
from lorax_ft.schema import is_base
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Shape, Tree, combine, flatten, from_modules, modules, split

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""The largest difference of two models' logits, as a fraction of their norm, by their dtype."""
PLACES = 32
"""Tokens of each row whose logits are compared."""


def verify(job: Job, state: TrainState, saved: Path, *, base: Path | None) -> str:
    """Check the frozen leaves, and what was saved.

    Of several processes, none reads the result again: each holds a part of the base only.

    Args:
      job: the run.
      state: whose leaves were saved.
      saved: the folder of the adapter, or of the model after full fine-tuning.
      base: the folder of the base, if the init changed a quantized one.

    Returns:
      What was found, in words, with the seconds that it took.

    Raises:
      ValueError: a frozen leaf changed, or the folder does not hold what was trained.
    """
    began = time.perf_counter()
    _check_frozen(job)
    found = "frozen weights bitwise unchanged"
    if jax.process_count() > 1:
        found += f"; {saved.name} not read again (several processes)"
    else:
        with local_copy(saved) as folder:
            found += f"; {_check_saved(job, state, folder, base)}"
    return f"{found}; {time.perf_counter() - began:.1f} s"


def _check_frozen(job: Job) -> None:
    found = leaf_checksums(job.frozen)
    changed = [path for path, checksum in job.frozen_checksums.items() if found[path] != checksum]
    if changed:
        raise ValueError(
            f"{len(changed)} frozen leaves changed while the run trained, the first {changed[0]}: "
            "the memory or the device is faulty, or this is a bug; what was saved is not to be "
            "trusted"
        )


def _check_saved(job: Job, state: TrainState, folder: Path, base: Path | None) -> str:
    if not job.config.adapter.targets and "all" in job.config.adapter.train_whole:
        _check_model(job.model, state.trained, folder)
        return "the model read again is bitwise the trained one"
    params = combine(state.trained, job.frozen)
    read = _read_again(job, state, folder, base)
    tokens = job.batch(0)[0]
    microbatch = {name: values[0] for name, values in tokens.items()}
    with jax.set_mesh(job.mesh):
        expected = _logits(job, params, microbatch)
        if not jnp.isfinite(expected).all():
            return "adapter not compared, as the trained model's logits are not finite"
        difference = float(_difference(_logits(job, read, microbatch), expected))
    # NaN is too large as well.
    if not difference <= TOLERANCES[job.model.config.dtype]:
        raise ValueError(
            f"the adapter in {folder} does not give the logits of the trained model: they differ "
            f"by {difference:.2g} of their norm; the checkpoint of the last step has the weights, "
            "and the same command saves them again (train.verify)"
        )
    return f"adapter read again gives the trained model's logits (difference {difference:.1g})"


def _read_again(job: Job, state: TrainState, folder: Path, base: Path | None) -> Tree:
    """The parameters with the adapter of the folder, on the base that is in memory."""
    own, _ = split(job.frozen, is_base)
    trained, _ = split(state.trained, is_base)
    # Modules that were trained in full come from the folder; what it lacks would stay 0.
    own = combine(own, jax.tree.map(jnp.zeros_like, trained))
    fields = {field.name: getattr(job.model, field.name) for field in dataclasses.fields(Model)}
    if base is not None:
        hf_config = {**job.model.hf_config, WITHOUT_START: True}
        fields |= {"source": str(base), "hf_config": hf_config}
    params = load_peft(folder, LoadedModel(**fields, params=own))
    if base is not None:
        return params
    return _with_starts(params, modules(job.frozen))


def _with_starts(params: Tree, frozen: dict[str, Tree]) -> Tree:
    """The parameters plus s A₀ B₀ where the base is W − s A₀ B₀ and the adapter is for W."""
    layers = modules(params)
    for path, layer in frozen.items():
        if kept_start.is_in_base(layer):
            start = {name: layer[name] for name in (kept_start.A0, kept_start.B0)}
            # The forward subtracts a start that is kept beside the base.
            layers[path] |= start | {kept_start.SCALE: -layer[low_rank.SCALE]}
    return from_modules(layers)


def _logits(job: Job, params: Tree, batch: dict[str, Array]) -> Array:
    """Logits `[B, PLACES, V]` of a batch `[B, T]`, at places that are spread over each row."""
    model, packed = job.model, job.config.data.pack
    stride = max(batch["tokens"].shape[1] // PLACES, 1)

    @jax.jit
    def apply(params: Tree, batch: dict[str, Array]) -> Array:
        params = with_norms(params, layout=model.layout)
        segments = batch["segment_ids"] if packed else None
        features, _ = model.features(params, batch["tokens"], batch["positions"], segments)
        return model.logits(params, features[:, ::stride])

    return apply(params, batch)


@jax.jit
def _difference(found: Array, expected: Array) -> Array:
    """The norm of a difference as a fraction of the norm."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


def _check_model(model: Model, trained: Tree, folder: Path) -> None:
    """Raise where a leaf in a model's folder differs from the trained one."""
    leaves = flatten(trained)
    _, tensors = read_folder(folder)
    if stacks_experts(model.hf_config):
        tensors = split_experts(tensors)

    def compare(path: str, shape: Shape, read: Read, parts: Parts) -> None:
        everything = tuple(slice(None) for _ in shape)
        if not np.array_equal(read(everything), np.asarray(leaves[path])):
            raise ValueError(f"{folder} does not hold the trained {path}; the checkpoint does")

    load_params(
        dataclasses.replace(model.config, dtype="float32"),
        tensors,
        names=family_names(model.hf_config),
        source=str(folder),
        place=compare,
    )
