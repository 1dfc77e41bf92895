"""What a run says of a config of another trainer, and what depends on the devices in it."""

from __future__ import annotations

import jax
from rich.table import Table
from rich.text import Text

from lorax_ft.config import Config
from lorax_ft.config.foreign.source import Source, for_devices
from lorax_ft.run.report import GAP, make_console

WIDEST = 40
"""Columns of the names of keys."""


def announced(config: Config, source: Source | None, *, devices: int | None = None) -> Config:
    """Print what became of a file's keys where it is not obvious.

    Args:
      config: what the file means for one device.
      source: the file; None: the config is one of ours, of which nothing is to be said.
      devices: the devices of the run; None: those that JAX has.

    Returns:
      The config for the devices: the batch, and whether they split the weights.
    """
    if source is None:
        return config
    number = jax.device_count() if devices is None else devices
    config, of_devices = for_devices(config, source, number)
    grid = Table.grid(padding=(0, GAP))
    grid.add_column(max_width=WIDEST)
    for keys, text in [*source.remarks(), *of_devices]:
        grid.add_row(Text(keys, style="cyan"), Text(text))
    console = make_console()
    console.print(f"{source.path}, read as {source.trainer}'s:", markup=False)
    console.print(grid)
    console.print()
    return config
