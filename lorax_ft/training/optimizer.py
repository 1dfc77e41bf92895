"""The optimizer: one group of the tree a leaf name, each with its own rate, in `optax.multi_transform`.

LoRA+ (2402.12354) is nothing but a rate for B that is λ times A's.
"""

from __future__ import annotations

from typing import Any

import optax
from jax import Array

from lorax_ft.config import OptimConfig
from lorax_ft.lowrank.groups import label
from lorax_ft.tree import Tree

DECAYED = ("lora_a", "lora_b", "weight")


def make_optimizer(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """Clipping of the global norm over all groups, then the optimizer of each group.

    Args:
      config: rates, schedule, decay.
      steps: the length of the run.

    Returns:
      A transformation for the tree of trained leaves (`partition(params)[0]`). λ · rate goes to every
      `lora_b`, an embedding's too; `magnitude_ratio` · rate to magnitudes; the rate itself to the rest.
      A, B and whole matrices are decayed; magnitudes, biases and norms are not.
    """
    ratios = {
        "lora_a": 1.0,
        "lora_b": config.lora_plus_ratio,
        "magnitude": config.magnitude_ratio,
        "weight": 1.0,
        "vector": 1.0,
    }
    groups = {group: _group(config, group, ratio, steps) for group, ratio in ratios.items()}
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.multi_transform(groups, _labels))


def schedule(config: OptimConfig, *, steps: int, ratio: float = 1.0) -> optax.Schedule:
    """The learning rate at each step. Warm-up ends at the peak and its first rate is above 0, so no step is idle."""
    peak = config.learning_rate * ratio
    last = peak * config.final_fraction
    warmup = min(round(config.warmup_fraction * steps), steps - 1)
    rest = max(steps - warmup, 1)
    falls = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: optax.linear_schedule(
            peak, last, max(rest // 5, 1), transition_begin=rest - max(rest // 5, 1)
        ),
    }
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, falls[config.schedule]()], [warmup])


def learning_rates(state: Any, groups: set[str]) -> dict[str, Array]:
    """The rates that the last update used, by group, read from the optimizer's state."""
    inner = state[1].inner_states
    return {
        group: inner[group].inner_state.hyperparams["learning_rate"] for group in sorted(groups)
    }


def _labels(trained: Tree) -> Tree:
    return label(trained, whole=("all",))


def _group(
    config: OptimConfig, group: str, ratio: float, steps: int
) -> optax.GradientTransformation:
    rate = schedule(config, steps=steps, ratio=ratio)
    decay = config.weight_decay if group in DECAYED else 0.0
    moments = {"b1": config.b1, "b2": config.b2}
    if config.optimizer == "sgd":
        return optax.inject_hyperparams(_sgd, static_args=("momentum", "decay"))(
            rate, momentum=config.b1, decay=decay
        )
    if config.optimizer == "adam":
        return optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps"))(
            rate, eps=config.eps, **moments
        )
    if config.optimizer == "lion":
        lion = optax.inject_hyperparams(optax.lion, static_args=("b1", "b2", "weight_decay"))
        return lion(rate, weight_decay=decay, **moments)
    factory = optax.adamw if config.optimizer == "adamw" else optax.nadamw
    adamw = optax.inject_hyperparams(factory, static_args=("b1", "b2", "eps", "weight_decay"))
    return adamw(rate, weight_decay=decay, eps=config.eps, **moments)


def _sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float, decay: float
) -> optax.GradientTransformation:
    decoupled = optax.add_decayed_weights(decay)  # behind the momentum
    return optax.chain(
        optax.trace(momentum), decoupled, optax.scale_by_learning_rate(learning_rate)
    )
