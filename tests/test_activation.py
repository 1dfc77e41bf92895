"""Activated LoRA: the base before the invocation, LoRA from it on, in packs, caches and folders."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import SHORT, Main, config, losses
from zoo import built_decoder

import lorax_ft as lft
from lorax_ft.data.chat import Sample
from lorax_ft.data.packing import collate
from lorax_ft.evaluation.likelihood import token_scores
from lorax_ft.evaluation.next_token import next_tokens
from lorax_ft.lowrank.activation import INVOCATION, active_rows, with_invocation
from lorax_ft.models.cache import empty_cache
from lorax_ft.tree import Tree, flatten

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(3)
CALL = (7, 8)


@functools.cache
def model_of() -> Any:
    return built_decoder()


@pytest.fixture(scope="module")
def trees(randomize: Any) -> tuple[Tree, Tree]:
    """LoRA with random factors, and the same activated by `CALL`."""
    model = model_of()
    adapter = lft.AdapterConfig(rank=2)
    lora = randomize(lft.add_adapters(model.params, adapter, layout=model.layout, key=KEY))
    return lora, with_invocation(lora, CALL)


def test_the_last_invocation_of_each_sample_counts() -> None:
    tokens = jnp.asarray([[1, 7, 8, 2, 7, 8, 3, 7], [7, 8, 1, 7, 1, 8, 7, 8]])
    samples = jnp.asarray([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 3]])
    whole = active_rows(tokens, jnp.asarray(CALL))
    assert whole.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]]
    packed = active_rows(tokens, jnp.asarray(CALL), samples)
    # The last 7 and 8 are of two samples; the second sample has none.
    assert packed.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]]


def test_the_base_before_and_lora_behind(trees: tuple[Tree, Tree]) -> None:
    model, (lora, activated) = model_of(), trees
    tokens = np.array([[1, 2, 3, 7, 8, 4, 5], [7, 8, 3, 1, 2, 4, 5], [1, 2, 3, 4, 5, 6, 7]])
    base, found, everywhere = (
        model.apply({"params": tree}, jnp.asarray(tokens))
        for tree in (model.params, activated, lora)
    )
    np.testing.assert_array_equal(found[0, :3], base[0, :3])
    assert np.abs(found[0, 3:] - base[0, 3:]).min(axis=-1).max() > 0
    assert np.abs(found[0, 3:] - everywhere[0, 3:]).max() > 1e-3  # its keys are the base's
    np.testing.assert_allclose(found[1], everywhere[1], atol=1e-6)
    np.testing.assert_array_equal(found[2], base[2])


def test_keys_and_values_before_it_are_the_bases(trees: tuple[Tree, Tree]) -> None:
    model, (_, activated) = model_of(), trees
    tokens = jnp.asarray([[1, 2, 3, 7, 8, 4]])
    caches = []
    for tree in (model.params, activated):
        _, cache = model.features(tree, tokens, cache=empty_cache(model.config, 1, 8))
        caches.append(cache)
    for name in ("k", "v"):
        base, own = (cache[name] for cache in caches)
        np.testing.assert_array_equal(own[..., :3, :], base[..., :3, :])
        assert np.abs(own[..., 3:6, :] - base[..., 3:6, :]).max() > 1e-3
    # So the base's cache can be gone on with.
    rest, _ = model.features(
        activated,
        tokens[:, 3:],
        jnp.asarray([[3, 4, 5]]),
        cache=caches[0],
        active=jnp.ones((1, 3), bool),
    )
    whole, _ = model.features(activated, tokens)
    np.testing.assert_allclose(rest, whole[:, 3:], atol=1e-5)


def test_packed_samples_are_activated_alone(trees: tuple[Tree, Tree]) -> None:
    model, (_, activated) = model_of(), trees
    texts = [np.array([1, 7, 8, 2]), np.array([3, 4, 5]), np.array([7, 8, 6])]
    batch = collate([[Sample(text, np.ones(len(text))) for text in texts]], 12)
    packed, _ = model.features(activated, batch["tokens"], batch["positions"], batch["segment_ids"])
    start = 0
    for text in texts:
        alone, _ = model.features(activated, text[None])
        np.testing.assert_allclose(packed[0, start : start + len(text)], alone[0], atol=1e-5)
        start += len(text)


def test_generation_goes_on_as_the_whole_text_would(trees: tuple[Tree, Tree]) -> None:
    model, (_, activated) = model_of(), trees
    prompts = [[1, 2, 7, 8, 3], [4, 5], [7, 8]]
    found = lft.generate(model, activated, prompts, max_new_tokens=5, stop_ids=())
    for prompt, answer in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(5):
            # An invocation in the answer itself would not count.
            active = active_rows(jnp.asarray([prompt]), jnp.asarray(CALL))
            later = jnp.full((1, len(text) - len(prompt)), active.any())
            features, _ = model.features(
                activated,
                jnp.asarray([text]),
                active=jnp.concatenate([active, later], axis=1),
            )
            text.append(int(jnp.argmax(model.logits(activated, features)[0, -1])))
        assert answer == text[len(prompt) :]
    long = np.array([1, 2, 7, 8, 3])
    prompts = [np.append(np.tile(long, 6), last) for last in (4, 5)]
    targets = np.array([[1, 2], [3, 4]])
    shared = next_tokens(model, activated, prompts, targets, groups=["a", "a"])
    alone = next_tokens(model, activated, prompts, targets)
    np.testing.assert_allclose(shared.log_probs, alone.log_probs, atol=1e-5)
    (score,) = token_scores(model, activated, [long])
    logits = jax.nn.log_softmax(model.apply({"params": activated}, long[None]))[0]
    np.testing.assert_allclose(score.log_probs, logits[np.arange(4), long[1:]], atol=1e-4)


def test_folders_and_refusals(speaker: Any, tmp_path: Path, trees: tuple[Tree, Tree]) -> None:
    _, activated = trees
    model = dataclasses.replace(speaker, params=model_of().params)
    lft.save_peft(tmp_path / "adapter", activated, model)
    read = lft.load_peft(tmp_path / "adapter", model)
    assert read[INVOCATION].tolist() == list(CALL)
    assert {*flatten(read)} == {*flatten(activated)}
    for wrong in ([1.5], [-1], [[7, 8]]):
        with pytest.raises(ValueError, match=r"the invocation is .*; it must be a list of token"):
            with_invocation(model.params, wrong)
    with pytest.raises(ValueError, match=r"activated LoRA .* cannot be merged"):
        lft.merge_adapters(activated, layout=model.layout)
    with pytest.raises(ValueError, match=r"invocation is 'x', .* adapter.dora changes"):
        lft.AdapterConfig(invocation="x", dora=True)
    with pytest.raises(ValueError, match=r"adapter.init pissa changes the whole layer"):
        lft.AdapterConfig(invocation="x", init="pissa")
    with pytest.raises(ValueError, match=r"invocation is x, but adapter.method ia3 does not"):
        lft.AdapterConfig(invocation="x", method="ia3")
    file = tmp_path / "adapter/adapter_config.json"
    saved = json.loads(file.read_text())
    for wrong in ([7, 97], [7.0], "7 8"):
        file.write_text(json.dumps({**saved, "alora_invocation_tokens": wrong}))
        with pytest.raises(
            ValueError, match=r"alora_invocation_tokens is .* of ids of the model's"
        ):
            lft.load_peft(tmp_path / "adapter", model)
    head = lft.AdapterConfig(rank=2, targets=("lm_head",))
    added = lft.add_adapters(model.params, head, layout=model.layout, key=KEY)
    with pytest.raises(ValueError, match=r"lm_head is no dense layer of a stack"):
        model.apply({"params": with_invocation(added, CALL)}, jnp.asarray([[1]]))


def test_a_run(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [*config("lora"), *SHORT, "--train.steps", 3, "--data.pack"]
    out = tmp_path / "run"
    invoked = ["--adapter.invocation", "<|im_start|>assistant"]
    assert main(*steps, *invoked, "--train.output", out) == 0
    found = losses(out)
    assert found[3] < found[1]
    assert main(*steps, "--adapter.invocation", "zzz zzz", "--train.output", tmp_path / "no") == 2
    assert "have no invocation" in capsys.readouterr().err
