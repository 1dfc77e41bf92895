"""Evaluation of a run on its validation rows: the loss, and answers compared with references."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from lorax_ft import sharding
from lorax_ft.data.batches import evaluation_batches
from lorax_ft.data.chat import encode_prompt
from lorax_ft.data.conversation import Conversation, Message
from lorax_ft.data.formats import has_answer, split_answer
from lorax_ft.evaluation.exact_match import Answers
from lorax_ft.run.setup import Job
from lorax_ft.training.step import TrainState
from lorax_ft.tree import combine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics and answers of the model on the validation rows."""

    loss: float | None
    exact_match: float | None
    answered: Answers | None


def validation_loss(job: Job, state: TrainState) -> float | None:
    """The mean loss per labeled token of the validation rows; None if there are no such rows."""
    config = job.config
    rows = job.data.validation.rows
    if not rows:
        return None
    params = combine(state.trained, job.frozen)
    # As many rows at a time as in training, which fits in memory.
    size = config.train.batch_size // config.train.microbatches
    max_length = config.data.max_length
    totals = np.zeros(2)  # summed loss, labeled tokens
    for batch in evaluation_batches(rows, size, max_length=max_length, limit=config.eval.rows):
        placed = sharding.place_batch(batch, job.mesh)
        with jax.set_mesh(job.mesh):
            totals += np.array(jax.device_get(job.evaluate(params, placed)))
    loss, tokens = totals
    return float(loss / tokens)


def choose_questions(job: Job) -> tuple[list[list[Message]], int]:
    """The first validation conversations to answer, and how many were skipped as too long."""
    config, model = job.config.eval, job.model
    wanted = max(config.exact_match_rows, config.samples)
    skipped = 0
    chosen: list[list[Message]] = []
    for example in job.data.validation.examples:
        if len(chosen) == wanted:
            break
        # A plain text asks nothing, and a conversation may end with the call of a tool.
        if not isinstance(example, Conversation) or not has_answer(example.messages):
            continue
        messages = example.messages
        question, _ = split_answer(messages)
        prompt = encode_prompt(question, model.tokenizer)
        # `generate` refuses a prompt that leaves no room for the longest answer.
        if len(prompt) + config.max_new_tokens <= model.config.max_positions:
            chosen.append(messages)
        else:
            skipped += 1
    return chosen, skipped
