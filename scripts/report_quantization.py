"""How much of what NF4 loses do the starts win back? A table by type of layer, in Markdown.

    python scripts/report_quantization.py --model MODEL > table.md

For each matrix W the error of QLoRA's start is ‖W − nf4(W)‖, that of QPiSSA's and LoftQ's ‖W − (Q + A B)‖, in the
nuclear norm; the table has the reduction of the one by the other in per cent (PiSSA, 2404.02948, table 8).
"""

from __future__ import annotations

import dataclasses
import functools
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
from lorax_ft.lowrank.loftq import loftq
from lorax_ft.lowrank.pissa import pissa
from lorax_ft.lowrank.svd import product, svd
from lorax_ft.quant.kernels import dense, quantize
from lorax_ft.tree import modules

STARTS = ("QPiSSA", "LoftQ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """How much of what NF4 loses QPiSSA and LoftQ win back, by type of layer."""

    model: str
    """Hugging Face folder, .gguf file or hub id."""
    ranks: tuple[int, ...] = (16, 64)
    """Ranks of the adapters."""
    rounds: tuple[int, ...] = (1, 5)
    """Rounds of decomposition and quantizing."""
    every: int = 5
    """Take every so-manieth layer."""


def main(args: Args) -> None:
    """Prints the table."""
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
    """By how many per cent a start's error is below QLoRA's."""
    stack = w[None]
    decomposed = functools.partial(
        svd, rank=rank, iterations=None, keys=jax.random.split(jax.random.key(0), 1)
    )
    if start == "QPiSSA":
        last = taken = pissa(stack, svd=decomposed, rounded=rounded, rounds=rounds)
    else:
        last, taken = loftq(stack, rank=rank, svd=decomposed, rounded=rounded, rounds=rounds)
    base = rounded(stack - product(*taken))
    return 100 * (1 - nuclear(stack - base - product(*last)) / nuclear(stack - rounded(stack)))


def rounded(w: Array) -> Array:
    """To NF4 and back."""
    return dense(quantize(w, format="nf4", n_stack=1, n_in=1))


def nuclear(error: Array) -> float:
    """The sum of the singular values of a stack of one matrix."""
    return float(np.linalg.svd(np.asarray(error[0]), compute_uv=False).sum())


def _kernels(args: Args) -> Iterator[tuple[str, Array]]:
    """The type of each kind of layer, and its matrices `[N, I, O]`."""
    layers = modules(lft.load_model(args.model).params)
    paths = [path for path in layers if path.endswith("_proj")]
    for path in track(paths, console=Console(stderr=True)):
        yield path.rpartition("/")[2], layers[path]["kernel"][:: args.every]


def _row(name: str, reductions: list[list[float]]) -> str:
    cells = [f"{statistics.mean(values):.1f}" for values in reductions]
    return f"| {name} | {len(reductions[0])} | {' | '.join(cells)} |"


if __name__ == "__main__":
    cli.run(main, Args)
