"""Which fields may differ between the points of a sweep, so that one program trains them all.

Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from lorax_ft.config import AdapterConfig, Config
from lorax_ft.schema import INITS
from lorax_ft.sweep.axes import Axis, Point, Range, describe_value

RATES = (
    *("optim.learning_rate", "optim.lora_plus_ratio", "optim.magnitude_ratio"),
    "optim.prompt_ratio",
)
"""Numbers in the optimizer's state."""
STARTS = (
    *("adapter.rank", "adapter.alpha", "adapter.scaling", "adapter.init"),
    *("adapter.rank_pattern", "adapter.alpha_pattern"),
    *("adapter.targets", "adapter.exclude", "adapter.layers"),
    *("adapter.calibration_batches", "adapter.eva_rho", "adapter.corda_mode"),
    *("adapter.lora_ga_gamma", "adapter.lora_one_gamma", "adapter.svd_iterations"),
    *("adapter.vera_d_initial", "adapter.lokr_factor", "adapter.oft_block_size"),
)
"""What the leaves of an adapter hold, and how many of them are not zero."""
PROMPT_STARTS = ("prompt.init", "prompt.text")
"""What the leaves of a soft prompt hold."""
SEED = "train.seed"
VARIED = (*RATES, *STARTS, *PROMPT_STARTS, SEED)
"""The fields that may differ."""
OTHER_LEAVES = (
    *("adapter.method", "adapter.dora", "adapter.freeze", "adapter.train_whole"),
    *("prompt.kind", "prompt.virtual_tokens", "prompt.encoder", "prompt.encoder_width"),
    *("adapter.invocation", "adapter.trainable_tokens", "data.new_tokens"),
)
"""Fields that decide which leaves there are, how long they are, or which of them train."""
UNUSED = (
    *("train.load_best", "train.patience", "train.max_minutes", "train.profile"),
    "eval.choices",
)
"""Options of a single run that would end or judge the runs of a sweep differently."""


def check_axes(axes: Sequence[Axis | Range]) -> None:
    """Raise unless one program can train all points of these axes.

    Raises:
      ValueError: a field that shapes the program has several values.
    """
    for axis in axes:
        # A single value is the same in all points, like the rest of the config.
        is_single = isinstance(axis, Axis) and len(axis.values) == 1
        if axis.field in VARIED or is_single:
            continue
        reason = "it is part of the compiled program"
        if axis.field in OTHER_LEAVES:
            reason = "it decides which leaves an adapter has"
        raise ValueError(
            f"--sweep {axis.field} has {_values(axis)}, but {reason}, which all adapters of a "
            f"sweep share; run a sweep for each value, with --{axis.field} and a "
            "--train.output of its own"
        )


def shared_values(config: Config) -> str:
    """All values that the points of a sweep share, so what a compiled program may depend on."""
    sections = json.loads(config.to_json())
    for field in VARIED:
        section, _, name = field.partition(".")
        del sections[section][name]
    return json.dumps(sections)


def check_config(config: Config, axes: Sequence[Axis | Range]) -> None:
    """Raise if the config has options that a sweep does not follow.

    Raises:
      ValueError: with the option and what to do.
    """
    for field in UNUSED:
        section, _, name = field.partition(".")
        value = getattr(getattr(config, section), name)
        if value:
            raise ValueError(
                f"{field} is {value}, but a sweep trains all points for the same steps and "
                f"compares their last ones; remove {field}"
            )
    if config.adapter.continue_from is None:
        return
    # An adapter to continue from brings its leaves, whatever the config says of their start.
    for axis in axes:
        if axis.field in STARTS:
            raise ValueError(
                f"--sweep {axis.field} has no effect: the adapter of adapter.continue_from, "
                f"{config.adapter.continue_from}, has its own; remove one of them"
            )


def with_shared_base(points: Sequence[Point]) -> list[Point]:
    """The points with `adapter.keep_base` where their inits would change the base differently.

    Raises:
      ValueError: an init cannot keep the base.
    """
    starts = {(point.config.adapter, point.config.train.seed) for point in points}
    # All points have the same start, and so the same base.
    if len(starts) == 1:
        return list(points)
    return [_keeping_base(point) for point in points]


def _keeping_base(point: Point) -> Point:
    """The point with `adapter.keep_base`, if its init changes the base."""
    adapter = point.config.adapter
    # PiSSA and its kin move a part of each kernel into the adapter, each by its rank and seed.
    if not _changes_base(adapter):
        return point
    # LoftQ (2310.08659) and QPiSSA quantize the base around the adapter: with keep_base they would
    # be another method.
    if changes_quantized_base(point.config):
        raise ValueError(
            f"adapter.init {adapter.init} changes the quantized base, which the adapters of a "
            f"sweep share; sweep {', '.join(RATES)} only, or run a sweep for each value"
        )
    adapter = dataclasses.replace(adapter, keep_base=True)
    config = dataclasses.replace(point.config, adapter=adapter)
    return dataclasses.replace(point, config=config)


def changes_quantized_base(config: Config) -> bool:
    """Whether the init quantizes the base around each adapter, so that none can share it."""
    return config.quant.format != "none" and _changes_base(config.adapter)


def _changes_base(adapter: AdapterConfig) -> bool:
    """Whether the base without the adapter's start is another one."""
    return (
        INITS[adapter.init].changes_base and adapter.continue_from is None and not adapter.keep_base
    )


def _values(axis: Axis | Range) -> str:
    """The values of an axis in words."""
    if isinstance(axis, Range):
        return f"values from {axis.low:g} to {axis.high:g}"
    return f"the values {', '.join(map(describe_value, axis.values))}"
