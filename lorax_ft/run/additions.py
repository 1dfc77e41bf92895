"""What a run adds beside kernels: new and trainable tokens, an invocation, a soft prompt."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import numpy as np

from lorax_ft.config import Config
from lorax_ft.data.dataset import Split
from lorax_ft.interop.new_tokens import add_tokens, with_tokens_of
from lorax_ft.lowrank.activation import INVOCATION, with_invocation
from lorax_ft.lowrank.groups import fully_trained
from lorax_ft.models.model import HEAD, TABLE, LoadedModel, Model
from lorax_ft.models.soft_prompt import add_soft_prompt
from lorax_ft.models.trainable_tokens import add_trainable_tokens


def with_new_tokens(model: LoadedModel, config: Config) -> LoadedModel:
    """The model with the tokens of data.new_tokens, and those of the adapter to continue from.

    Raises:
      ValueError: as `add_tokens` and `with_tokens_of`, or the adapter to continue from has not all
        of the tokens.
    """
    if config.adapter.continue_from is not None:
        model = with_tokens_of(config.adapter.continue_from, model)
    # An adapter that was trained with them has them in its folder's tokenizer.
    known = model.tokenizer.get_vocab()
    continues = config.adapter.continue_from is not None
    new = []
    for text in config.data.new_tokens:
        if text not in known:
            new.append(text)
        elif not continues:
            warnings.warn(
                f"data.new_tokens: {text!r} is a token of the model already, so its row trains "
                "from what it is",
                stacklevel=2,
            )
    if new and continues:
        raise ValueError(
            f"data.new_tokens: {new[0]!r} is not one of the tokens of the adapter in "
            f"{config.adapter.continue_from}, which trains its own only; merge it first, and train "
            "a new adapter on that"
        )
    return add_tokens(model, new) if new else model


def with_additions(model: LoadedModel, config: Config) -> LoadedModel:
    """The model with what a new run adds to other places than the targets of its adapter.

    That is the invocation of an activated LoRA, trainable tokens and a soft prompt.

    Raises:
      ValueError: as `add_soft_prompt` and `add_trainable_tokens`, or a text has no tokens.
    """
    params = model.params
    continues = config.adapter.continue_from is not None
    text = config.adapter.invocation
    if text is not None and not continues:
        params = with_invocation(params, invocation_tokens(text, model))
    if ids := trained_token_ids(config, model):
        params = add_trainable_tokens(params, ids, model)
    if config.prompt.kind != "none":
        # A stream of random numbers of its own, beside those of adapters and steps.
        key = jax.random.fold_in(jax.random.key(config.train.seed), 2)
        params = add_soft_prompt(params, config.prompt, model, key=key)
    return dataclasses.replace(model, params=params)


def check_additions(config: Config, model: LoadedModel, training: Split) -> None:
    """Warn of training samples without what was added, and raise where it acts in none.

    Raises:
      ValueError: an activated LoRA acts in no sample.
    """
    if INVOCATION in model.params:
        _check_invocations(training, np.asarray(model.params[INVOCATION]))
    if config.data.new_tokens:
        _check_new_tokens(config.data.new_tokens, training, model)


def trained_token_ids(config: Config, model: Model) -> list[int]:
    """The ids of the tokens whose rows train alone in a run.

    Raises:
      ValueError: one of adapter.trainable_tokens is not one token, or tokens cannot train alone.
    """
    adapter = config.adapter
    tokens = (*config.data.new_tokens, *adapter.trainable_tokens)
    if not tokens or adapter.continue_from is not None:
        return []
    whole = fully_trained(TABLE, adapter.train_whole)
    if whole != fully_trained(HEAD, adapter.train_whole) and not model.config.tied:
        raise ValueError(
            f"adapter.train_whole has one of {TABLE} and {HEAD}, and the tokens of data.new_tokens "
            "and adapter.trainable_tokens train in both; give both or neither"
        )
    if whole and adapter.trainable_tokens:
        raise ValueError(
            f"adapter.trainable_tokens train alone, but adapter.train_whole trains {TABLE} in "
            "full; remove one of them"
        )
    if whole:
        return []
    ids = []
    for token in tokens:
        if isinstance(token, int):
            ids.append(token)
            continue
        pieces = model.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            raise ValueError(
                f"adapter.trainable_tokens: {token!r} is {len(pieces)} tokens; give each of them, "
                "or make it one with data.new_tokens"
            )
        ids += pieces
    return ids


def invocation_tokens(text: str, model: Model) -> list[int]:
    """The token ids of an activated LoRA's invocation.

    Raises:
      ValueError: there are none.
    """
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"adapter.invocation {text!r} has no tokens")
    return ids


def _check_invocations(split: Split, invocation: np.ndarray) -> None:
    """Warn of training samples in which an activated LoRA never acts; raise if it acts in none."""
    count = lacking = 0
    for row in split.rows:
        for sample in row:
            count += 1
            lacking += not contains(sample.tokens, invocation)
    if not lacking:
        return
    found = f"{lacking:,} of {count:,} training samples have no invocation (adapter.invocation)"
    if lacking == count:
        raise ValueError(
            f"{found}, so the adapter would act in none; give a text that the chat template writes"
        )
    warnings.warn(f"{found}: the adapter does not act in them", stacklevel=2)


def _check_new_tokens(texts: Sequence[str], split: Split, model: Model) -> None:
    """Warn of new tokens that occur in no training sample, so that they learn only to be rare."""
    unseen = dict(zip(model.tokenizer.convert_tokens_to_ids(list(texts)), texts, strict=True))
    for row in split.rows:
        for sample in row:
            for token in unseen.keys() & set(sample.tokens.tolist()):
                del unseen[token]
        if not unseen:
            return
    warnings.warn(
        f"data.new_tokens: no training sample has {', '.join(map(repr, unseen.values()))}",
        stacklevel=2,
    )


def contains(tokens: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether some tokens occur in others, one after the other.

    >>> contains(np.array([1, 2, 3]), np.array([2, 3])), contains(np.array([1]), np.array([1, 2]))
    (True, False)
    """
    if len(tokens) < len(wanted):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    return bool((windows == wanted).all(axis=1).any())
