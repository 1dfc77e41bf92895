"""Fine-tune a model."""

from __future__ import annotations

import dataclasses

from lorax_ft import cli
from lorax_ft.config import Config
from lorax_ft.config.foreign.source import named_keys

HEARTBEAT_SECONDS = 30
"""A process that says nothing for so long is taken for dead, and JAX ends the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Config):
    """Fine-tune a model as a config file says; options override the values of the file."""

    config: str | None = None
    """Config: a Python file with get_config(), a name such as pissa, a .yaml or .json file with
    our sections or of LLaMA-Factory, or PEFT's adapter_config.json. The defaults below are its
    values."""
    dry_run: bool = False
    """Print what would be trained, the memory it needs and the first batch, then stop."""
    multihost: bool = False
    """Join all processes of a TPU pod or a Slurm job into one run: calls
    jax.distributed.initialize(). Start the same command on every host."""


def main() -> None:
    """Reads the config file, then the options, then trains."""
    with cli.one_line_errors():
        args, config, source = cli.parse_run(Args)
        if args.multihost:
            _join_processes()
        # JAX takes seconds to import: --help and errors in the options should not wait for it.
        # It must also not look for devices before the processes are joined.
        from lorax_ft.run.translated import announced
        from lorax_ft.sweep.rate import train

        config = announced(config, source)
        command = cli.command_line()
        with named_keys(source):
            train(config, dry_run=args.dry_run, command=command)


def _join_processes() -> None:
    """Joins the processes of all hosts into one JAX runtime."""
    import jax

    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ValueError(
            f"--multihost: JAX found no other processes ({error}); it detects those of TPU pods, "
            "Slurm, Open MPI and Kubernetes"
        ) from error
