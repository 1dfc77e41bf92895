"""Trainable tokens: rows of their own in the embedding and the head; and new tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import make_tokenizer
from run_cases import SHORT, Main, config, losses
from tokenizers import normalizers
from zoo import built_decoder

import lorax_ft as lft
from lorax_ft import sharding
from lorax_ft.config import EMBEDDED_MODEL
from lorax_ft.interop.load import load_model
from lorax_ft.interop.vllm import save_for_vllm
from lorax_ft.lowrank.terms.tokens import COLUMNS, IDS, ROWS
from lorax_ft.run.additions import with_new_tokens
from lorax_ft.tree import Tree, flatten

pytestmark = pytest.mark.usefixtures("standard_promotion")

IDS_TRAINED = (7, 3, 96)
SORTED = [3, 7, 96]
TOKENS = jnp.asarray([[3, 5, 7, 9, 96, 2], [1, 2, 4, 6, 8, 10]])
KEY = jax.random.key(4)


@functools.cache
def model_of(*, tied: bool) -> Any:
    return dataclasses.replace(built_decoder(tied=tied), tokenizer=make_tokenizer())


@functools.cache
def with_tokens(*, tied: bool) -> Tree:
    model = model_of(tied=tied)
    return lft.add_trainable_tokens(model.params, IDS_TRAINED, model)


def moved(params: Tree) -> Tree:
    """The parameters with other rows of the trained tokens."""

    def move(path: str, leaf: jax.Array) -> jax.Array:
        if not path.endswith((ROWS, COLUMNS)):
            return leaf
        return leaf + jax.random.normal(KEY, leaf.shape)

    flat = flatten(params)
    return lft.combine(*[_nested(path, move(path, leaf)) for path, leaf in flat.items()])


def _nested(path: str, leaf: Any) -> Tree:
    *parents, name = path.split("/")
    tree: Tree = {name: leaf}
    for parent in reversed(parents):
        tree = {parent: tree}
    return tree


def logits(model: Any, params: Tree, tokens: Any = TOKENS) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_the_start_changes_nothing(tied: bool) -> None:
    model = model_of(tied=tied)
    params = with_tokens(tied=tied)
    assert params["embed_tokens"][IDS].tolist() == SORTED
    assert ("lm_head" in params) is not tied
    # Up to rounding: the columns are multiplied apart from the others.
    np.testing.assert_allclose(logits(model, params), logits(model, model.params), atol=1e-6)
    trained, _ = lft.partition(params)
    paths = {f"embed_tokens/{ROWS}"} | (set() if tied else {f"lm_head/{COLUMNS}"})
    assert set(flatten(trained)) == paths


@pytest.mark.parametrize("tied", [True, False])
def test_they_are_rows_of_the_tables(tied: bool) -> None:
    """The forward equals that of the tables with these rows, which are what merging gives."""
    model = model_of(tied=tied)
    params = moved(with_tokens(tied=tied))
    merged = lft.merge_adapters(params, layout=model.layout)
    assert set(flatten(merged)) == set(flatten(model.params))
    assert np.abs(logits(model, params) - logits(model, model.params)).max() > 0.1
    np.testing.assert_allclose(logits(model, params), logits(model, merged), rtol=1e-5, atol=1e-5)
    before, after = model.params["embed_tokens"]["embedding"], merged["embed_tokens"]["embedding"]
    changed = np.flatnonzero(np.any(np.asarray(before) != np.asarray(after), axis=1))
    assert changed.tolist() == SORTED
    if not tied:
        old, new = model.params["lm_head"]["kernel"], merged["lm_head"]["kernel"]
        changed = np.flatnonzero(np.any(np.asarray(old) != np.asarray(new), axis=0))
        assert changed.tolist() == SORTED


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_rows(tied: bool) -> None:
    """Of the whole tables' gradients, those in the trained rows, by the fused loss too."""
    model = model_of(tied=tied)
    params = moved(with_tokens(tied=tied))
    trained, frozen = lft.partition(params)
    merged = lft.merge_adapters(params, layout=model.layout)
    batch = {
        "tokens": TOKENS,
        "targets": jnp.roll(TOKENS, -1, axis=1),
        "weights": jnp.ones(TOKENS.shape),
        "positions": jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape),
        "segment_ids": jnp.ones(TOKENS.shape, jnp.int32),
    }
    loss = lft.supervised_loss(model, packed=False)

    def of_trained(trained: Tree) -> jax.Array:
        return loss(lft.combine(trained, frozen), batch, None)[0]

    def of_merged(merged: Tree) -> jax.Array:
        return loss(merged, batch, None)[0]

    got = jax.jit(jax.grad(of_trained))(trained)
    want = jax.jit(jax.grad(of_merged))(merged)
    rows = want["embed_tokens"]["embedding"][np.asarray(SORTED)]
    np.testing.assert_allclose(got["embed_tokens"][ROWS], rows, rtol=1e-4, atol=1e-5)
    if not tied:
        columns = want["lm_head"]["kernel"][:, np.asarray(SORTED)]
        np.testing.assert_allclose(got["lm_head"][COLUMNS], columns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_mesh_changes_no_gradient(tied: bool) -> None:
    model = model_of(tied=tied)
    params = moved(with_tokens(tied=tied))
    tokens = jnp.tile(TOKENS, (4, 1))

    def gradient(params: Tree, tokens: jax.Array) -> Tree:
        trained, frozen = lft.partition(params)

        def loss(trained: Tree) -> jax.Array:
            return jnp.mean(jnp.sin(model.apply({"params": lft.combine(trained, frozen)}, tokens)))

        return jax.grad(loss)(trained)

    want = flatten(jax.jit(gradient)(params, tokens))
    mesh = sharding.make_mesh(lft.MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.param_shardings(
        params, sharding.DECODER_RULES, layout=model.layout, mesh=mesh
    )
    with jax.set_mesh(mesh):
        got = flatten(jax.jit(gradient)(jax.device_put(params, places), tokens))
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("tied", [True, False])
def test_disabling_gives_the_base(tied: bool) -> None:
    model = model_of(tied=tied)
    params = moved(with_tokens(tied=tied))
    off = lft.disable_adapters(params, model.params, layout=model.layout)
    np.testing.assert_allclose(logits(model, off), logits(model, model.params), atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_they_train_beside_lora(tied: bool, randomize: Any, tmp_path: Path) -> None:
    """LoRA on all linear layers beside them: merged, saved, loaded, generated from."""
    model = model_of(tied=tied)
    lora = lft.AdapterConfig(rank=2)
    params = lft.add_adapters(with_tokens(tied=tied), lora, layout=model.layout, key=KEY)
    params = randomize(moved(params))
    merged = lft.merge_adapters(params, layout=model.layout)
    assert ("lm_head" in merged) is not tied
    expected = logits(model, params)
    np.testing.assert_allclose(logits(model, merged), expected, rtol=1e-4, atol=1e-4)
    lft.save_peft(tmp_path / "adapter", params, model)
    again = lft.load_peft(tmp_path / "adapter", model)
    np.testing.assert_array_equal(logits(model, again), expected)
    (found,) = lft.generate(model, params, [[3, 5, 7]], max_new_tokens=4, stop_ids=())
    text = [3, 5, 7]
    for _ in range(4):
        text.append(int(logits(model, merged, jnp.asarray([text]))[0, -1].argmax()))
    assert found == text[3:]


def test_alone_they_are_a_folder_of_their_own(tmp_path: Path) -> None:
    model = model_of(tied=True)
    params = moved(with_tokens(tied=True))
    lft.save_peft(tmp_path / "adapter", params, model)
    again = lft.load_peft(tmp_path / "adapter", model)
    np.testing.assert_array_equal(logits(model, again), logits(model, params))


def test_vllm_gets_them_merged(tmp_path: Path) -> None:
    model = load_model(EMBEDDED_MODEL)
    grown = lft.add_tokens(model, ["apples"])
    ids = grown.tokenizer.convert_tokens_to_ids(["apples"])
    params = moved(lft.add_trainable_tokens(grown.params, ids, grown))
    lora = lft.AdapterConfig(rank=2)
    params = lft.add_adapters(params, lora, layout=grown.layout, key=KEY)
    assert save_for_vllm(tmp_path / "out", params, grown) == "model"
    merged = load_model(tmp_path / "out")
    text = jnp.asarray([merged.tokenizer("five apples are")["input_ids"]])
    assert ids[0] in text[0]
    np.testing.assert_allclose(
        logits(merged, merged.params, text), logits(grown, params, text), rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be() -> None:
    model = model_of(tied=True)
    with pytest.raises(ValueError, match="token 97 is not one of the model's 97 tokens"):
        lft.add_trainable_tokens(model.params, [97], model)
    with pytest.raises(ValueError, match="there are no tokens to train"):
        lft.add_trainable_tokens(model.params, [], model)
    for name in ("embed_tokens", "lm_head"):
        adapter = lft.AdapterConfig(targets=(name,), rank=2)
        params = lft.add_adapters(model.params, adapter, layout=model.layout, key=KEY)
        with pytest.raises(ValueError, match=f"{name} has an adapter already"):
            lft.add_trainable_tokens(params, [3], model)
    embedding = lft.AdapterConfig(targets=("embed_tokens",), rank=2)
    with pytest.raises(ValueError, match="embed_tokens has trainable tokens"):
        lft.add_adapters(with_tokens(tied=True), embedding, layout=model.layout, key=KEY)
    head = lft.AdapterConfig(targets=("lm_head",), rank=2)
    params = lft.add_adapters(with_tokens(tied=True), head, layout=model.layout, key=KEY)
    with pytest.raises(ValueError, match="lm_head has an adapter, and the embedding"):
        logits(model, params)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_of_their_pieces(tied: bool) -> None:
    model = model_of(tied=tied)
    used = len(model.tokenizer)
    texts = ("w5 w9", "w7 w2 w3")
    pieces = [model.tokenizer(text)["input_ids"] for text in texts]
    grown = lft.add_tokens(model, texts)
    assert len(model.tokenizer) == used, "the model's own tokenizer is not changed"
    assert grown.tokenizer("w1 w5 w9")["input_ids"][-1] == used
    assert grown.config.vocab_size == grown.hf_config["vocab_size"]
    assert grown.config.vocab_size == (128 if used + 2 > 97 else 97)
    table = np.asarray(model.params["embed_tokens"]["embedding"])
    new = np.asarray(grown.params["embed_tokens"]["embedding"])
    assert len(new) == grown.config.vocab_size
    for number, ids in enumerate(pieces):
        np.testing.assert_allclose(new[used + number], table[ids].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(new[:used], table[:used])
    if not tied:
        kernel = np.asarray(model.params["lm_head"]["kernel"])
        head = np.asarray(grown.params["lm_head"]["kernel"])
        np.testing.assert_allclose(head[:, used], kernel[:, pieces[0]].mean(1), rtol=1e-6)
    # What the model says of other tokens stays.
    before, after = logits(model, model.params), logits(grown, grown.params)
    np.testing.assert_allclose(after[..., :used], before[..., :used], rtol=1e-5, atol=1e-6)


def test_tables_grow_when_they_are_full() -> None:
    model = model_of(tied=False)
    room = model.config.vocab_size - len(model.tokenizer)
    grown = lft.add_tokens(model, [f"<new{number}>" for number in range(room + 1)])
    assert grown.config.vocab_size == 128
    assert grown.params["lm_head"]["kernel"].shape == (32, 128)
    assert grown.params["embed_tokens"]["embedding"].shape == (128, 32)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["w5"], "'w5' is a token already; adapter.trainable_tokens trains it"),
        (["<a>", "<a>"], "'<a>' is given twice"),
        ([" "], "' ' has no text"),
    ],
)
def test_new_tokens_that_are_none(tokens: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lft.add_tokens(model_of(tied=True), tokens)


def test_new_tokens_are_found_within_words_where_spaces_are_written_as_a_character() -> None:
    """As by Llama 2's tokenizer, whose normalizer would write the new token's text otherwise."""
    model = model_of(tied=True)
    tokenizer = copy.deepcopy(model.tokenizer)
    written = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(written)
    grown = lft.add_tokens(dataclasses.replace(model, tokenizer=tokenizer), ["<X>"])
    token = grown.tokenizer.convert_tokens_to_ids("<X>")
    for text in ("a<X>b", "a <X> b", "a\n<X>"):
        assert token in grown.tokenizer(text)["input_ids"], text


def test_tokens_to_train_are_ids() -> None:
    model = model_of(tied=True)
    for wrong, said in (([1.7], "must be ids"), (["w5"], "must be ids"), ([2**33], "not one of")):
        with pytest.raises(ValueError, match=said):
            lft.add_trainable_tokens(model.params, wrong, model)


def test_no_new_tokens_are_no_change() -> None:
    model = model_of(tied=True)
    assert lft.add_tokens(model, []) is model
    with pytest.raises(ValueError, match="holds no tokenizer to add tokens to"):
        lft.add_tokens(dataclasses.replace(model, tokenizer=None), [])


def test_a_run_says_that_a_new_token_is_no_new_one() -> None:
    config = lft.Config(data=lft.DataConfig(new_tokens=("<a>", "w5")))
    with pytest.warns(UserWarning, match="'w5' is a token of the model already"):
        model = with_new_tokens(model_of(tied=True), config)
    assert len(model.tokenizer(["<a>"], add_special_tokens=False)["input_ids"][0]) == 1


def test_an_adapter_brings_its_tokens(tmp_path: Path) -> None:
    """A folder's new tokens are given to the model before it is loaded; another's are refused."""
    model = model_of(tied=True)
    texts = [f"<new{number}>" for number in range(40)]
    grown = lft.add_tokens(model, texts)
    ids = grown.tokenizer.convert_tokens_to_ids(texts)
    params = moved(lft.add_trainable_tokens(grown.params, ids, grown))
    lft.save_peft(tmp_path / "adapter", params, grown)
    with pytest.raises(ValueError, match="with_tokens_of"):
        lft.load_peft(tmp_path / "adapter", model)
    again = lft.with_tokens_of(tmp_path / "adapter", model)
    assert again.config == grown.config
    tokens = jnp.asarray([[1, ids[0], 5, ids[-1]]])
    np.testing.assert_array_equal(
        logits(again, lft.load_peft(tmp_path / "adapter", again), tokens),
        logits(grown, params, tokens),
    )
    other = lft.add_tokens(model, [f"<other{number}>" for number in range(40)])
    with pytest.raises(ValueError, match="'<new0>' there and '<other0>' in the model"):
        lft.load_peft(tmp_path / "adapter", other)


def test_spare_rows_stay_unless_the_adapter_has_them(tmp_path: Path) -> None:
    """A folder's tokenizer may have tokens that its adapter did not train, as in PEFT."""
    model = model_of(tied=True)
    grown = lft.add_tokens(model, ["<one>", "<two>"])
    one, two = grown.tokenizer.convert_tokens_to_ids(["<one>", "<two>"])
    assert two < model.config.vocab_size
    params = moved(lft.add_trainable_tokens(grown.params, [one], grown))
    lft.save_peft(tmp_path / "adapter", params, grown)
    again = lft.with_tokens_of(tmp_path / "adapter", model)
    table, before = (m.params["embed_tokens"]["embedding"] for m in (again, model))
    np.testing.assert_array_equal(table, before)
    loaded = lft.load_peft(tmp_path / "adapter", again)
    np.testing.assert_array_equal(loaded["embed_tokens"][ROWS], params["embed_tokens"][ROWS])


@pytest.mark.slow
def test_a_run_resumes_bitwise(main: Main, tmp_path: Path) -> None:
    steps = [*config("new_tokens"), *SHORT, "--optim.schedule", "constant"]
    steps += ["--train.steps", 4, "--train.save_every", 2]
    assert main(*steps, "--train.output", tmp_path / "whole") == 0
    found = losses(tmp_path / "whole")
    assert found[4] < found[1]
    stopped = [*steps, "--train.output", tmp_path / "stopped"]
    assert main(*stopped, "--train.steps", 2) == 0
    assert main(*stopped) == 0
    file = "adapter/adapter_model.safetensors"
    whole, again = (tmp_path / name / file for name in ("whole", "stopped"))
    assert whole.read_bytes() == again.read_bytes()
