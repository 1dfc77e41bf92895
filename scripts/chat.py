"""Talk with a tuned model.

    python scripts/chat.py --run out/pissa
    python scripts/chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter --temperature 0.7

The answers appear as they are made. /help lists the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lorax_ft import cli
from lorax_ft.run.model_args import ChatArgs, load_with_adapter

if TYPE_CHECKING:
    from lorax_ft.models.model import Model
    from lorax_ft.tree import Tree

HELP = """/adapter on|off|PATH   switch the adapter on or off, or take another PEFT folder; alone, say which
/system TEXT           set the system message; without a text, remove it
/clear                 forget the conversation
/exit                  leave (or Ctrl-D; Ctrl-C stops an answer)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ChatArgs):
    """Talk with a tuned model."""


@dataclasses.dataclass
class Chat:
    """A conversation, and the parameters that carry it on."""

    model: Model
    adapted: Tree
    """The parameters with the newest adapter."""
    params: Tree
    """`adapted`, or the same with the adapter switched off."""
    system: str | None
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def reply(self, text: str, args: Args) -> Iterator[str]:
        """The answer to `text`, as it grows; both are remembered."""
        import jax

        from lorax_ft.data.chat import encode_prompt
        from lorax_ft.inference.texts import stream_texts

        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_prompt([*system, *asked], self.model.tokenizer)
        key = jax.random.fold_in(jax.random.key(args.seed), len(asked))
        room = min(args.max_new_tokens, self.model.config.max_positions - len(prompt))
        if room < 1:
            raise ValueError(
                "the conversation has become longer than the model's positions; /clear starts anew"
            )
        said = ""
        try:
            for (said,) in stream_texts(
                self.model,
                self.params,
                [prompt],
                max_new_tokens=room,
                chunk=1,
                sampling=args,
                key=key,
            ):
                yield said
        finally:  # what was said before an interruption counts
            self.messages = [*asked, {"role": "assistant", "content": said.strip()}]


def main(args: Args) -> None:
    """Loads the model and talks."""
    model, params = load_with_adapter(args)
    from lorax_ft.inference.generate import with_all_norms

    params = with_all_norms(params)
    chat = Chat(model=model, adapted=params, params=params, system=args.system)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # arrow keys and a history; not on Windows
            import readline  # noqa: F401
        print(f"{args.run or args.model}: type a message, or /help", file=sys.stderr)
    for line in _lines():
        if line.split()[0] == "/exit":
            return
        try:
            if line.startswith("/"):
                print(_command(chat, line))
            else:
                _print_growing(chat.reply(line, args))
        except KeyboardInterrupt:
            print()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)


def _command(chat: Chat, line: str) -> str:
    """Does what a line that begins with a slash says; returns what to print."""
    name, _, rest = line.partition(" ")
    commands: dict[str, Callable[[Chat, str], str]] = {
        "/adapter": _adapter,
        "/system": _system,
        "/clear": _clear,
        "/help": lambda chat, rest: HELP,
    }
    if name not in commands:
        raise ValueError(f"there is no command {name}; /help lists them")
    return commands[name](chat, rest.strip())


def _adapter(chat: Chat, which: str) -> str:
    from lorax_ft.inference.generate import with_all_norms
    from lorax_ft.interop.peft import load_peft
    from lorax_ft.lowrank.adapters import disable_adapters

    if which in ("on", "off") and chat.adapted is chat.model.params:
        raise ValueError("there is no adapter; /adapter PATH takes one")
    if which == "off":
        chat.params = disable_adapters(chat.adapted, chat.model.params, layout=chat.model.layout)
        if chat.model.without_start:
            return f"adapter: off; {chat.model.source} alone lacks the adapter's start: compare with the original model"
    elif which == "on":
        chat.params = chat.adapted
    elif which:
        chat.params = chat.adapted = with_all_norms(load_peft(which, chat.model))
    elif chat.adapted is chat.model.params:
        return "adapter: none; /adapter PATH takes one"
    else:
        return f"adapter: {'on' if chat.params is chat.adapted else 'off'}; /adapter on, off or PATH changes that"
    return f"adapter: {which}"


def _system(chat: Chat, text: str) -> str:
    chat.system = text or None
    return f"system: {text or 'none'}"


def _clear(chat: Chat, rest: str) -> str:
    chat.messages = []
    return "cleared"


def _lines() -> Iterator[str]:
    """What a person types."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _print_growing(texts: Iterator[str]) -> None:
    """Prints a text as it grows."""
    shown = 0
    for text in texts:
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()


if __name__ == "__main__":
    cli.run(main, Args)
