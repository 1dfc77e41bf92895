"""Feeds damaged and hostile files to everything that reads files, and counts what happens.

    nice -n 15 python tests/fuzz.py --inputs 100000 --seed 0

Each input is a real file of a tiny model, changed by a seeded draw: bytes, values of JSON, pieces
of templates and of regular expressions. It is read as a run would read it. Allowed are success and
the errors that a script turns into one line. Everything else is a failure: another exception, a
crash, more than 20 seconds for one input, more memory than 6 GB, or a file written elsewhere.

The readers run in a child process, which is started again after a crash, so that one crash ends
neither the run nor the count. There a template has one second, and an expression a fifth of one.
`--inputs 1 --target gguf --first 1234` repeats one input.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RUST_BACKTRACE"] = "0"

import fuzz_inputs

from lorax_ft import regexes, template_limits

SECONDS = 20.0
"""For one input."""
MEMORY = 6_000_000_000
"""Bytes that the readers may take beyond what they have at the start."""
RESTARTS = 200
ALLOWED = (ValueError, OSError, MemoryError)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--target", choices=sorted(fuzz_inputs.TARGETS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child), args.seed, args.first, args.inputs, args.target)
        return
    failures, counts = run(
        seed=args.seed, first=args.first, inputs=args.inputs, target=args.target, echo=True
    )
    total = sum(counts.values())
    print(f"{total:,} inputs, {len(failures)} failures; {json.dumps(counts, sort_keys=True)}")
    sys.exit(bool(failures))


def run(
    *, seed: int, first: int, inputs: int, target: str | None, echo: bool = False
) -> tuple[list[str], dict[str, int]]:
    """Run inputs in child processes; returns the failures, and how the others ended, by outcome."""
    failures: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    end = first + inputs
    with tempfile.TemporaryDirectory(prefix="lorax_ft_fuzz_") as scratch:
        work = Path(scratch)
        fuzz_inputs.make_seeds(work / "seeds")
        for _ in range(RESTARTS):
            if first >= end:
                break
            reason = _run_child(work, seed, first, end - first, target)
            lines = (work / "outcomes").read_text(encoding="utf-8").splitlines()
            for line in lines:
                outcome = json.loads(line)
                counts[f"{outcome['target']} {outcome['end']}"] += 1
                if outcome["end"] == "failed":
                    failures.append(
                        f"input {outcome['input']} ({outcome['target']}): {outcome['why']}"
                    )
                    if echo:
                        print(failures[-1], flush=True)
            first += len(lines)
            if reason:
                name = fuzz_inputs.target_of(random.Random(f"{seed} {first}"), target)
                failures.append(f"input {first} ({name}): {reason}")
                counts[f"{name} failed"] += 1
                if echo:
                    print(failures[-1], flush=True)
                first += 1
    return failures, dict(counts)


def _run_child(work: Path, seed: int, first: int, inputs: int, target: str | None) -> str:
    """Run a child to its end; returns why it did not come to its last input, "" if it did."""
    outcomes = work / "outcomes"
    outcomes.write_text("")
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(work)]
    command += ["--seed", str(seed), "--first", str(first), "--inputs", str(inputs)]
    if target:
        command += ["--target", target]
    with open(work / "stderr", "wb") as errors:
        process = subprocess.Popen(command, stderr=errors, stdout=errors, stdin=subprocess.DEVNULL)
    size, since = -1, time.monotonic()
    # Importing everything takes longer than an input.
    patience = 300.0
    while process.poll() is None:
        before = time.monotonic()
        time.sleep(0.2)
        was_stopped = time.monotonic() - before > 5
        now = outcomes.stat().st_size
        if now != size or was_stopped:
            size, since = now, time.monotonic()
            patience = 300.0 if not size else 3 * SECONDS
        elif time.monotonic() - since > patience:
            process.kill()
            process.wait()
            return f"hangs for more than {patience:.0f} s"
    if process.returncode:
        tail = (work / "stderr").read_text(encoding="utf-8", errors="replace")[-1500:]
        return f"the process ended with status {process.returncode}: {tail}"
    return ""


def child(work: Path, seed: int, first: int, inputs: int, target: str | None) -> None:
    """Read inputs one after the other, and write a line for each into `outcomes`."""
    warnings.simplefilter("ignore")
    template_limits.SECONDS, regexes.SECONDS = 1.0, 0.2
    readers = fuzz_inputs.Readers(work / "seeds")
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    area = work / "area"
    area.mkdir(exist_ok=True)
    with open(work / "outcomes", "a", encoding="utf-8") as outcomes:
        for number in range(first, first + inputs):
            random_draws = random.Random(f"{seed} {number}")
            name = fuzz_inputs.target_of(random_draws, target)
            started = time.process_time()  # the process may be stopped for a while
            end, why = one(lambda: readers.read(name, random_draws, area))  # noqa: B023
            seconds = time.process_time() - started
            if end != "failed" and seconds > SECONDS:
                end, why = "failed", f"took {seconds:.0f} s"
            line = {"input": number, "target": name, "end": end, "why": why}
            outcomes.write(json.dumps(line) + "\n")
            outcomes.flush()
    strangers = {path.name for path in work.iterdir()} - {"seeds", "outcomes", "stderr", "area"}
    assert not strangers, f"written outside of the output: {strangers}"


def one(call: Callable[[], Any]) -> tuple[str, str]:
    """How a call ended, and why if it failed."""
    try:
        call()
    except ALLOWED as error:
        lines = str(error).count("\n")
        if isinstance(error, ValueError) and len(str(error)) > 5000:
            return "failed", f"an error of {len(str(error)):,} characters and {lines} lines"
        return "refused", ""
    except BaseException as error:
        where = traceback.format_exc().splitlines()[-12:]
        return "failed", f"{type(error).__name__}: {error}"[:300] + "\n" + "\n".join(where)
    return "read", ""


if __name__ == "__main__":
    main()
