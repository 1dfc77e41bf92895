"""The model of a run as a checkpoint holds it, for runs that were interrupted or look back."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from lorax_ft.config import Config, MeshConfig
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft
from lorax_ft.interop.peft_checks import BASE
from lorax_ft.lowrank.terms import kept_start
from lorax_ft.models.model import LoadedModel
from lorax_ft.run.additions import with_additions, with_new_tokens
from lorax_ft.run.checkpoints import FOLDER, Checkpoints
from lorax_ft.sharding import make_mesh
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.state import abstract_state, owned_leaves, resumed_state
from lorax_ft.tree import Tree, combine, from_modules, modules


def load_checkpoint(run: Path, config: Config, *, step: int) -> tuple[LoadedModel, Tree]:
    """The base of a run, and its parameters with the adapters of a checkpoint, on one device.

    The parameters equal those that the run would have saved after this step. The base of the model
    is what the run's adapter folder is for: the original, or the quantized base beside the adapter.

    Args:
      run: the output folder.
      config: the run's config; its model may have another dtype.
      step: the step of the checkpoint (`resolve_checkpoint`).

    Raises:
      ValueError: the base, the adapter that the run continued, or the checkpoint cannot be read.
    """
    own_base = run / BASE
    path = config.model.path
    revision = config.model.revision
    if own_base.is_dir():
        path, revision = str(own_base), None
    model = load_model(
        path,
        revision=revision,
        chat_template=config.model.chat_template,
        dtype=config.model.dtype,
        quant=config.quant,
    )
    model = with_new_tokens(model, config)
    started = model
    if config.adapter.continue_from is not None:
        started = dataclasses.replace(model, params=load_peft(config.adapter.continue_from, model))
    started = with_additions(started, config)
    checkpoints = Checkpoints(run / FOLDER, keep=config.train.keep_checkpoints)
    return model, _params(started, config, checkpoints, step=step, own_base=own_base.is_dir())


def _params(
    model: LoadedModel,
    config: Config,
    checkpoints: Checkpoints,
    *,
    step: int,
    own_base: bool,
) -> Tree:
    """The parameters of the model with the trained leaves of a checkpoint."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    # The schedule's length does not change the optimizer state, which is restored and dropped.
    tx = make_optimizer(config.optim, steps=1)
    restore = functools.partial(checkpoints.restore, step=step)
    if not own_base:
        state, frozen = resumed_state(model, config.adapter, tx, mesh=mesh, restore=restore)
        return combine(state.trained, frozen)
    abstract, frozen = abstract_state(
        model.params, config.adapter, tx, layout=model.layout, mesh=mesh
    )
    state, owned = restore(abstract, owned_leaves(abstract.trained, frozen))
    return combine(model.params, _without_starts(combine(state.trained, owned)))


def _without_starts(leaves: Tree) -> Tree:
    """The leaves without A₀ and B₀: the quantized base that a run saved is without them already."""
    layers = modules(leaves)
    for path, layer in layers.items():
        kept = {name: leaf for name, leaf in layer.items() if name not in kept_start.TERM.leaves}
        layers[path] = kept
    return from_modules(layers)
