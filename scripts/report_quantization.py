"""How much of NF4's quantization error QPiSSA and LoftQ recover: a Markdown table by layer type.

    python scripts/report_quantization.py --model MODEL > table.md

For each matrix W, the initial error of QLoRA is ‖W − nf4(W)‖, and that of QPiSSA and LoftQ is
‖W − (Q + A B)‖, in the nuclear norm. The table shows by how many percent QPiSSA and LoftQ reduce
QLoRA's error (PiSSA, 2404.02948, table 8).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator

import jax
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import track
from threadpoolctl import threadpool_limits

import lorax_ft as lft
from lorax_ft import cli
from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import InitContext
from lorax_ft.lowrank.inits.loftq import loftq
from lorax_ft.lowrank.inits.pissa import pissa
from lorax_ft.quant.kernels import dense, quantize
from lorax_ft.tree import modules

STARTS = ("QPiSSA", "LoftQ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """How much of NF4's quantization error QPiSSA and LoftQ recover, by layer type."""

    model: str
    """Base model: a Hugging Face folder, a .gguf file or a Hub id."""
    ranks: tuple[int, ...] = (16, 64)
    """Adapter ranks to report."""
    rounds: tuple[int, ...] = (1, 5)
    """Numbers of alternating rounds of quantization and SVD."""
    every: int = 5
    """Use every Nth layer."""


def main(args: Args) -> None:
    """Print the table."""
    if args.every < 1:
        raise ValueError(f"--every is {args.every}; it must be above 0")
    columns = [
        (start, rank, rounds) for rank in args.ranks for start in STARTS for rounds in args.rounds
    ]
    print(f"| layer | matrices | {' | '.join(f'{s} r={r}, {n} rounds' for s, r, n in columns)} |")
    print("|---|---:|" + "---:|" * len(columns))
    everything: list[list[float]] = [[] for _ in columns]
    with threadpool_limits(1, user_api="blas"):
        for name, stack in _kernels(args):
            reductions = [[reduction(w, *column) for w in stack] for column in columns]
            for column, values in zip(everything, reductions, strict=True):
                column += values
            print(_row(name, reductions))
    print(_row("all", everything))


def reduction(w: Array, start: str, rank: int, rounds: int) -> float:
    """The reduction of QLoRA's error in percent."""
    stack = w[None]
    context = InitContext(
        kernel=stack,
        rank=rank,
        ranks=np.array([rank]),
        scales=np.ones(1),
        keys=jax.random.split(jax.random.key(0), 1),
        quantize=rounded,
        rounds=rounds,
    )
    init = pissa if start == "QPiSSA" else loftq
    begun = init(context)
    assert begun.removed is not None
    base = rounded(stack - highest_matmul(*begun.removed))
    left = nuclear(stack - base - highest_matmul(*begun.factors))
    return 100 * (1 - left / nuclear(stack - rounded(stack)))


def rounded(w: Array) -> Array:
    """Quantize to NF4 and dequantize."""
    return dense(quantize(w, format="nf4", n_stack=1, n_in=1))


def nuclear(error: Array) -> float:
    """The sum of the singular values of a stack of one matrix."""
    return float(np.linalg.svd(np.asarray(error[0]), compute_uv=False).sum())


def _kernels(args: Args) -> Iterator[tuple[str, Array]]:
    """The matrices `[N, I, O]` of each layer type."""
    layers = modules(lft.load_model(args.model).params)
    paths = [path for path in layers if path.endswith("_proj")]
    for path in track(paths, console=Console(stderr=True)):
        yield path.rpartition("/")[2], layers[path]["kernel"][:: args.every]


def _row(name: str, reductions: list[list[float]]) -> str:
    cells = [f"{statistics.mean(values):.1f}" for values in reductions]
    return f"| {name} | {len(reductions[0])} | {' | '.join(cells)} |"


if __name__ == "__main__":
    cli.run(main, Args)
