"""The data, and how it becomes token rows."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from lorax_ft.checks import check, check_types, parse_template_args
from lorax_ft.config.model import ASSETS

EMBEDDED_DATA = str(ASSETS / "questions")
# What rendering a conversation passes to its chat template.
_RENDERED = ("messages", "tools", "documents", "add_generation_prompt", "tokenize")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and validation data, and how they become token rows."""

    train: tuple[str, ...] = (EMBEDDED_DATA,)
    """Training data: files (.jsonl, .json, .csv, .parquet; also .gz, .zst), patterns ("d/*.jsonl"),
    a folder with a file per split or saved by datasets.save_to_disk, or a Hub id ("owner/name" or
    "owner/name:subset"). Several are mixed; "PATH=2" takes the rows of PATH twice in an epoch,
    "PATH=0.5" half of them; "PATH[:1000]" are its first 1000 rows."""
    validation: tuple[str, ...] = ()
    """Validation data: files, a folder or a Hub id.
    "name=path" makes sets with losses of their own, such as easy=a.jsonl hard=b.jsonl;
    the first one picks the best checkpoint, and its questions are answered.
    If empty: data.validation_split of the training folder if it exists,
    else held-out training rows."""
    split: str = "train"
    """Split to read if data.train is a folder or Hub id."""
    revision: str | None = None
    """Branch, tag or commit, if data.train or data.validation is a Hub id."""
    validation_split: str = "test"
    """Split to read if the validation data is a folder or Hub id."""
    validation_rows: int | float = 200
    """Training rows to hold out if there is no validation data: a number of them, at most a tenth,
    or below 1 a fraction of them, such as 0.2; 0: none."""
    limit: int | None = None
    """Maximum number of training rows to read; None reads all."""
    shape: Literal[
        "auto",
        "messages",
        "alpaca",
        "sharegpt",
        "multiple_choice",
        "question_answer",
        "prompt_completion",
        "text",
    ] = "auto"
    """Format of a row; auto detects it from the fields of the first row of each source.
    prompt_completion and text are trained without a chat template, unless prompt and completion
    are messages."""
    fields: tuple[str, ...] = ()
    """Field names in the data, each as "expected=actual", such as "question=prompt"."""
    system: str | None = None
    """System message for conversations that have none."""
    new_tokens: tuple[str, ...] = ()
    """Texts that become one token each, such as "<tool>". Their rows of the embedding and the head
    start as the mean of those of the tokens that they were before, and train."""
    tools: str | None = None
    """JSON file of tools, a list of function schemas, for conversations that have none."""
    template_args: tuple[str, ...] = ()
    """Variables of the chat template, each as "name=value", such as "enable_thinking=false"."""
    max_length: int | Literal["auto"] = 256
    """Tokens per row; longer samples are truncated. Where all are shorter, and not packed, rows are
    too: a multiple of 128.
    auto: as long as the longest sample, rounded up, and at most the model's positions."""
    pack: bool = False
    """Pack several samples into each row; samples do not attend to one another.
    Plain texts without a prompt then fill rows to the end, and go on in the next one."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that contribute to the loss: the assistant's turns (assistant), only the last of
    them (last), or all. Turns with "train": false or "weight": 0 never contribute."""
    reasoning_loss: Literal["data", "all", "none"] = "data"
    """Reasoning that contributes to the loss.
    data: what the data has; all: also an empty thought that the chat template writes, such as
    Qwen3's; none: no reasoning."""
    append_end: bool = False
    """Append the end-of-sequence token where the chat template ends a conversation without one."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """Rows that cannot be used, such as broken JSON or an empty answer.
    stop: the first one ends the run, with its file and line; skip: they are left out, counted, and
    listed in bad_rows.txt in the output folder."""
    control_tokens: Literal["refuse", "keep"] = "refuse"
    """Conversations with one of the tokenizer's special tokens in a text, such as <|im_end|>.
    refuse: such a row cannot be used; keep: it becomes that token."""
    num_proc: int | None = None
    """Processes that tokenize. None: one for each core if there are more than 8,192 rows."""
    cache: str | None = "auto"
    """Folder that keeps tokenized data, so that the next run on it starts at once; None: off.
    auto: ~/.cache/lorax_ft, or what LORAX_FT_CACHE names. What is unused for 30 days goes."""

    def __post_init__(self) -> None:
        check_types(self)
        check(bool(self.train), "data.train is empty; give a file or a hub id")
        check(
            self.max_length == "auto" or self.max_length >= 8,
            f"data.max_length is {self.max_length}; it must be at least 8 tokens, or auto",
        )
        check(
            0 <= self.validation_rows < 1
            or (self.validation_rows >= 1 and isinstance(self.validation_rows, int)),
            f"data.validation_rows is {self.validation_rows}; it must be a whole number, 0 or "
            "more, or a fraction below 1",
        )
        check(
            self.limit is None or self.limit > 0, f"data.limit is {self.limit}; it must be above 0"
        )
        check(
            self.num_proc is None or self.num_proc > 0,
            f"data.num_proc is {self.num_proc}; it must be above 0",
        )
        for entry in self.fields:
            check(
                re.fullmatch(r"\w+=.+", entry) is not None,
                f'data.fields: {entry!r} is not of the form "expected=actual"',
            )
        for name in self.parsed_template_args():
            check(
                name not in _RENDERED,
                f"data.template_args: {name} is not a variable to set: it comes from the data",
            )

    def parsed_template_args(self) -> dict[str, Any]:
        """The variables of the chat template, by name."""
        return parse_template_args(self.template_args, "data.template_args")
