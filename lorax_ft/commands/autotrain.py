"""Fine-tune a model with the options of AutoTrain."""

from __future__ import annotations

import dataclasses
import sys

from lorax_ft import cli
from lorax_ft.config import Config
from lorax_ft.config.foreign.autotrain import TABLE, read_flags
from lorax_ft.config.foreign.source import AUTOTRAIN, named_keys, read_foreign
from lorax_ft.config.load import Loaded
from lorax_ft.options import given_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Config):
    """Fine-tune a model; beside the options of AutoTrain, those of train may be given."""

    dry_run: bool = False
    """Print what would be trained, the memory it needs and the first batch, then stop."""


def main() -> None:
    """Reads AutoTrain's options, then ours, then trains."""
    with cli.one_line_errors():
        task, *arguments = sys.argv[1:] or ["--help"]
        if {"--help", "-h"} & {task, *arguments}:
            print(_help())
            return
        if task != "llm":
            raise ValueError(f"autotrain {task}: only llm is run, as in autotrain llm --train …")
        run = _parse(arguments)
        # JAX takes seconds to import: errors in the options should not wait for it.
        from lorax_ft.run.translated import announced
        from lorax_ft.sweep.rate import train

        config = announced(run.config, run.source)
        with named_keys(run.source):
            train(config, dry_run=run.args.dry_run, command=cli.command_line())


def _parse(arguments: list[str]) -> cli.Run[Args]:
    """The run that the options of a command line mean."""
    document, ours = read_flags(arguments)
    config, source = read_foreign(document, AUTOTRAIN, given_options(ours))
    return cli.parse_over(Args, Loaded(config, source), argv=ours)


def _help() -> str:
    """The options of AutoTrain, with ours."""
    lines = [
        "usage: lorax-ft autotrain llm --train --model MODEL --data-path DATA [OPTIONS]",
        "",
        "Fine-tune a model with the options of AutoTrain. Options of lorax-ft train, such as",
        "--train.steps 5 and --dry-run, may stand beside them, and win.",
        "",
        "options, and what they set:",
    ]
    for name, rule in TABLE.items():
        sets = " ".join(rule.options) if rule.options else rule.remark
        lines.append(f"  --{name.replace('_', '-'):<31} {sets}")
    return "\n".join(lines)
