"""What the model card says about the run that trained an adapter or a model."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

import jax

from lorax_ft.config import Config
from lorax_ft.data.dataset import Dataset
from lorax_ft.run.setup import Job
from lorax_ft.schema import METHODS

PACKAGES = ("lorax_ft", "jax", "flax", "optax", "transformers")


def training_notes(job: Job, *, steps: str, results: Mapping[str, str], command: str | None) -> str:
    """The facts of a run as Markdown: method, data, steps, results, versions and command.

    Args:
      job: the run.
      steps: the steps that were made, in words.
      results: metrics before and after training, in words.
      command: the command line; None: the run was started from Python.
    """
    config = job.config
    facts = {
        "Base": _code(job.model.base),
        "Method": _method(config),
        **_data(config, job.data),
        "Steps": f"{steps}, {config.train.batch_size} rows each",
        "Optimizer": f"{config.optim.optimizer}, learning rate {config.optim.learning_rate:g}, "
        f"schedule {config.optim.schedule}, seed {config.train.seed}",
        **{name.capitalize(): value for name, value in results.items()},
        "Devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "Versions": _versions(),
    }
    text = "".join(f"- **{name}:** {value}\n" for name, value in facts.items())
    if command is not None:
        text += f"\nCommand:\n\n```bash\n{command}\n```\n"
    return text


def _method(config: Config) -> str:
    """The method and its options, as they were set."""
    adapter = config.adapter
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
    if adapter.train_whole:
        parts.append(f"fully trained {_codes(adapter.train_whole)}")
    return ", ".join(parts)


def _data(config: Config, data: Dataset) -> dict[str, str]:
    """The paths of the data, and their sizes."""
    train = data.train
    described = {
        "Data": f"{_codes(config.data.train)}: {train.count:,} samples in {len(train.rows):,} rows "
        f"of {data.max_length:,} tokens, {train.tokens:,} tokens ({train.labels:,} with loss)"
    }
    sizes = [f"{name} {len(s.rows):,} rows".strip() for name, s in data.validation_sets.items()]
    paths = f"{_codes(config.data.validation)}: " if config.data.validation else ""
    if sizes:
        described["Validation"] = f"{paths}{', '.join(sizes)}"
    return described


def _versions() -> str:
    """The versions of the packages that the result depends on."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([*versions, f"Python {platform.python_version()}"])


def _codes(values: tuple[str, ...]) -> str:
    return " ".join(map(_code, values))


def _code(text: str) -> str:
    """Text between backticks, in which Markdown leaves patterns and paths as they are."""
    return f"`{text}`"
