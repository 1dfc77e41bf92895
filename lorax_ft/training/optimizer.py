"""The optimizer: each group of leaves with a learning rate of its own, in `optax.multi_transform`.

    update = −rate · (direction + decay · parameter),   rate = peak · schedule(step)

The peak is a number in the state, and the schedule, whose peak is 1, is part of the program. So
states with different rates can be stacked and vmapped. LoRA+ (2402.12354) is a peak for B that is λ
times A's.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_ft.config import OptimConfig
from lorax_ft.lowrank.groups import label
from lorax_ft.schema import Group
from lorax_ft.training.pairs import precondition_pairs, scale_by_lora_muon
from lorax_ft.tree import Tree

PAIR = (Group.LORA_A, Group.LORA_B)
DECAYED = (*PAIR, Group.WEIGHT)


class RateState(NamedTuple):
    """The learning rate of a group. `optax.tree.get_all_with_path` finds its fields by name."""

    step: Array
    """Updates made so far, int32."""
    peak: Array
    """float32."""
    rate: Array
    """The rate that the last update used, float32."""


def make_optimizer(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """Clipping of the global norm over all groups, then the optimizer of each group.

    Args:
      config: rates, schedule, decay.
      steps: the length of the run.

    Returns:
      A transformation for the tree of trained leaves (`partition(params)[0]`). λ · rate goes to
      every B, an embedding's too; `magnitude_ratio` · rate to magnitudes, `prompt_ratio` · rate to
      soft prompts; the rate itself to the rest. A, B and whole matrices are decayed; magnitudes,
      biases, norms, IA3 and soft prompts are not.
    """
    unit = unit_schedule(config, steps=steps)
    transforms: dict[Any, Any] = {}
    for group in Group:
        transforms[group.value] = _group_transform(config, group, unit)
    clip = optax.identity()
    if config.clip_norm:
        clip = optax.clip_by_global_norm(config.clip_norm)
    # These need A and B together, which are two groups.
    of_pairs = []
    if config.riemannian:
        of_pairs.append(precondition_pairs())
    if config.optimizer == "lora_muon":
        of_pairs.append(scale_by_lora_muon(config.b1))
    return optax.chain(clip, *of_pairs, optax.multi_transform(transforms, _labels))


def unit_schedule(config: OptimConfig, *, steps: int) -> optax.Schedule:
    """The learning rate at each step over its peak.

    Warm-up ends at 1, and its first value is above 0, so that no step is idle.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * steps)
    # At least one step is left after the warm-up.
    warmup = min(warmup, steps - 1)
    rest = max(steps - warmup, 1)
    last = config.final_fraction
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(1.0, rest, alpha=last)
    elif config.schedule == "linear":
        fall = optax.linear_schedule(1.0, last, rest)
    elif config.schedule == "wsd":  # warmup-stable-decay: falls over the last fifth
        fifth = max(rest // 5, 1)
        fall = optax.linear_schedule(1.0, last, fifth, transition_begin=rest - fifth)
    else:
        fall = optax.constant_schedule(1.0)
    first = 1.0 / max(warmup, 1)
    rise = optax.linear_schedule(first, 1.0, max(warmup - 1, 1))
    return optax.join_schedules([rise, fall], [warmup])


def scale_by_rate(peak: float, unit: optax.Schedule) -> optax.GradientTransformation:
    """Multiplies updates by −peak · unit(step), with the peak in the state."""

    def init(params: optax.Params) -> RateState:
        return RateState(
            step=jnp.zeros((), jnp.int32),
            peak=jnp.asarray(peak, jnp.float32),
            rate=jnp.zeros((), jnp.float32),
        )

    def update(
        updates: optax.Updates,
        state: RateState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, RateState]:
        rate = (state.peak * unit(state.step)).astype(jnp.float32)

        def scale(u: Array) -> Array:
            # The product is in float32; the update keeps its own dtype.
            return (-rate * u).astype(u.dtype)

        scaled = jax.tree.map(scale, updates)
        next_step = optax.safe_increment(state.step)
        return scaled, RateState(next_step, state.peak, rate)

    return optax.GradientTransformation(init, update)


def learning_rates(opt_state: Any, groups: Set[str]) -> dict[str, Array]:
    """The rates that the last update used for these groups, as far as the state has them."""
    rates = {}
    # optax.multi_transform keeps the state of each group under the group's name.
    for path, rate in optax.tree.get_all_with_path(opt_state, "rate"):
        for key in path:
            if getattr(key, "key", None) in groups:
                rates[str(key.key)] = rate
    return rates


def peak_rates(config: OptimConfig) -> dict[str, float]:
    """The peak learning rate of each group."""
    ratios = {
        Group.LORA_B: config.lora_plus_ratio,
        Group.MAGNITUDE: config.magnitude_ratio,
        Group.PROMPT: config.prompt_ratio,
    }
    return {group.value: config.peak * ratios.get(group, 1.0) for group in Group}


def with_peak_rates(opt_state: Any, peaks: Mapping[str, Any]) -> Any:
    """The optimizer's state with other peak learning rates, each an array of the old one's shape.

    Args:
      opt_state: the state of `make_optimizer`'s transformation.
      peaks: the peak of each group (`peak_rates`).
    """

    def replaced(path: tuple[Any, ...], state: Any) -> Any:
        if not isinstance(state, RateState):
            return state
        # optax.multi_transform keeps the state of each group under the group's name.
        group = next(key.key for key in path if getattr(key, "key", None) in peaks)
        peak = jnp.asarray(peaks[group], jnp.float32)
        return state._replace(peak=peak)

    return jax.tree_util.tree_map_with_path(
        replaced, opt_state, is_leaf=lambda state: isinstance(state, RateState)
    )


def _labels(trained: Tree) -> Tree:
    # Every leaf trains here, so those of the base belong to modules that train in full.
    return label(trained, whole=("all",))


def _group_transform(
    config: OptimConfig,
    group: Group,
    unit: optax.Schedule,
) -> optax.GradientTransformation:
    """The optimizer of one group."""
    decay = config.weight_decay if group in DECAYED else 0.0
    if config.optimizer == "lora_muon" and group in PAIR:
        decay /= 2  # of each factor, so that A B decays as a whole matrix would
    peak = peak_rates(config)[group.value]
    return optax.chain(
        _direction(config, group),
        optax.add_decayed_weights(decay),  # decoupled: behind the moments
        scale_by_rate(peak, unit),
    )


def _direction(config: OptimConfig, group: Group) -> optax.GradientTransformation:
    """What the optimizer makes of a gradient, before decay and rate."""
    if config.optimizer == "lora_muon" and group in PAIR:
        return optax.identity()
    if config.optimizer == "sgd":
        return optax.trace(config.b1)
    if config.optimizer == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    nesterov = config.optimizer == "nadamw"
    return optax.scale_by_adam(config.b1, config.b2, config.eps, nesterov=nesterov)
