"""Chat with a fine-tuned model.

    python scripts/chat.py --run out/pissa
    python scripts/chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter

The answers are streamed. /help lists the commands.
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
    from lorax_ft.models.model import LoadedModel
    from lorax_ft.tree import Tree

HELP = """/adapter on|off|PATH   switch the adapter on or off, or load another PEFT folder
/adapter               show whether the adapter is on
/system TEXT           set the system message; without TEXT, remove it
/clear                 start a new conversation
/exit                  quit (or Ctrl-D; Ctrl-C interrupts an answer)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ChatArgs):
    """Chat with a fine-tuned model."""


@dataclasses.dataclass
class Chat:
    """A conversation, and the parameters that generate its answers."""

    model: LoadedModel
    adapted: Tree
    """The parameters with the adapter that was loaded last."""
    params: Tree
    """`adapted`, or the same with the adapter switched off."""
    system: str | None
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is loaded, switched on or off."""
        return self.adapted is not self.model.params

    def reply(self, text: str, args: Args) -> Iterator[str]:
        """Streams the answer to `text`, and adds both to the conversation."""
        import jax

        from lorax_ft.data.chat import encode_prompt
        from lorax_ft.inference.texts import stream_texts

        system = []
        if self.system:
            system.append({"role": "system", "content": self.system})
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_prompt([*system, *messages], self.model.tokenizer)
        positions = self.model.config.max_positions
        if len(prompt) >= positions:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, too many for the model's {positions} "
                "positions; /clear starts a new one"
            )
        answer = ""
        try:
            for (answer,) in stream_texts(
                self.model,
                self.params,
                [prompt],
                max_new_tokens=min(args.max_new_tokens, positions - len(prompt)),
                chunk=1,
                sampling=args,
                key=jax.random.fold_in(jax.random.key(args.seed), len(messages)),
            ):
                yield answer
        finally:
            # Also after Ctrl-C: the conversation continues from what the user has seen.
            self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]


def main(args: Args) -> None:
    """Loads the model and chats until the user quits."""
    model, params = load_with_adapter(args)
    from lorax_ft.inference.generate import with_all_norms

    params = with_all_norms(model, params)
    chat = Chat(model=model, adapted=params, params=params, system=args.system)
    if sys.stdin.isatty():
        # readline gives input() arrow keys and a history. Windows has none.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print(f"{args.run or args.model}: type a message, or /help", file=sys.stderr)
    for line in _lines():
        if line.split()[0] == "/exit":
            return
        try:
            if line.startswith("/"):
                print(_command(chat, line))
            else:
                _print_stream(chat.reply(line, args))
        except KeyboardInterrupt:
            print()
        except (ValueError, OSError) as error:
            # A wrong command must not end the conversation.
            print(f"error: {error}", file=sys.stderr)


def _command(chat: Chat, line: str) -> str:
    """Executes a line that starts with a slash; returns what to print."""
    name, _, argument = line.partition(" ")
    commands: dict[str, Callable[[Chat, str], str]] = {
        "/adapter": _adapter,
        "/system": _system,
        "/clear": _clear,
        "/help": _help,
    }
    if name not in commands:
        raise ValueError(f"unknown command {name}; /help lists the commands")
    return commands[name](chat, argument.strip())


def _adapter(chat: Chat, argument: str) -> str:
    """Switches the adapter on or off, loads another one, or says whether one is on."""
    if argument == "":
        return _adapter_status(chat)
    if argument in ("on", "off") and not chat.has_adapter:
        raise ValueError("no adapter is loaded; /adapter PATH loads one")
    from lorax_ft.inference.generate import with_all_norms
    from lorax_ft.interop.peft import load_peft
    from lorax_ft.lowrank.adapters import disable_adapters

    if argument == "on":
        chat.params = chat.adapted
    elif argument == "off":
        base = chat.model.params
        chat.params = disable_adapters(chat.adapted, base, layout=chat.model.layout)
        if chat.model.without_start:
            return (
                f"adapter: off; {chat.model.source} is the base minus the adapter's initial value: "
                "compare with the original model"
            )
    else:
        chat.adapted = with_all_norms(chat.model, load_peft(argument, chat.model))
        chat.params = chat.adapted
    return f"adapter: {argument}"


def _adapter_status(chat: Chat) -> str:
    """Whether there is an adapter, and whether it is on."""
    if not chat.has_adapter:
        return "adapter: none; /adapter PATH loads one"
    state = "on" if chat.params is chat.adapted else "off"
    return f"adapter: {state}; /adapter on, off or PATH changes this"


def _system(chat: Chat, text: str) -> str:
    chat.system = text or None
    return f"system: {text or 'none'}"


def _clear(chat: Chat, argument: str) -> str:
    chat.messages = []
    return "cleared"


def _help(chat: Chat, argument: str) -> str:
    return HELP


def _lines() -> Iterator[str]:
    """The lines that the user types, without empty ones."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _print_stream(texts: Iterator[str]) -> None:
    """Prints a streamed text, of each result only what is new."""
    shown = 0
    for text in texts:
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()


if __name__ == "__main__":
    cli.run(main, Args)
