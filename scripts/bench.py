"""Benchmark training steps, PiSSA initialization and compilation against PEFT.

    python scripts/bench.py --model SmolLM2-135M-Instruct.gguf --peer PEER/bin/python --what step

A step trains on 4 rows of 256 random tokens, all of which count in the loss, in float32 with AdamW
and rank-8 adapters on all linear layers (rank 16 for PiSSA initialization). Every variant is a
separate process. The variants take turns, so that other load on the machine affects all of them
equally. The speed of a matrix product, measured before each turn, shows the state of the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import bench_peft
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from lorax_ft import cli

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROWS = 4
WARMUP = 2  # steps before the first one that is measured
LARGEST = 6e9  # bytes: an upper bound per process, kept free before another one starts
CALLS = {"pissa": 2, "compile": 0}  # calls of a process that lives for one turn
PEERS = {
    **bench_peft.STEPS,
    **bench_peft.METHODS,
    **bench_peft.INITS,
    **bench_peft.SERVES,
}
Sample = dict[str, Any]
Samples = dict[str, list[Sample]]
Product = Callable[[], float]
# Title, key, reduction over rounds, format.
Column = tuple[str, str, Callable[[Sequence[float]], float], str]
COLUMNS: list[Column] = [
    ("first call s", "first", statistics.median, ".2f"),
    ("seconds", "seconds", statistics.median, ".2f"),
    ("least", "seconds", min, ".2f"),
    ("ratio", "ratio", statistics.median, ".2f"),
    ("peak GB", "peak", max, ".2f"),
    ("trained M", "trained", max, ".3f"),
    ("temporaries GB", "temporaries", max, ".2f"),
    ("trace s", "trace", statistics.median, ".1f"),
    ("compile s", "compile", statistics.median, ".1f"),
    ("product GFLOP/s", "product", statistics.median, ".0f"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Benchmark training steps, PiSSA initialization, inference or compilation against PEFT."""

    model: str
    """Base model: a Hugging Face folder or a .gguf file."""
    peer: str | None = None
    """Python with torch, transformers and peft; None measures only this library."""
    what: Literal["step", "methods", "pissa", "serve", "compile"] = "step"
    """What to measure.
    step: the training step; methods: the same for the methods beside LoRA, each beside PEFT's;
    pissa: PiSSA initialization of all matrices;
    serve: loading, decoding and merging; compile: compilation by number of layers."""
    rounds: int = 5
    """Number of turns per variant."""
    tokens: int = 256
    """Tokens of each of the 4 rows of a step."""
    variants: str | None = None
    """Comma-separated variants; ratios refer to the first one. None measures all."""
    memory: float | None = None
    """Memory limit for all processes together, in GB; None uses 90 % of the free memory."""
    markdown: bool = False
    """Also print the table in Markdown, for docs/LOG.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """The process of a variant, ready for its turns."""

    name: str
    popen: subprocess.Popen[str]
    errors: IO[str]
    facts: Sample

    def call(self) -> Sample:
        """Run one call: `seconds`, and the `peak` memory of the process so far, in GB."""
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        return self.reply()

    def reply(self) -> Sample:
        """The next reply; lines that libraries print are skipped."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.startswith("{"):
                return json.loads(line)
        status = self.popen.wait()
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()] or [
            "it printed nothing"
        ]
        raise ValueError(f"the process of {self.name} ended with status {status}: {said[-1]}")


def main(args: Args) -> None:
    """Run the benchmark and print the table."""
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}; it must be above 0")
    import bench_ours  # imports JAX, so --help does not wait for it

    ours = {
        "step": bench_ours.STEPS,
        "methods": {"lora": {}, **bench_ours.METHODS},
        "pissa": bench_ours.INITS,
        "serve": bench_ours.SERVES,
        "compile": bench_ours.COMPILES,
    }
    peers = {
        "step": bench_peft.STEPS,
        "methods": {"peft_lora": {}, **bench_peft.METHODS},
        "pissa": bench_peft.INITS,
        "serve": bench_peft.SERVES,
        "compile": {},
    }
    names = _names(args, [*ours[args.what], *peers[args.what]])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    title = f"{args.what}: {Path(args.model).name}, {_condition()}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(bench_ours.model_config(args.model)))
        samples = (_together if args.what in ("step", "methods", "serve") else _afresh)(
            args, names, config, product=bench_ours.make_product(), console=console
        )
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")}
    for rounds in samples.values():
        versions |= rounds[0].get("versions", {})
    title = ", ".join([title, *(f"{name} {version}" for name, version in versions.items())])
    _print(console, title, samples, markdown=args.markdown)


