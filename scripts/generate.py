"""Ask a tuned model something.

    python scripts/generate.py --run out/pissa "What is 12 + 30?"
    python scripts/generate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter "Who wrote Faust?"

    python scripts/generate.py --run out/pissa --file questions.txt > answers.jsonl

Without a question it reads one from each line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from lorax_ft import cli
from lorax_ft.run.model_args import ChatArgs, load_with_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ChatArgs):
    """Ask a tuned model something; without a question, read one from each line."""

    question: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")] = None
    """What to ask; none given reads questions line by line, each on its own."""
    file: str | None = None
    """Text file with a question on each line; the answers are printed as JSON lines."""
    batch_size: int = 8
    """Questions of a file that are answered at once."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(0xD800 <= ord(letter) < 0xE000 for letter in self.question or ""):
            raise ValueError("the question is no text: it holds bytes that are not UTF-8")
        if self.question is not None and self.file is not None:
            raise ValueError("give a question or --file, not both")


def main(args: Args) -> None:
    """Loads the model and answers."""
    lines = None if args.file is None else _read(Path(args.file))
    model, params = load_with_adapter(args)
    import jax

    from lorax_ft.inference.texts import answer

    system = [] if args.system is None else [{"role": "system", "content": args.system}]

    def ask(questions: Sequence[str], number: int, where: Sequence[str] | None = None) -> list[str]:
        return answer(
            model,
            params,
            [[*system, {"role": "user", "content": question}] for question in questions],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            sampling=args,
            stop_strings=args.stop,
            key=jax.random.fold_in(jax.random.key(args.seed), number),
            where=where,
        )

    if lines is not None:
        questions = list(lines.values())
        for question, text in zip(questions, ask(questions, 0, list(lines)), strict=True):
            print(json.dumps({"question": question, "answer": text}, ensure_ascii=False))
        return
    for number, question in enumerate(_questions(args.question)):
        print(*ask([question], number), flush=True)


def _read(file: Path) -> dict[str, str]:
    """The questions of a file, by the place of each."""
    if not file.is_file():
        raise ValueError(f"no file at {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    lines = enumerate(text.split("\n"), 1)
    questions = {f"{file}, line {number}": line.strip() for number, line in lines if line.strip()}
    if not questions:
        raise ValueError(f"{file} holds no question")
    return questions


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
