"""Cached generation equals full forward passes; stopping and sampling."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import CASES

from lorax_ft.config import MeshConfig
from lorax_ft.inference.decode import SamplingParams, decode, prefill, sample_token
from lorax_ft.inference.generate import generate, stream
from lorax_ft.inference.sampling import Sampling
from lorax_ft.lowrank.adapters import with_norms
from lorax_ft.models import layer_cache
from lorax_ft.models.model import Model
from lorax_ft.sharding import DECODER_RULES, make_mesh, param_shardings
from lorax_ft.tree import Tree

PROMPTS = [[5, 17, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [96], list(range(40))]
NEW = 12


def reference(model: Model, params: Tree, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy decoding by a full forward pass over all tokens at each step."""
    params, rows = with_norms(params, layout=model.layout), [list(prompt) for prompt in prompts]
    forward = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    for _ in range(new):
        padded = np.array([row + [0] * (64 - len(row)) for row in rows], np.int32)
        likeliest = np.asarray(jnp.argmax(forward(params, padded), axis=-1))
        rows = [[*row, int(best[len(row) - 1])] for row, best in zip(rows, likeliest, strict=True)]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_full_forward_passes(
    model: Model, params: Callable[[str], Tree], case: str
) -> None:
    expected = reference(model, params(case), PROMPTS, NEW)
    rows = generate(model, params(case), PROMPTS, max_new_tokens=NEW, stop_ids=())
    assert rows == expected
    assert len({token for row in expected for token in row}) > 5
    assert case == "base" or rows != generate(
        model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=()
    )


def test_a_row_does_not_depend_on_the_others(model: Model) -> None:
    together = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    for row in (0, 3):
        assert generate(model, model.params, [PROMPTS[row]], max_new_tokens=NEW, stop_ids=()) == [
            together[row]
        ]
    options = {
        "max_new_tokens": NEW,
        "stop_ids": (),
        "sampling": Sampling(temperature=1.0),
        "key": jax.random.key(3),
    }
    drawn = generate(model, model.params, PROMPTS, **options)
    others = [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3]]
    assert generate(model, model.params, others, **options)[0] == drawn[0]


def test_stops(model: Model) -> None:
    rows = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    stop = rows[1][4]
    stopped = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=(stop, 96))
    assert stopped == [cut(row, {stop, 96}) for row in rows]
    assert len(stopped[1]) <= 4
    assert generate(model, model.params, PROMPTS, max_new_tokens=3, stop_ids=()) == [
        row[:3] for row in rows
    ]


def draw(
    *,
    temperature: float = 1,
    top_k: int = 97,
    top_p: float = np.inf,
    penalty: float = 1,
    stop: tuple[int, ...] = (-1,),
    rows: int = 4,
) -> SamplingParams:
    numbers = (np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(penalty))
    max_length = np.full(rows, 99, np.int32)
    return SamplingParams(
        *numbers, stop_ids=np.array(stop, np.int32), key=jax.random.key(0), max_length=max_length
    )


