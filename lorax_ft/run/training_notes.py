"""What the model card says about the run that trained an adapter or a model."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

import jax

from lorax_ft.config import Config
from lorax_ft.data.dataset import Dataset
from lorax_ft.models.model import Model
from lorax_ft.schema import METHODS

PACKAGES = ("lorax_ft", "jax", "flax", "optax", "transformers")


def training_notes(
    config: Config,
    model: Model,
    data: Dataset,
    *,
    steps: str,
    results: Mapping[str, str],
    command: str | None,
) -> str:
    """The facts of a run as Markdown: method, data, steps, results, versions and command.

    Args:
      config: the run.
      model: its base.
      data: what it trained on.
      steps: the steps that were made, in words.
      results: metrics before and after training, in words.
      command: the command line; None: the run was started from Python.
    """
    facts = {
        "Base": _code(model.base),
        "Method": _method(config),
    }
    facts |= _data(config, data)
    facts["Steps"] = f"{steps}, {config.train.batch_size} rows each"
    facts["Optimizer"] = _optimizer(config)
    for name, value in results.items():
        facts[name.capitalize()] = value
    facts["Devices"] = _devices()
    facts["Versions"] = _versions()
    text = ""
    for name, value in facts.items():
        text += f"- **{name}:** {value}\n"
    if command is not None:
        text += f"\nCommand:\n\n```bash\n{command}\n```\n"
    return text


def _method(config: Config) -> str:
    """The method and its options, as they were set."""
    adapter, prompt = config.adapter, config.prompt
    soft_prompt = ""
    if prompt.kind != "none":
        soft_prompt = f"soft {prompt.kind} of {prompt.virtual_tokens} virtual tokens"
        if prompt.encoder != "none":
            soft_prompt += f", encoder {prompt.encoder}"
    tokens = _trained_tokens(config)
    if not adapter.targets and not adapter.train_whole:
        return soft_prompt or tokens
    if not adapter.targets:
        return f"full fine-tuning of {_codes(adapter.train_whole)}"
    parts: list[str] = [adapter.method]
    if adapter.continue_from is not None:
        # The rank and the targets are those of the folder.
        parts.append(f"continued from {_code(adapter.continue_from)}")
        return ", ".join(parts)
    for option in METHODS[adapter.method]:
        value = getattr(adapter, option)
        if isinstance(value, tuple):
            value = _codes(value)
        if value not in (None, "", False):
            parts.append(f"{option} {value}")
    parts.append(f"targets {_codes(adapter.targets)}")
    if soft_prompt:
        parts.append(soft_prompt)
    if tokens:
        parts.append(tokens)
    if adapter.train_whole:
        parts.append(f"fully trained {_codes(adapter.train_whole)}")
    return ", ".join(parts)


def _trained_tokens(config: Config) -> str:
    """Which tokens' rows train, in words."""
    tokens = (*config.data.new_tokens, *config.adapter.trainable_tokens)
    if not tokens:
        return ""
    return f"rows of the tokens {_codes(tuple(map(str, tokens)))}"


def _data(config: Config, data: Dataset) -> dict[str, str]:
    """The paths of the data, and their sizes."""
    train = data.train
    size = (
        f"{train.count:,} samples in {len(train.rows):,} rows of {data.max_length:,} tokens, "
        f"{train.tokens:,} tokens ({train.labels:,} with loss)"
    )
    described = {"Data": f"{_codes(config.data.train)}: {size}"}
    sizes = []
    for name, split in data.validation_sets.items():
        # A single set has no name.
        sizes.append(f"{name} {len(split.rows):,} rows".strip())
    if sizes:
        rows = ", ".join(sizes)
        paths = _codes(config.data.validation)
        # Without paths, the rows were split off the training data.
        described["Validation"] = f"{paths}: {rows}" if paths else rows
    return described


def _optimizer(config: Config) -> str:
    """The optimizer and what its steps depend on."""
    optim = config.optim
    rate = f"learning rate {optim.peak:g}"
    return f"{optim.optimizer}, {rate}, schedule {optim.schedule}, seed {config.train.seed}"


def _devices() -> str:
    """The number and the kind of the devices."""
    devices = jax.devices()
    return f"{len(devices)} × {devices[0].device_kind}"


def _versions() -> str:
    """The versions of the packages that the result depends on."""
    versions = []
    for name in PACKAGES:
        version = importlib.metadata.version(name)
        versions.append(f"{name} {version}")
    versions.append(f"Python {platform.python_version()}")
    return ", ".join(versions)


def _codes(values: tuple[str, ...]) -> str:
    return " ".join(map(_code, values))


def _code(text: str) -> str:
    """Text between backticks, in which Markdown leaves patterns and paths as they are."""
    return f"`{text}`"
