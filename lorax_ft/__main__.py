"""`lorax-ft COMMAND`, or `python -m lorax_ft COMMAND`."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys

COMMANDS = {
    "train": "fine-tune a model",
    "generate": "answer questions with a fine-tuned model",
    "chat": "chat with a fine-tuned model",
    "evaluate": "evaluate a model, or an adapter against its base",
    "merge": "merge adapters into their base model",
    "export": "export a fine-tuned model for PEFT, vLLM, transformers or llama.cpp",
    "sweep": "train many adapters in one program, and find the best settings",
    "compare": "compare methods, each at its best learning rate",
    "plan": "plan a run on other chips: whether it fits, and how fast it could be",
    "autotrain": "fine-tune a model with the options of AutoTrain",
    "convert-config": "write a config of another trainer as one of ours",
}


def main() -> None:
    """Runs a command: its module reads the rest of the command line."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return
    if name == "--version":
        print(f"lorax_ft {importlib.metadata.version('lorax_ft')}")
        return
    if name not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        sys.exit(2)
    # The program's name in the help and in reports.
    sys.argv = [f"lorax-ft {name}", *arguments]
    importlib.import_module(f"lorax_ft.commands.{name.replace('-', '_')}").main()


def _help() -> str:
    lines = ["usage: lorax-ft COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<15} {text}" for name, text in COMMANDS.items()]
    lines += ["", "lorax-ft COMMAND --help lists the options of a command.", "First steps:"]
    lines += ["  lorax-ft train --config pissa --train.output out/pissa"]
    lines += ['  lorax-ft generate --run out/pissa "What is 12 + 30?"']
    return "\n".join(lines)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    advice = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
    return f"there is no command {name!r}; {advice}"


if __name__ == "__main__":
    main()
