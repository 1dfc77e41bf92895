"""Options under the names of other trainers, and options that are given twice."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import pytest
import tyro

from lorax_ft import cli
from lorax_ft.config import Config
from lorax_ft.inference.sampling import Sampling
from lorax_ft.option_names import INFERENCE, TRAINING
from lorax_ft.options import options
from lorax_ft.run.model_args import ChatArgs


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllArgs(Sampling):
    """The options of generate.py, export.py and evaluate.py."""

    model: str = "model"
    adapter: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    quant: Literal["none", "nf4", "int8"] = "none"
    shots: int = 5
    chat: bool = False
    max_new_tokens: int = 1
    system: str = ""
    template_args: tuple[str, ...] = ()
    file: str = ""
    stop: tuple[str, ...] = ()
    output: str = ""
    gguf_type: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking(Sampling):
    """Options beside a question, as in generate.py."""

    question: tyro.conf.Positional[str | None] = None
    """A question."""
    seed: int = 0
    """Random seed."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TRAINING)
def test_the_tables_name_our_options_in_training(name: str) -> None:
    _check_line(name, TRAINING[name], Config)


@pytest.mark.parametrize("name", INFERENCE)
def test_the_tables_name_our_options_in_the_other_scripts(name: str) -> None:
    _check_line(name, INFERENCE[name], AllArgs)


def _check_line(name: str, line: str, args_type: type) -> None:
    known = options(args_type)
    assert name not in known
    argv = line.partition(";")[0].split()
    (first, *others) = argv
    assert first.removeprefix("--") in known
    if others:  # options with values; without, the value of the other trainer's option follows
        cli.parse(args_type, argv=argv)
    with pytest.raises(ValueError, match="Unrecognized") as error:
        cli.parse(args_type, argv=[f"--{name}", "value"])
    assert f"use {' '.join(argv)} for --{name}" in str(error.value)


def test_options_are_those_of_tyro() -> None:
    known = options(Config)
    assert known["optim.clip_norm"] is float
    assert known["train.overwrite"] is bool
    argv = [f"--{name}=1" for name in ("optim.learning_rate", "adapter.rank", "train.steps")]
    assert cli.parse(Config, argv=argv).adapter.rank == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--learning_rate 1e-3", "use --optim.learning_rate for --learning_rate"),
        ("--learning-rate=1e-3", "use --optim.learning_rate for --learning_rate"),
        ("--adapter.lora_alpha 8", "use --adapter.alpha for --adapter.lora_alpha"),
        ("--rank 8", "use --adapter.rank for --rank"),
        (
            "--revision main",
            "use --model.revision or --data.revision for --revision",
        ),
        (
            "--lora_r 8 --nonsense --use_dora",
            "Unrecognized options: --lora_r, --nonsense, --use_dora; "
            "use --adapter.rank for --lora_r, --adapter.dora for --use_dora",
        ),
        (
            "--gradient_accumulation_steps 4",
            "use --train.microbatches for --gradient_accumulation_steps (batch_size is global: "
            "per-device size x devices x accumulation steps)",
        ),
        ("--report_to none", "--report_to (without a value it turns all trackers off)"),
        # The other mistake is found first by tyro, but a foreign name explains it.
        ("--load_in_4bit --adapter.rank x", "use --quant.format nf4 for --load_in_4bit"),
        (
            "--train.overwrite True",
            "--train.overwrite takes no value; give --train.overwrite to turn it on, "
            "--train.no-overwrite for off",
        ),
    ],
)
def test_familiar_names(argv: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        cli.parse(Config, argv=argv.split())
    assert "\n" not in str(error.value)


def test_familiar_names_of_the_other_scripts() -> None:
    message = "use --model for --model_name_or_path, --adapter for --lora_path"
    with pytest.raises(ValueError, match=message):
        cli.parse(ChatArgs, argv=["--model_name_or_path", "m", "--lora-path=a"])
    assert cli.parse(Config, argv=["--train.report_to"]).train.report_to == ()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--optim.learning_rate 1 --train.steps 2 --optim.learning-rate=3",
            "--optim.learning_rate is given twice: first 1, then 3; give it once",
        ),
        (
            "--data.train a.jsonl b.jsonl --data.train c.jsonl",
            "--data.train is given twice: first a.jsonl b.jsonl, then c.jsonl; "
            "all its values follow one name: --data.train a.jsonl b.jsonl c.jsonl",
        ),
        (
            "--train.report_to --train.report_to wandb",
            "--train.report_to is given twice: first without a value, then wandb",
        ),
        ("--train.overwrite --train.overwrite", "--train.overwrite is given twice; give it once"),
        ("--adapter.dora --adapter.no-dora", "--adapter.dora is given twice, once with no-"),
        (
            "--adapter.svd_iterations 1 --adapter.svd_iterations None",
            "--adapter.svd_iterations is given twice: first 1, then None; give it once",
        ),
    ],
)
def test_options_given_twice(argv: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cli.parse(Config, argv=argv.split())


def test_two_adapters() -> None:
    argv = ["--model", "m", "--adapter", "a b", "--adapter", "c"]
    message = "--adapter is given twice: first 'a b', then c; give it once"
    with pytest.raises(ValueError, match=message):
        cli.parse(ChatArgs, argv=argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--adapter.rank 8.5", "--adapter.rank is '8.5'; it takes a whole number"),
        (
            "--optim.learning-rate abc",
            "--optim.learning_rate is 'abc'; it takes a number or find or auto",
        ),
        ("--train.steps 1e3", "--train.steps is '1e3'; it takes a whole number or None"),
        ("--train.steps", "--train.steps needs a value: a whole number or None"),
        ("--data.max_length all", "--data.max_length is 'all'; it takes a whole number or auto"),
        ("--adapter.layers 1 a", "--adapter.layers is 'a'; it takes a whole number"),
        ("--adapter.freeze lora_c", "--adapter.freeze is 'lora_c'; it takes lora_a or lora_b"),
        (
            "--train.report_to none",
            "--train.report_to is 'none'; it takes tensorboard or wandb; give --train.report_to "
            "without a value for none",
        ),
        ("--data.maxlength 5", "--data.maxlength; did you mean --data.max_length?"),
        ("--run_name mine", "Unrecognized options: --run_name; --help lists all options"),
    ],
)
def test_values_of_the_wrong_type_name_the_option(argv: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        cli.parse(Config, argv=argv.split())


def test_a_question_after_an_option_is_no_value_of_it() -> None:
    with pytest.raises(ValueError, match="'is, 3\\?' belongs to no option; put quotes around"):
        cli.parse(Asking, argv=["What", "is", "3?"])
    with pytest.raises(ValueError, match=r"--top_k is 'many'; it takes a whole number or None$"):
        cli.parse(Asking, argv=["--seed", "3", "--top_k", "many", "1 + 1?"])
    assert cli.parse(Asking, argv=["--seed", "3", "1 + 1?"]).question == "1 + 1?"
