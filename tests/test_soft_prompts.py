"""Soft prompts: equal to the tokens that they start from, one a sample, trained and saved."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import make_tokenizer
from rich.console import Console
from run_cases import SHORT, Main, config, losses
from zoo import TINY, built_decoder

import lorax_ft as lft
from lorax_ft import sharding
from lorax_ft.config import EMBEDDED_MODEL
from lorax_ft.data.chat import Sample
from lorax_ft.data.conversation import Conversation
from lorax_ft.data.dataset import load_data
from lorax_ft.data.packing import collate
from lorax_ft.evaluation.likelihood import token_scores
from lorax_ft.evaluation.next_token import next_tokens
from lorax_ft.lowrank.activation import with_invocation
from lorax_ft.models.config import LayerType, LinearAttention
from lorax_ft.models.model import Model
from lorax_ft.models.rope import Rope
from lorax_ft.models.soft_prompt import soft_prompt_of
from lorax_ft.run.summary import _print_data
from lorax_ft.run.validation import choose_questions
from lorax_ft.schema import is_soft_prompt
from lorax_ft.soft_prompts.door import virtual_ids, virtual_tokens
from lorax_ft.training.losses import neftune, supervised_loss
from lorax_ft.tree import Tree, flatten, split

pytestmark = pytest.mark.usefixtures("standard_promotion")

TEXT = "w5 w9 w13 w2"  # four tokens of the tests' tokenizer
KEY = jax.random.key(3)
VIRTUAL = 4
KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt"},
    "prefix": {"kind": "prefix"},
    "prompt-mlp": {"kind": "prompt", "encoder": "mlp", "encoder_width": 6},
    "prompt-lstm": {"kind": "prompt", "encoder": "lstm", "encoder_width": 5},
    "prefix-mlp": {"kind": "prefix", "encoder": "mlp"},
}
FULL = LayerType(rope=Rope(dims=8, theta=1e4))
WINDOWED = LayerType(rope=Rope(dims=8, theta=1e3), window=3)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"layer_types": (FULL, WINDOWED, FULL)},
    "scaled": {"embedding_scale": 5.0, "qk_norm": "head"},
}


@functools.cache
def model_of(name: str) -> Any:
    return dataclasses.replace(built_decoder(**MODELS[name]), tokenizer=make_tokenizer())


def prompt_config(kind: str, **fields: Any) -> lft.PromptConfig:
    return lft.PromptConfig(virtual_tokens=VIRTUAL, **KINDS[kind], **fields)


@functools.cache
def with_prompt(kind: str, name: str = "plain") -> Tree:
    model = model_of(name)
    return lft.add_soft_prompt(model.params, prompt_config(kind), model, key=KEY)


def behind(tokens: Any) -> jax.Array:
    """The tokens behind the virtual ones."""
    tokens = np.atleast_2d(tokens)
    ids = np.tile(virtual_ids(VIRTUAL, vocab_size=TINY.vocab_size), (len(tokens), 1))
    return jnp.asarray(np.concatenate([ids, tokens], axis=1))


def text_ids() -> np.ndarray:
    ids = np.asarray(make_tokenizer()(TEXT)["input_ids"])
    assert len(ids) == VIRTUAL
    return ids


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_start_from_a_text_equals_the_text(kind: str, name: str) -> None:
    model = model_of(name)
    start = prompt_config(kind, init="text", text=TEXT)
    params = lft.add_soft_prompt(model.params, start, model, key=KEY)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 9))
    both = jnp.asarray(np.concatenate([np.tile(text_ids(), (2, 1)), tokens], axis=1))
    expected = model.apply({"params": model.params}, both)[:, VIRTUAL:]
    found = model.apply({"params": params}, behind(tokens))[:, VIRTUAL:]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # And it is not what the model does without it.
    assert np.abs(found - model.apply({"params": model.params}, tokens)).max() > 0.05


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_have_a_prompt_each(kind: str) -> None:
    model, params = model_of("plain"), with_prompt(kind)
    ids = virtual_ids(VIRTUAL, vocab_size=97)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 97, length) for length in (5, 3, 7)]
    samples = [Sample(np.concatenate([ids, text]), np.ones(VIRTUAL + len(text))) for text in texts]
    batch = collate([samples], 32)
    packed, _ = model.features(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    start = 0
    for sample in samples:
        stop = start + len(sample)
        alone, _ = model.features(params, sample.tokens[None])
        own = slice(start + VIRTUAL, stop)
        np.testing.assert_allclose(packed[0, own], alone[0, VIRTUAL:], atol=2e-5)
        start = stop


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_trains_and_nothing_else(kind: str, padded_batches: Any) -> None:
    model, params = model_of("plain"), with_prompt(kind)
    trained, frozen = lft.partition(params)
    assert {path for path in flatten(params) if is_soft_prompt(path)} == set(flatten(trained))
    assert virtual_tokens(params) == VIRTUAL
    (batch,) = padded_batches(1)
    wide = {}
    for name, values in batch.items():
        before = np.zeros((len(values), VIRTUAL), values.dtype)
        wide[name] = np.concatenate([before, values], axis=1)
    wide["tokens"] = np.array(behind(batch["tokens"]))
    wide["segment_ids"][:, :VIRTUAL] = 1
    wide["positions"] = np.tile(np.arange(wide["tokens"].shape[1]), (len(wide["tokens"]), 1))
    loss = supervised_loss(model, packed=False)
    gradient = jax.grad(lambda t: loss(lft.combine(t, frozen), wide, None)[0])(trained)
    for path, leaf in flatten(gradient).items():
        assert jnp.isfinite(leaf).all(), path
        assert jnp.any(leaf != 0), path


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generation_and_scores_equal_those_of_the_text(kind: str) -> None:
    model = model_of("plain")
    params = lft.add_soft_prompt(
        model.params, prompt_config(kind, init="text", text=TEXT), model, key=KEY
    )
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 97, length) for length in (3, 6)]
    longer = [np.concatenate([text_ids(), prompt]) for prompt in prompts]
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": ()}
    expected = lft.generate(model, model.params, longer, **options)
    assert lft.generate(model, params, prompts, **options) == expected
    off = lft.disable_adapters(params, model.params, layout=model.layout)
    plain = lft.generate(model, model.params, prompts, **options)
    assert lft.generate(model, off, prompts, **options) == plain != expected

    with_text = token_scores(model, model.params, longer)
    for score, other in zip(token_scores(model, params, prompts), with_text, strict=True):
        # Of the same tokens: the first one has no score.
        np.testing.assert_allclose(score.log_probs, other.log_probs[VIRTUAL:], atol=1e-4)
    targets = np.array([[1, 2], [3, 4]])
    found = next_tokens(model, params, prompts, targets, groups=["a", "a"])
    known = next_tokens(model, model.params, longer, targets)
    np.testing.assert_allclose(found.log_probs, known.log_probs, atol=1e-4)


def test_a_prompt_beside_lora_and_dora(randomize: Any) -> None:
    """Both act: either alone gives other logits."""
    model = model_of("plain")
    adapter = lft.AdapterConfig(rank=2, dora=True)
    added = lft.add_adapters(with_prompt("prefix"), adapter, layout=model.layout, key=KEY)
    both = randomize(added)
    prompt, lora = soft_prompt_of(both)
    tokens = np.arange(8)[None]
    found = model.apply({"params": both}, behind(tokens))[:, VIRTUAL:]
    only_lora = model.apply({"params": lora}, tokens)
    base, _ = split(both, lambda path: path in flatten(model.params))
    only_prompt = model.apply({"params": lft.combine(base, prompt)}, behind(tokens))[:, VIRTUAL:]
    assert np.abs(found - only_lora).max() > 1e-3
    assert np.abs(found - only_prompt).max() > 1e-3


def test_noise_on_embeddings_leaves_virtual_tokens_alone() -> None:
    model, params = model_of("plain"), with_prompt("prompt")
    tokens = np.asarray(behind(np.arange(6)))
    batch = collate([[Sample(tokens[0], np.ones(tokens.size))]], 12)
    seen = {}

    def features(params: Tree, *args: Any, noise: Any = None, **options: Any) -> Any:
        seen["noise"] = noise
        return Model.features(model, params, *args, noise=noise, **options)

    spied = dataclasses.replace(model)
    object.__setattr__(spied, "features", features)
    loss = supervised_loss(spied, packed=False, neftune_alpha=5.0)
    loss(params, {name: jnp.asarray(value) for name, value in batch.items()}, KEY)
    segments = np.zeros((1, 12), np.int32)
    segments[0, VIRTUAL:10] = 1
    expected = neftune(jax.random.fold_in(KEY, 1), segments, alpha=5.0, width=32)
    np.testing.assert_array_equal(seen["noise"], expected)
    assert not np.any(seen["noise"][0, :VIRTUAL])
    assert np.all(seen["noise"][0, VIRTUAL:10] != 0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [*KINDS, "lora"])
def test_folders_keep_logits(kind: str, speaker: Any, tmp_path: Path, randomize: Any) -> None:
    model = dataclasses.replace(speaker, params=model_of("plain").params)
    params = with_prompt("prefix" if kind == "lora" else kind)
    if kind == "lora":
        adapter = lft.AdapterConfig(rank=2)
        params = randomize(lft.add_adapters(params, adapter, layout=model.layout, key=KEY))
    lft.save_peft(tmp_path / "adapter", params, model)
    assert (tmp_path / "adapter/soft_prompt").is_dir() == (kind == "lora")
    read = lft.load_peft(tmp_path / "adapter", model)
    tokens = behind(np.arange(8))
    found, expected = (model.apply({"params": tree}, tokens) for tree in (read, params))
    np.testing.assert_allclose(found[:, VIRTUAL:], expected[:, VIRTUAL:], atol=1e-5)


LINEAR = LinearAttention(key_heads=2, value_heads=4, key_dim=8, value_dim=8, conv_width=4)


def test_a_question_that_has_no_room_beside_the_prompt_is_left_out() -> None:
    """64 positions: 4 of the prompt, 10 of an answer, and a question of 50 tokens but not of 51."""
    model, (trained, _) = model_of("plain"), lft.partition(with_prompt("prefix"))
    examples = []
    for words in (47, 48):  # three more are the template's
        question = {"role": "user", "content": " ".join(["w1"] * words)}
        answer = {"role": "assistant", "content": "w2"}
        examples.append(Conversation(messages=[question, answer]))
    for tree, fitting in ((trained, 1), ({}, 2)):
        job: Any = types.SimpleNamespace(
            config=lft.Config(eval=lft.EvalConfig(max_new_tokens=10)),
            model=model,
            state=types.SimpleNamespace(trained=tree),
            data=types.SimpleNamespace(validation=types.SimpleNamespace(examples=examples)),
        )
        chosen, skipped = choose_questions(job)
        assert (len(chosen), skipped) == (fitting, 2 - fitting)


def test_refusals() -> None:
    model = model_of("plain")
    with pytest.raises(ValueError, match=r"cannot be merged.*; save_peft writes it"):
        lft.merge_adapters(with_prompt("prompt"), layout=model.layout)
    with pytest.raises(ValueError, match="have a soft prompt already"):
        lft.add_soft_prompt(with_prompt("prompt"), prompt_config("prefix"), model, key=KEY)
    start = prompt_config("prompt", init="text", text=TEXT)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        lft.add_soft_prompt(model.params, start, built_decoder(), key=KEY)
    with pytest.raises(ValueError, match=r"encoder is mlp, but there is no soft prompt; give"):
        lft.PromptConfig(encoder="mlp")
    with pytest.raises(ValueError, match="lstm is for prompts"):
        lft.PromptConfig(kind="prefix", encoder="lstm")
    with pytest.raises(ValueError, match="belong together"):
        lft.PromptConfig(kind="prompt", init="text")
    with pytest.raises(ValueError, match=r"leaves fewer than 8 tokens of data.max_length 256"):
        lft.Config(prompt=lft.PromptConfig(kind="prompt", virtual_tokens=250))
    with pytest.raises(ValueError, match=r"nothing would train; .* or prompt.kind"):
        lft.Config(adapter=lft.AdapterConfig(targets=()))
    hybrid = built_decoder(layer_types=(LayerType(rope=None, linear=LINEAR), FULL, FULL))
    with pytest.raises(ValueError, match="have linear attention, which has none"):
        lft.add_soft_prompt(hybrid.params, prompt_config("prefix"), hybrid, key=KEY)
    long = np.zeros(TINY.max_positions - VIRTUAL, int)
    with pytest.raises(ValueError, match="64 tokens plus max_new_tokens 1 exceed"):
        lft.generate(model, with_prompt("prompt"), [long], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "activated"])
def test_gradients_do_not_depend_on_the_mesh(kind: str, randomize: Any) -> None:
    """Of packed rows on data, fsdp and tensor axes; of an activated LoRA too."""
    model = model_of("plain")
    count = 0 if kind == "activated" else VIRTUAL
    if kind == "activated":
        adapter = lft.AdapterConfig(rank=2)
        added = lft.add_adapters(model.params, adapter, layout=model.layout, key=KEY)
        params = with_invocation(randomize(added), (5, 6))
    else:
        params = with_prompt(kind)
    ids = virtual_ids(count, vocab_size=97)
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(4):
        texts = [np.append(rng.integers(0, 97, 4), (5, 6, 9)) for _ in range(2)]
        tokens = [np.concatenate([ids, text]) for text in texts]
        rows.append([Sample(one, np.arange(len(one)) > count) for one in tokens])
    batch = {name: jnp.asarray(value) for name, value in collate(rows, 24).items()}
    loss = supervised_loss(model, packed=True)
    trained, frozen = lft.partition(params)

    def gradient(trained: Tree, frozen: Tree, batch: Any) -> Tree:
        return jax.grad(lambda t: loss(lft.combine(t, frozen), batch, None)[0])(trained)

    want = flatten(jax.jit(gradient)(trained, frozen, batch))
    mesh = sharding.make_mesh(lft.MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.param_shardings(
        params, sharding.DECODER_RULES, layout=model.layout, mesh=mesh
    )
    trained, frozen = lft.partition(jax.device_put(params, places))
    placed = sharding.place_batch({name: np.asarray(v) for name, v in batch.items()}, mesh)
    with jax.set_mesh(mesh):
        got = flatten(jax.jit(gradient)(trained, frozen, placed))
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def test_a_run_learns(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    steps = [*config("p_tuning_v2"), *SHORT, "--data.max_length", 80]
    assert main(*steps, "--train.steps", 3, "--train.output", out) == 0
    found = losses(out)
    assert found[3] < found[1]
    said = " ".join(capsys.readouterr().out.split())
    # 68 tokens of a sample, behind 20 virtual ones.
    assert "95% of the samples would fit in 88" in said
    # It cannot be merged, so that no command says to.
    assert f"generate --run {out}" in said
    assert f"merge --run {out}" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prompt_tuning", ()),
        ("prefix_tuning", ("--data.pack",)),
    ],
)
def test_a_run_resumes_bitwise(
    name: str, options: tuple[str, ...], main: Main, tmp_path: Path
) -> None:
    steps = [*config(name), *SHORT, *options, "--train.steps", 4, "--train.save_every", 2]
    assert main(*steps, "--train.output", tmp_path / "whole") == 0
    found = losses(tmp_path / "whole")
    assert found[4] < found[1]
    stopped = [*steps, "--train.output", tmp_path / "stopped"]
    assert main(*stopped, "--train.steps", 2, "--optim.schedule", "constant") == 0
    assert main(*steps, "--train.output", tmp_path / "again", "--optim.schedule", "constant") == 0
    assert main(*stopped, "--optim.schedule", "constant") == 0
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_padding_counts_the_virtual_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    model = lft.load_model(EMBEDDED_MODEL)
    count = 4  # with more, too little is padding for the advice
    data_config = lft.DataConfig(max_length=256, limit=64)
    prompt = lft.PromptConfig(kind="prompt", virtual_tokens=count)
    run = lft.Config(data=data_config, prompt=prompt)
    ids = virtual_ids(count, vocab_size=model.config.vocab_size)
    data = load_data(data_config, model.tokenizer, seed=0, prompt=ids)
    _print_data(Console(width=1000), data, run)
    lengths = [len(sample) for row in data.train.rows for sample in row]
    padding = 1 - sum(lengths) / (len(data.train.rows) * data.max_length)
    packed = math.ceil(sum(lengths) / 256)
    said = capsys.readouterr().out
    assert f"{padding:.0%} padding" in said
    assert f"about {packed} rows instead of {len(data.train.rows)}" in said
