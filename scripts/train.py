"""Fine-tune a model.

python scripts/train.py --config configs/pissa.py
python scripts/train.py --config configs/dora.py --model.path MODEL --data.train FILE.jsonl --adapter.rank 32
python scripts/train.py --config configs/lora.py --multihost --mesh.fsdp 16     # on every host of a pod
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from lorax_ft import cli
from lorax_ft.config import Config, load_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Config):
    """Fine-tune a model as a config file says; every value of the file can be overridden here."""

    config: str | None = None
    """Python file with get_config(); the values below are the file's."""
    dry_run: bool = False
    """Print what would train, the memory it takes and the first batch, and stop."""
    multihost: bool = False
    """Several processes run this together, such as one on each host of a TPU pod or of a Slurm job: join them by
    jax.distributed.initialize()."""


def main() -> None:
    """Read the config file, then the overrides, then train."""
    with cli.one_line_errors():
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config", nargs="?")
        file = first.parse_known_args()[0].config
        config = load_config(file) if file else Config()
        args = cli.parse(Args, default=Args(**_values(config), config=file))
        if args.multihost:
            _join()
        from lorax_ft.run.loop import train

        train(Config(**_values(args)), dry_run=args.dry_run)


def _join() -> None:
    """Make one run of several processes."""
    import jax

    try:
        jax.distributed.initialize()
    except ValueError as error:
        known = "it knows TPU pods, Slurm, Open MPI and Kubernetes"
        raise ValueError(
            f"--multihost: JAX finds no other processes here ({error}); {known}"
        ) from error


def _values(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}


if __name__ == "__main__":
    main()
