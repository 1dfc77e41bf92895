"""Ask a tuned model something.

    python scripts/generate.py --run out/pissa "What is 12 + 30?"
    python scripts/generate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter "Who wrote Faust?"

Without a question it reads one from each line.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated

import tyro

from lorax_ft import cli
from lorax_ft.inference.tuned import Tuned, load_tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Tuned):
    """Ask a tuned model something; without a question, read one from each line."""

    question: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")] = None
    """What to ask; none given reads questions line by line, each on its own."""
    system: str | None = None
    """System message before the question."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn, and 1 draws as the model is."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens whose probabilities sum up to p."""
    seed: int = 0
    """Seed of the draws."""


def main(args: Args) -> None:
    """Loads the model and answers."""
    model, params = load_tuned(args)
    import jax

    from lorax_ft.inference.generate import answer

    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    key = jax.random.key(args.seed)
    for number, question in enumerate(_questions(args.question)):
        (text,) = answer(
            model,
            params,
            [[*system, {"role": "user", "content": question}]],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            key=jax.random.fold_in(key, number),
        )
        print(text, flush=True)


def _questions(given: str | None) -> Iterator[str]:
    """The question that was given, or those that a person types."""
    if given is not None:
        yield given
        return
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    cli.run(main, Args)
