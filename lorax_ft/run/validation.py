"""Evaluation of a run: the validation loss, answers compared with references, and accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lorax_ft import sharding
from lorax_ft.data.batches import evaluation_batches
from lorax_ft.data.chat import Sample, encode_prompt
from lorax_ft.data.conversation import Conversation
from lorax_ft.data.formats import has_answer, split_answer
from lorax_ft.evaluation.exact_match import Answers
from lorax_ft.evaluation.multiple_choice import evaluate_choices
from lorax_ft.inference.generate import text_positions
from lorax_ft.run.setup import Job
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, combine

METRIC = "validation_loss"
"""The name of the validation loss in the log."""
ACCURACY = "accuracy"
"""The name of the accuracy on the questions of eval.choices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics and answers of the model on the validation rows."""

    measured: Mapping[str, float]
    """As `validation_metrics`."""
    exact_match: float | None
    answered: Answers | None

    @property
    def losses(self) -> dict[str, float]:
        """The validation losses by metric; empty if there are no validation rows."""
        return {name: value for name, value in self.measured.items() if name != ACCURACY}

    @property
    def loss(self) -> float | None:
        """The validation loss of the first set, if there is one."""
        return first_loss(self.measured)

    @property
    def accuracy(self) -> float | None:
        """The fraction of the questions of eval.choices that were answered correctly."""
        return self.measured.get(ACCURACY)


def validation_metrics(job: Job, state: TrainState) -> dict[str, float]:
    """The mean loss per labeled token of each validation set, and the accuracy, by metric.

    The metrics are "validation_loss", or "validation_loss/NAME" for a set with a name, and
    "accuracy" if there are questions.
    """
    params = combine(state.trained, job.frozen)
    measured = {}
    for name, split in job.data.validation_sets.items():
        if split.rows:
            metric = f"{METRIC}/{name}" if name else METRIC
            measured[metric] = _mean_loss(job, params, split.rows)
    if job.questions is not None:
        measured[ACCURACY] = float(
            evaluate_choices(job.model, params, job.questions).correct.mean()
        )
    return measured


def first_loss(measured: Mapping[str, float]) -> float | None:
    """The loss of the first validation set, by which the best checkpoint is chosen."""
    return measured.get(first_metric(measured))


def first_metric(measured: Mapping[str, float]) -> str:
    """The name of that loss; empty if there are no validation rows."""
    for metric in measured:
        if metric.startswith(METRIC):
            return metric
    return ""


def describe_metrics(measured: Mapping[str, float]) -> str:
    """Metrics in words, such as "validation loss 1.2345, accuracy 43.2 %"."""
    parts: list[str] = []
    for metric, value in measured.items():
        if metric == ACCURACY:
            parts.append(f"accuracy {100 * value:.1f} %")
            continue
        _, _, name = metric.partition("/")
        words = "validation loss" if not parts else ""
        parts.append(f"{words} {name} {value:.4f}")
    return " ".join(", ".join(parts).split())


def _mean_loss(job: Job, params: Tree, rows: Sequence[Sequence[Sample]]) -> float:
    """The mean loss per labeled token of the first `eval.rows` rows."""
    config = job.config
    # As many rows at a time as in training, which fits in memory.
    size = config.train.batch_size // config.train.microbatches
    max_length = job.data.max_length
    totals = np.zeros(2)  # summed loss, labeled tokens
    for batch in evaluation_batches(rows, size, max_length=max_length, limit=config.eval.rows):
        placed = sharding.place_batch(batch, job.mesh)
        with jax.set_mesh(job.mesh):
            totals += np.array(jax.device_get(job.evaluate(params, placed)))
    loss, tokens = totals
    return float(loss / tokens)


def choose_questions(job: Job) -> tuple[list[Conversation], int]:
    """The first validation conversations to answer, and how many were skipped as too long."""
    config, model = job.config.eval, job.model
    wanted = max(config.exact_match_rows, config.samples)
    positions = text_positions(job.state.trained, model.config)
    skipped = 0
    chosen: list[Conversation] = []
    for example in job.data.validation.examples:
        if len(chosen) == wanted:
            break
        # A plain text asks nothing, and a conversation may end with the call of a tool.
        if not isinstance(example, Conversation) or not has_answer(example.messages):
            continue
        messages, _ = split_answer(example.messages)
        question = dataclasses.replace(example, messages=messages)
        prompt = encode_prompt(question, model.tokenizer)
        # `generate` refuses a prompt that leaves no room for the longest answer.
        if len(prompt) + config.max_new_tokens <= positions:
            chosen.append(example)
        else:
            skipped += 1
    return chosen, skipped
