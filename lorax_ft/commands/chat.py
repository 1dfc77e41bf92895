"""Chat with a fine-tuned model."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lorax_ft import cli
from lorax_ft.data.conversation import Conversation, Message
from lorax_ft.inference.questions import ask, warn_unused
from lorax_ft.inference.turns import (
    assistant_message,
    describe_call,
    markers_are_special,
    opened_reasoning,
    split_reasoning,
    thinking_variable,
)
from lorax_ft.run.model_args import ChatArgs, load_with_adapter

if TYPE_CHECKING:
    from lorax_ft.models.model import LoadedModel
    from lorax_ft.tree import Tree

HELP = """/adapter on|off|PATH   switch the adapter on or off, or load another PEFT folder
/adapter               show whether the adapter is on
/system TEXT           set the system message; without TEXT, remove it
/think on|off          switch the reasoning on or off, where the chat template can
/tool TEXT             give the result of the tool that the model called
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
    opening: Conversation
    """The system message, the tools and the template's variables."""
    messages: list[Message] = dataclasses.field(default_factory=list)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is loaded, switched on or off."""
        return self.adapted is not self.model.params

    def reply(self, message: Message, args: Args) -> Iterator[tuple[str, str]]:
        """Streams the answer to `message`, and adds both to the conversation.

        Yields:
          The reasoning so far, and the answer so far.
        """
        import jax

        from lorax_ft.data.chat import encode_prompt
        from lorax_ft.inference.generate import text_positions
        from lorax_ft.inference.texts import stream_texts

        tokenizer = self.model.tokenizer
        messages = [*self.messages, message]
        prompt = encode_prompt(ask(self.opening, messages), tokenizer)
        positions = text_positions(self.params, self.model.config)
        if len(prompt) >= positions:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, too many for the model's {positions} "
                "positions; /clear starts a new one"
            )
        opened = opened_reasoning(tokenizer.decode(prompt[-16:]))
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
                special="keep" if markers_are_special(tokenizer) else "skip",
            ):
                yield split_reasoning(answer, opened=opened, complete=False)
            yield split_reasoning(answer, opened=opened)
        finally:
            # Also after Ctrl-C: the conversation continues from what the user has seen.
            self.messages = [*messages, assistant_message(answer, opened=opened)]


def main() -> None:
    """Parses the command line, then runs the command."""
    cli.run(chat, Args)


def chat(args: Args) -> None:
    """Loads the model and chats until the user quits."""
    # Before the model, which takes long to load: a bad file should fail at once.
    opening = args.opening()
    model, params = load_with_adapter(args)
    warn_unused([opening], model.tokenizer)
    from lorax_ft.inference.generate import with_all_norms

    params = with_all_norms(model, params)
    chat = Chat(model=model, adapted=params, params=params, opening=opening)
    if sys.stdin.isatty():
        # readline gives input() arrow keys and a history. Windows has none.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print(f"{args.run or args.model}: type a message, or /help", file=sys.stderr)
    for line in _lines():
        if line.split()[0] == "/exit":
            return
        try:
            if line.split()[0] == "/tool":
                _answer(chat, _tool_message(chat, line.removeprefix("/tool").strip()), args)
            elif line.startswith("/"):
                print(_command(chat, line))
            else:
                _answer(chat, {"role": "user", "content": line}, args)
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
        "/think": _think,
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
    from lorax_ft.interop.new_tokens import with_tokens_of
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
        chat.model = with_tokens_of(argument, chat.model)
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
    messages: list[Message] = [{"role": "system", "content": text}] if text else []
    chat.opening = dataclasses.replace(chat.opening, messages=messages)
    return f"system: {text or 'none'}"


def _think(chat: Chat, argument: str) -> str:
    """Sets the variable with which the chat template switches the reasoning."""
    if argument not in ("on", "off"):
        raise ValueError("/think takes on or off")
    name = thinking_variable(chat.model.tokenizer.chat_template)
    if name is None:
        raise ValueError("this chat template has no switch for reasoning, such as enable_thinking")
    variables = {**chat.opening.template_args, name: argument == "on"}
    chat.opening = dataclasses.replace(chat.opening, template_args=variables)
    return f"think: {argument}"


def _tool_message(chat: Chat, text: str) -> Message:
    """The result of the last call, as a message."""
    calls = chat.messages[-1].get("tool_calls", ()) if chat.messages else ()
    if not calls:
        raise ValueError("the last answer called no tool")
    return {"role": "tool", "name": calls[0]["function"]["name"], "content": text}


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


def _answer(chat: Chat, message: Message, args: Args) -> None:
    """Prints the answer to a message, and the tools that it calls."""
    _print_stream(chat.reply(message, args))
    for call in chat.messages[-1].get("tool_calls", ()):
        print(f"tool call: {describe_call(call)}; /tool TEXT gives its result")


def _print_stream(texts: Iterator[tuple[str, str]]) -> None:
    """Prints a streamed answer, of each part only what is new, with the reasoning dimmed."""
    dim, normal = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    shown = [0, 0]
    try:
        for parts in texts:
            for i, (part, style) in enumerate(zip(parts, (dim, normal), strict=True)):
                if part[shown[i] :]:
                    print(f"{style}{part[shown[i] :]}", end="", flush=True)
                    shown[i] = len(part)
    finally:
        # Also after Ctrl-C: what the user types next must not be dimmed.
        print(normal)