def test_stops_early(model: Model) -> None:
    """The loop ends when all rows have: the other new tokens stay 0."""
    tokens, lengths = np.full((4, 64), 7, np.int32), np.array([3, 5, 7, 9], np.int32)
    options = {
        "config": dataclasses.replace(model.config, attention="xla"),
        "greedy": True,
        "mesh": None,
    }
    ((first,),) = generate(model, model.params, [[7, 7, 7]], max_new_tokens=1, stop_ids=())
    chosen = draw(stop=tuple(range(first // 32 * 32, first // 32 * 32 + 32)))
    state = prefill(model.params, tokens, lengths, chosen, max_new_tokens=32, **options)
    state = decode(model.params, state, np.int32(32), chosen, **options)
    last = max(int(count) for count in state.counts)
    assert last < 31
    assert not np.asarray(state.new_tokens)[:, last + 1 :].any()


def test_streaming_gives_the_same_tokens_a_few_at_a_time(model: Model) -> None:
    whole = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    parts = list(stream(model, model.params, PROMPTS, max_new_tokens=NEW, chunk=5, stop_ids=()))
    assert [len(rows[0]) for rows in parts] == [5, 10, NEW]
    assert all(
        row == full[: len(row)] for rows in parts for row, full in zip(rows, whole, strict=True)
    )
    stopped = [
        *stream(
            model, model.params, PROMPTS[:1], max_new_tokens=NEW, chunk=1, stop_ids=(whole[0][3],)
        )
    ]
    assert stopped[-1] == [whole[0][: whole[0].index(whole[0][3])]]
    assert len(stopped) <= 4


def test_repetition_penalty(model: Model) -> None:
    """A strong penalty prevents repeats; it applies to prompt tokens, but not to padding."""
    params = jax.tree.map(lambda leaf: leaf, model.params)
    greedy = generate(model, params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    assert any(
        len(set(row)) < NEW or set(row) & set(p) for row, p in zip(greedy, PROMPTS, strict=True)
    )
    penalty = Sampling(repetition_penalty=1e6)
    for row, prompt in zip(
        generate(model, params, PROMPTS, max_new_tokens=NEW, stop_ids=(), sampling=penalty),
        PROMPTS,
        strict=True,
    ):
        assert len({*row, *prompt}) == NEW + len(prompt)


def cut(row: list[int], stops: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]


def test_sampling(model: Model) -> None:
    options = {"max_new_tokens": NEW, "stop_ids": ()}
    greedy = generate(model, model.params, PROMPTS, **options)
    draws = [
        generate(
            model,
            model.params,
            PROMPTS,
            sampling=Sampling(temperature=2.0),
            key=jax.random.key(k),
            **options,
        )
        for k in (1, 1, 2)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != greedy
    key = jax.random.key(1)
    assert (
        generate(
            model,
            model.params,
            PROMPTS,
            sampling=Sampling(temperature=2.0, top_k=1),
            key=key,
            **options,
        )
        == greedy
    )
    assert (
        generate(
            model,
            model.params,
            PROMPTS,
            sampling=Sampling(temperature=2.0, top_p=1e-6),
            key=key,
            **options,
        )
        == greedy
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 4, np.inf, [0.4, 0.3, 0.2, 0.1]),
        (0.5, 4, np.inf, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (1.0, 2, np.inf, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 4, 0.65, [4 / 7, 3 / 7, 0, 0]),  # 0.4 is not enough, 0.4 + 0.3 is
        (1.0, 4, 0.75, [4 / 9, 3 / 9, 2 / 9, 0]),
        (1.0, 3, 0.75, [4 / 7, 3 / 7, 0, 0]),  # of the three tokens left, two have probability 7/9
    ],
)
def test_sample_token_draws_from_the_right_distribution(
    temperature: float, top_k: int, top_p: float, expected: list
) -> None:
    n = 20_000
    scores = jnp.tile(jnp.log(jnp.array([0.2, 0.4, 0.1, 0.3])), (n, 1))
    drawn = sample_token(
        scores, jax.random.key(0), draw(temperature=temperature, top_k=top_k, top_p=top_p)
    )
    share = np.bincount(np.asarray(drawn), minlength=4) / n
    np.testing.assert_allclose(share[[1, 3, 0, 2]], expected, atol=0.015)


def test_the_second_call_is_compiled_already(model: Model, params: Callable[[str], Tree]) -> None:
    def call(params: Tree, shift: int, **options: float) -> None:
        prompts = [[(token + shift) % 97 for token in prompt[: 40 - shift]] for prompt in PROMPTS]
        generate(model, params, prompts, max_new_tokens=9 + shift, stop_ids=(5,) * shift, **options)

    call(params("dora"), 0)
    call(model.params, 0, sampling=Sampling(temperature=0.5, top_k=5), key=jax.random.key(0))
    before = prefill._cache_size(), decode._cache_size()
    call(jax.tree.map(lambda leaf: leaf * 1.01, params("dora")), 3)
    call(
        model.params,
        2,
        sampling=Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1),
        key=jax.random.key(5),
    )
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_no_parameter_is_a_constant(model: Model) -> None:
    """The constants in the compiled program do not grow with the model."""
    abstract = jax.eval_shape(lambda: model.params)
    shape = jax.ShapeDtypeStruct((2, 32), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    options = {"config": model.config, "greedy": True, "mesh": None}
    state = jax.eval_shape(
        functools.partial(prefill, max_new_tokens=32, **options), abstract, *shape, draw(rows=2)
    )
    text = decode.lower(abstract, state, np.int32(4), draw(rows=2), **options).as_text()
    assert len(text) < 200_000
    assert "97x32xf32>" in text


def test_a_token_copies_no_cache(model: Model) -> None:
    """Beside the cache, which is donated, a step has room for the keys of a layer."""
    tokens = jax.ShapeDtypeStruct((4, 2048), jnp.int32)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    options = {"config": model.config, "greedy": True, "mesh": None}
    start = functools.partial(prefill, max_new_tokens=32, **options)
    state = jax.eval_shape(start, model.params, tokens, lengths, draw())
    compiled = decode.lower(model.params, state, np.int32(4), draw(), **options).compile()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2


def test_a_token_is_written_alike_on_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cache = {name: jnp.asarray(rng.normal(size=(3, 2, 4, 8, 5))) for name in ("k", "v")}
    new = {name: jnp.asarray(rng.normal(size=(2, 1, 4, 5))) for name in ("k", "v")}
    positions = jnp.asarray([[6], [2]])
    written = []
    for backend in ("cpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        written.append(layer_cache.with_tokens(cache, new, jnp.int32(1), positions))
    jax.tree.map(np.testing.assert_array_equal, *written)
    own, whole = written[0]
    expected = np.array(cache["k"])
    expected[1, 0, :, 6], expected[1, 1, :, 2] = new["k"][:, 0]
    np.testing.assert_array_equal(whole["k"], expected)
    np.testing.assert_array_equal(own["k"], expected[1])


def test_on_eight_devices(model: Model, params: Callable[[str], Tree]) -> None:
    """Sharded parameters; 4 rows divide over data and fsdp, 3 do not."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(
        params("dora"),
        param_shardings(params("dora"), DECODER_RULES, layout=model.layout, mesh=mesh),
    )
    expected = generate(model, params("dora"), PROMPTS, max_new_tokens=NEW)
    assert generate(model, sharded, PROMPTS, max_new_tokens=NEW) == expected
    assert generate(model, sharded, PROMPTS[:3], max_new_tokens=NEW) == expected[:3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": [[1], []]}, "prompt 2 has no tokens"),
        (
            {"prompts": [[1, 97]]},
            "prompt 1 has the token id 97, but the vocabulary has only 97 tokens",
        ),
        ({"prompts": [[1] * 60]}, "60 tokens plus max_new_tokens 5 exceed the 64 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"sampling": {"temperature": -1.0}}, "temperature is -1.0"),
        ({"sampling": {"temperature": float("nan")}}, "temperature is nan"),
        ({"sampling": {"temperature": 1.0}}, "needs key"),
        ({"sampling": {"top_k": 0}}, "top_k is 0"),
        ({"sampling": {"top_p": 1.5}}, "top_p is 1.5"),
        ({"sampling": {"repetition_penalty": 0.0}}, "repetition_penalty is 0.0"),
        ({"sampling": {"top_p": 0.9}}, "top_p is given, but at temperature 0"),
    ],
)
def test_bad_input(model: Model, options: dict, words: str) -> None:
    def call(
        *,
        prompts: Any = ([1],),
        max_new_tokens: int = 5,
        sampling: Any = types.MappingProxyType({}),
    ) -> None:
        generate(
            model,
            model.params,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),
        )

    with pytest.raises(ValueError, match=words) as error:
        call(**options)
    assert "\n" not in str(error.value)
    assert generate(model, model.params, [], max_new_tokens=5) == []