def _together(
    args: Args, names: list[str], config: Path, *, product: Product, console: Console
) -> Samples:
    """Run steps in turns, with all processes alive.

    If memory is too small for all, they run in groups; each group contains the first variant.
    """
    samples: Samples = {}
    pending = names[1:]
    budget = args.memory * 1e9 if args.memory else 0.9 * psutil.virtual_memory().available

    def held() -> int:  # bytes used by the waiting processes
        return sum(
            psutil.Process(process.popen.pid).memory_info().rss for process in group.values()
        )

    while not samples or pending:
        with contextlib.ExitStack() as stack:
            group = {names[0]: stack.enter_context(_process(args, names[0], config, warmup=WARMUP))}
            while pending and (len(group) == 1 or held() + LARGEST < budget):
                name = pending.pop(0)
                try:
                    group[name] = stack.enter_context(_process(args, name, config, warmup=WARMUP))
                except ValueError as error:
                    console.print(f"{name} is left out: {error}", markup=False)
            for turned in range(args.rounds):  # each round starts with a different variant
                order = [*group][turned % len(group) :] + [*group][: turned % len(group)]
                turn = {}
                for name in order:
                    rate = product()
                    group[name].call()  # its memory has gone cold while the others had their turns
                    turn[name] = group[name].facts | {"product": rate} | group[name].call()
                turn = {name: turn[name] for name in group}
                _add(samples, turn, names[0], console)
    return samples


def _afresh(
    args: Args, names: list[str], config: Path, *, product: Product, console: Console
) -> Samples:
    """A new process for each turn, because the first call is measured too."""
    samples: Samples = {}
    for _ in range(args.rounds):
        turn = {}
        for name in names:
            rate = product()
            with _process(args, name, config) as process:
                calls = [process.call() for _ in range(CALLS[args.what])]
            called = {"first": calls[0]["seconds"], **calls[-1]} if calls else {}
            turn[name] = process.facts | {"product": rate} | called
        _add(samples, turn, names[0], console)
    return samples


def _add(samples: Samples, turn: dict[str, Sample], reference: str, console: Console) -> None:
    """Add a round, with each variant's ratio to the reference in the same round."""
    for name, sample in turn.items():
        if "seconds" in sample:
            sample["ratio"] = sample["seconds"] / turn[reference]["seconds"]
        samples.setdefault(name, []).append(sample)
    shown = (
        f"{name} {sample.get('seconds', sample.get('compile')):.2f}"
        for name, sample in turn.items()
    )
    console.print("  ".join(shown), style="dim")


@contextlib.contextmanager
def _process(args: Args, name: str, config: Path, *, warmup: int = 0) -> Iterator[Process]:
    """The process of a variant, ready for its turns; it is stopped when the block ends."""
    if name in PEERS:
        assert args.peer is not None
        command = [args.peer, str(HERE / "bench_peft.py"), name, "--model-config", str(config)]
        command += ["--cores", str(CORES)]
    else:
        command = [sys.executable, str(HERE / "bench_ours.py"), name]
    command += ["--model", args.model, "--batch", str(ROWS), "--tokens", str(args.tokens)]
    options: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options["env"] = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, **options) as popen,
    ):
        try:
            process = Process(name=name, popen=popen, errors=errors, facts={})
            process.facts.update(process.reply())
            for _ in range(warmup):
                process.call()
            yield process
        finally:
            popen.kill()


def _names(args: Args, known: list[str]) -> list[str]:
    """The requested variants, or all available ones."""
    if args.variants is None:
        return [name for name in known if args.peer or name not in PEERS]
    names = args.variants.split(",")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(
                f"--variants: there is no {name!r}; did you mean {near[0]}? "
                f"known: {', '.join(known)}"
            )
        if name in PEERS and not args.peer:
            raise ValueError(
                f"--variants: {name} needs --peer, a Python with torch, transformers and peft"
            )
    return names


def _condition() -> str:
    """The machine, its load and the date."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = next(
        (line.partition(": ")[2] for line in info.splitlines() if "model name" in line),
        platform.processor(),
    )
    return (
        f"{cpu}, {CORES} cores, load {os.getloadavg()[0]:.1f} at the start, {datetime.date.today()}"
    )


def _print(console: Console, title: str, samples: Samples, *, markdown: bool) -> None:
    """One row per variant; columns that no variant has are left out."""
    columns = [
        column for column in COLUMNS if any(column[1] in rounds[0] for rounds in samples.values())
    ]
    header = ["variant", *(column[0] for column in columns)]
    rows = [
        [name, *(_cell(rounds, column) for column in columns)] for name, rounds in samples.items()
    ]
    notes = [f"{name}: {note}." for name, note in bench_peft.NOTES.items() if name in samples]
    table = Table(
        title=title,
        title_justify="left",
        caption=" ".join(notes),
        caption_justify="left",
        box=box.SIMPLE,
    )
    for i, cell in enumerate(header):
        table.add_column(cell, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if markdown:
        lines = [header, ["---", *["---:"] * len(columns)], *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        print("\n\n".join([title, text, *notes]))


def _cell(rounds: list[Sample], column: Column) -> str:
    _, key, reduce, form = column
    return format(reduce([sample[key] for sample in rounds]), form) if key in rounds[0] else ""


if __name__ == "__main__":
    cli.run(main, Args)
