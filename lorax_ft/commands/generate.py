"""Generate answers with a fine-tuned model."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lorax_ft import cli
from lorax_ft.data.conversation import Conversation
from lorax_ft.inference.questions import ask, read_questions, warn_unused
from lorax_ft.run.model_args import ChatArgs, load_with_adapter

if TYPE_CHECKING:
    from lorax_ft.models.model import Model
    from lorax_ft.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ChatArgs):
    """Generate answers with a fine-tuned model."""

    question: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")] = None
    """One question; without it or --file, questions are read from standard input, one per line."""
    file: str | None = None
    """Text file with one question per line, or a line {"messages": [...], "tools": [...]} for a
    conversation; the answers are printed as JSON lines."""
    batch_size: int = 8
    """Number of questions in --file that are answered at once."""
    max_new_tokens: int = 256
    """Maximum number of tokens of an answer."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; the answer does not include them."""

    def __post_init__(self) -> None:
        for value in self.template_args:
            if "=" not in value and self.question is None:
                raise ValueError(
                    f"--template_args has {value!r}, which is no name=value; "
                    "a question goes before the options"
                )
        super().__post_init__()
        if self.question is not None and self.file is not None:
            raise ValueError("give a question or --file, not both")
        try:
            # Python decodes invalid bytes of the command line to surrogates (PEP 383), which no
            # tokenizer accepts.
            (self.question or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError("the question is not valid UTF-8") from error


def main() -> None:
    """Parses the command line, then runs the command."""
    cli.run(generate, Args)


def generate(args: Args) -> None:
    """Loads the model and prints the answers."""
    # Before the model, which takes long to load: a bad file should fail at once.
    opening = args.opening()
    if args.file is not None:
        asked = read_questions(Path(args.file), opening)
    model, params = load_with_adapter(args)
    warn_unused([opening] if args.file is None else asked.values(), model.tokenizer)
    if args.file is not None:
        answers = _answers(args, model, params, [*asked.values()], turn=0, where=[*asked])
        for conversation, text in zip(asked.values(), answers, strict=True):
            line = {**_shown(conversation, opening), "answer": text}
            print(json.dumps(line, ensure_ascii=False))
        return
    for turn, question in enumerate(_questions(args.question)):
        conversation = ask(opening, [{"role": "user", "content": question}])
        (text,) = _answers(args, model, params, [conversation], turn=turn)
        print(text, flush=True)


def _shown(conversation: Conversation, opening: Conversation) -> dict[str, Any]:
    """What was asked, beside the answer: one question, or the messages."""
    messages = conversation.messages
    if [*opening.messages, messages[-1]] == messages and messages[-1]["role"] == "user":
        return {"question": messages[-1]["content"]}
    return {"messages": messages}


def _answers(
    args: Args,
    model: Model,
    params: Tree,
    conversations: Sequence[Conversation],
    *,
    turn: int,
    where: Sequence[str] | None = None,
) -> list[str]:
    """The answers in independent conversations."""
    import jax

    from lorax_ft.inference.texts import answer

    return answer(
        model,
        params,
        conversations,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        sampling=args,
        stop_strings=args.stop,
        # A new key for each line of input: a question that is repeated may get another answer.
        key=jax.random.fold_in(jax.random.key(args.seed), turn),
        where=where,
    )


def _questions(question: str | None) -> Iterator[str]:
    """The question of the command line, or else those of standard input."""
    if question is not None:
        yield question
        return
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()
