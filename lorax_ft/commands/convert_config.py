"""Write a config of another trainer, or a saved one, as one of our Python configs."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Annotated

import tyro

from lorax_ft import cli
from lorax_ft.config.foreign.source import for_devices
from lorax_ft.config.load import read_config
from lorax_ft.config.python_file import WIDTH, config_file
from lorax_ft.files import write_file
from lorax_ft.program import command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Write a config of LLaMA-Factory or PEFT, or the config.json of a run, as a Python config."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The file, as train --config takes it."""
    output: str | None = None
    """Python file to write; None prints it."""
    devices: int = 1
    """Devices of the run, by which a batch size per device is multiplied."""
    overwrite: bool = False
    """Replace the output file."""


def main() -> None:
    """Parses the command line, then runs the command."""
    cli.run(convert, Args)


def convert(args: Args) -> None:
    """Reads the file and writes the config."""
    if args.devices < 1:
        raise ValueError(f"--devices is {args.devices}; it must be above 0")
    text = converted(args.config, args.output or "FILE.py", devices=args.devices)
    if args.output is None:
        print(text, end="")
        return
    output = Path(args.output)
    if output.suffix != ".py":
        raise ValueError(f"--output {output}: give a file that ends in .py")
    if output.exists() and not args.overwrite:
        raise ValueError(f"--output {output} exists; give another one, or --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: the folder {output.parent} does not exist")
    write_file(output, text)
    print(f"{output}: {command('train')} --config {output}")


def converted(path: str, output: str, *, devices: int) -> str:
    """A config file as Python, with what became of its keys in the docstring."""
    config, source = read_config(path)
    lines = [f"{Path(path).name} as a config of lorax_ft.", ""]
    lines += [f"    {command('train')} --config {output}", ""]
    if source is not None:
        config, of_devices = for_devices(config, source, devices)
        lines[0] = f"{Path(path).name}, a config of {source.trainer}."
        for keys, text in [*source.remarks(), *of_devices]:
            lines += textwrap.wrap(f"{keys}: {text}", WIDTH, subsequent_indent="    ")
    lines.append("Options that are not here have their defaults.")
    return config_file(config, docstring="\n".join(lines) + "\n")
