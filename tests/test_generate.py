"""Generation with a cache against full forward passes without one, stops, sampling, exact match, the scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorax_ft import cli
from lorax_ft.config import EMBEDDED_MODEL, AdapterConfig, Config, MeshConfig, ModelConfig
from lorax_ft.evaluation.exact_match import evaluate_answers, exact_match
from lorax_ft.inference.decode import Draw, extend, pick, prefill
from lorax_ft.inference.generate import default_stop_ids, generate, stream
from lorax_ft.inference.sampling import Sampling
from lorax_ft.inference.texts import answer, stream_texts
from lorax_ft.inference.tuned import Tuned, locate
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model
from lorax_ft.interop.save_gguf import save_gguf
from lorax_ft.lowrank.adapters import add_adapters, with_norms
from lorax_ft.models.decoder import SHARDING_RULES
from lorax_ft.models.model import Model
from lorax_ft.training.sharding import make_mesh, param_shardings
from lorax_ft.tree import Tree, flatten

ROOT = Path(__file__).parent.parent
CACHE = str(jax.config.jax_compilation_cache_dir)
PROMPTS = [[5, 17, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [96], list(range(40))]
NEW = 12
CASES = {
    "base": None,
    "lora": AdapterConfig(rank=4),
    "dora": AdapterConfig(rank=4, dora=True, targets=("all-linear", "lm_head", "embed_tokens")),
}


@pytest.fixture(scope="module")
def model(decoder: Callable[..., Model]) -> Model:
    return decoder()


@pytest.fixture(scope="module")
def params(model: Model, randomise: Callable[..., Tree]) -> Callable[[str], Tree]:
    """The parameters of a case, with random factors and magnitudes."""

    def build(case: str) -> Tree:
        config = CASES[case]
        if config is None:
            return model.params
        return randomise(add_adapters(model.params, config, layout=model.layout, key=jax.random.key(1)))

    return functools.cache(build)


def reference(model: Model, params: Tree, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The likeliest token of a full forward pass over everything so far, again and again."""
    params, rows = with_norms(params), [list(prompt) for prompt in prompts]
    forward = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    for _ in range(new):
        padded = np.array([row + [0] * (64 - len(row)) for row in rows], np.int32)
        likeliest = np.asarray(jnp.argmax(forward(params, padded), axis=-1))
        rows = [[*row, int(best[len(row) - 1])] for row, best in zip(rows, likeliest, strict=True)]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_full_forward_passes(model: Model, params: Callable[[str], Tree], case: str) -> None:
    expected = reference(model, params(case), PROMPTS, NEW)
    rows = generate(model, params(case), PROMPTS, max_new_tokens=NEW, stop_ids=())
    assert rows == expected
    assert len({token for row in expected for token in row}) > 5
    assert case == "base" or rows != generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=())


def test_a_row_does_not_depend_on_the_others(model: Model) -> None:
    together = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    for row in (0, 3):
        assert generate(model, model.params, [PROMPTS[row]], max_new_tokens=NEW, stop_ids=()) == [together[row]]
    options = {"max_new_tokens": NEW, "stop_ids": (), "sampling": Sampling(temperature=1.0), "key": jax.random.key(3)}
    drawn = generate(model, model.params, PROMPTS, **options)
    others = [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3]]
    assert generate(model, model.params, others, **options)[0] == drawn[0]


def test_stops(model: Model) -> None:
    rows = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    stop = rows[1][4]
    stopped = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=(stop, 96))
    assert stopped == [cut(row, {stop, 96}) for row in rows]
    assert len(stopped[1]) <= 4
    assert generate(model, model.params, PROMPTS, max_new_tokens=3, stop_ids=()) == [row[:3] for row in rows]


def draw(
    *,
    temperature: float = 1,
    top_k: int = 97,
    top_p: float = np.inf,
    penalty: float = 1,
    stop: tuple[int, ...] = (-1,),
    rows: int = 4,
) -> Draw:
    numbers = (np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(penalty))
    length = np.full(rows, 99, np.int32)
    return Draw(*numbers, stop=np.array(stop, np.int32), key=jax.random.key(0), length=length)


def test_stops_early(model: Model) -> None:
    """The loop ends when all rows have: the rest of the room stays at 0."""
    tokens, lengths = np.full((4, 64), 7, np.int32), np.array([3, 5, 7, 9], np.int32)
    options = {"config": dataclasses.replace(model.config, attention="xla"), "greedy": True, "mesh": None}
    ((first,),) = generate(model, model.params, [[7, 7, 7]], max_new_tokens=1, stop_ids=())
    chosen = draw(stop=tuple(range(first // 32 * 32, first // 32 * 32 + 32)))
    state = prefill(model.params, tokens, lengths, chosen, room=32, **options)
    state = extend(model.params, state, np.int32(32), chosen, **options)
    last = max(int(count) for count in state.counts)
    assert last < 31
    assert not np.asarray(state.out)[:, last + 1 :].any()


def test_streaming_gives_the_same_tokens_a_few_at_a_time(model: Model) -> None:
    whole = generate(model, model.params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    parts = list(stream(model, model.params, PROMPTS, max_new_tokens=NEW, chunk=5, stop_ids=()))
    assert [len(rows[0]) for rows in parts] == [5, 10, NEW]
    assert all(row == full[: len(row)] for rows in parts for row, full in zip(rows, whole, strict=True))
    stopped = [*stream(model, model.params, PROMPTS[:1], max_new_tokens=NEW, chunk=1, stop_ids=(whole[0][3],))]
    assert stopped[-1] == [whole[0][: whole[0].index(whole[0][3])]]
    assert len(stopped) <= 4


def test_repetition_penalty(model: Model) -> None:
    """A strong one lets no token come twice, and damps those of the prompt but not those of the padding."""
    params = jax.tree.map(lambda leaf: leaf, model.params)
    greedy = generate(model, params, PROMPTS, max_new_tokens=NEW, stop_ids=())
    assert any(len(set(row)) < NEW or set(row) & set(p) for row, p in zip(greedy, PROMPTS, strict=True))
    penalty = Sampling(repetition_penalty=1e6)
    for row, prompt in zip(
        generate(model, params, PROMPTS, max_new_tokens=NEW, stop_ids=(), sampling=penalty), PROMPTS, strict=True
    ):
        assert len({*row, *prompt}) == NEW + len(prompt)


def cut(row: list[int], stops: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]


def test_sampling(model: Model) -> None:
    options = {"max_new_tokens": NEW, "stop_ids": ()}
    greedy = generate(model, model.params, PROMPTS, **options)
    draws = [
        generate(model, model.params, PROMPTS, sampling=Sampling(temperature=2.0), key=jax.random.key(k), **options)
        for k in (1, 1, 2)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != greedy
    key = jax.random.key(1)
    assert (
        generate(model, model.params, PROMPTS, sampling=Sampling(temperature=2.0, top_k=1), key=key, **options)
        == greedy
    )
    assert (
        generate(model, model.params, PROMPTS, sampling=Sampling(temperature=2.0, top_p=1e-6), key=key, **options)
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
        (1.0, 3, 0.75, [4 / 7, 3 / 7, 0, 0]),  # of the three that are left, two hold 7/9
    ],
)
def test_pick_draws_from_the_right_distribution(temperature: float, top_k: int, top_p: float, expected: list) -> None:
    n = 20_000
    scores = jnp.tile(jnp.log(jnp.array([0.2, 0.4, 0.1, 0.3])), (n, 1))
    drawn = pick(scores, jax.random.key(0), draw(temperature=temperature, top_k=top_k, top_p=top_p))
    share = np.bincount(np.asarray(drawn), minlength=4) / n
    np.testing.assert_allclose(share[[1, 3, 0, 2]], expected, atol=0.015)


def test_the_second_call_is_compiled_already(model: Model, params: Callable[[str], Tree]) -> None:
    def call(params: Tree, shift: int, **options: float) -> None:
        prompts = [[(token + shift) % 97 for token in prompt[: 40 - shift]] for prompt in PROMPTS]
        generate(model, params, prompts, max_new_tokens=9 + shift, stop_ids=(5,) * shift, **options)

    call(params("dora"), 0)
    call(model.params, 0, sampling=Sampling(temperature=0.5, top_k=5), key=jax.random.key(0))
    before = prefill._cache_size(), extend._cache_size()
    call(jax.tree.map(lambda leaf: leaf * 1.01, params("dora")), 3)
    call(model.params, 2, sampling=Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1), key=jax.random.key(5))
    assert (prefill._cache_size(), extend._cache_size()) == before


def test_no_parameter_is_a_constant(model: Model) -> None:
    """What the compiled program holds itself does not grow with the model."""
    abstract = jax.eval_shape(lambda: model.params)
    shape = jax.ShapeDtypeStruct((2, 32), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    options = {"config": model.config, "greedy": True, "mesh": None}
    state = jax.eval_shape(functools.partial(prefill, room=32, **options), abstract, *shape, draw(rows=2))
    text = extend.lower(abstract, state, np.int32(4), draw(rows=2), **options).as_text()
    assert len(text) < 200_000
    assert "97x32xf32>" in text


def test_on_eight_devices(model: Model, params: Callable[[str], Tree]) -> None:
    """Sharded parameters; four rows divide by data and fsdp, three do not."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(params("dora"), param_shardings(params("dora"), SHARDING_RULES, mesh=mesh))
    expected = generate(model, params("dora"), PROMPTS, max_new_tokens=NEW)
    assert generate(model, sharded, PROMPTS, max_new_tokens=NEW) == expected
    assert generate(model, sharded, PROMPTS[:3], max_new_tokens=NEW) == expected[:3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": [[1], []]}, "prompt 2 holds no token"),
        ({"prompts": [[1, 97]]}, "prompt 1 holds the token 97; the vocabulary holds 97"),
        ({"prompts": [[1] * 60]}, "60 tokens and max_new_tokens 5 are more than the 64 positions"),
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
    def call(*, prompts: Any = ([1],), max_new_tokens: int = 5, sampling: Any = types.MappingProxyType({})) -> None:
        generate(model, model.params, prompts, max_new_tokens=max_new_tokens, sampling=Sampling(**sampling))

    with pytest.raises(ValueError, match=words) as error:
        call(**options)
    assert "\n" not in str(error.value)
    assert generate(model, model.params, [], max_new_tokens=5) == []


WORDS = [f"w{i}" for i in range(90)]
TEMPLATE = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|> {% endfor %}<|im_start|>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def speaker(model: Model) -> Model:
    """The model with a tokenizer and a config.json."""
    c = model.config
    hf_config = {
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "eos_token_id": None,
    }
    return dataclasses.replace(model, tokenizer=make_tokenizer(), hf_config=hf_config)


def test_default_stop_ids(speaker: Model, model: Model) -> None:
    assert default_stop_ids(speaker) == (0, 2)
    assert default_stop_ids(dataclasses.replace(speaker, hf_config={"eos_token_id": [5, 2]})) == (0, 2, 5)
    assert default_stop_ids(dataclasses.replace(model, hf_config={"eos_token_id": 7})) == (7,)
    assert default_stop_ids(model) == ()
    configured = dataclasses.replace(model, hf_config={"eos_token_id": 7}, generation_config={"eos_token_id": [7, 9]})
    assert default_stop_ids(configured) == (7, 9)


def asked(*words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(words)}]


def test_answers_in_batches(speaker: Model, model: Model) -> None:
    conversations = [asked(*WORDS[i : i + 3 * i + 1]) for i in range(5)]
    alone = [answer(speaker, speaker.params, [c], max_new_tokens=8)[0] for c in conversations]
    assert answer(speaker, speaker.params, conversations, max_new_tokens=8, batch_size=2) == alone
    assert answer(speaker, speaker.params, [], max_new_tokens=8) == []
    assert all(text == text.strip() and "<|" not in text for text in alone)
    assert len(set(alone)) > 1
    stop = f" {alone[0].split()[2]}"
    stopped = answer(speaker, speaker.params, conversations[:1], max_new_tokens=8, stop_strings=[stop])
    assert stopped == [alone[0][: alone[0].index(stop)]]
    with pytest.raises(ValueError, match="a stop string is empty"):
        answer(speaker, speaker.params, conversations[:1], max_new_tokens=8, stop_strings=[""])
    long, short = asked(*["w1"] * 60), asked("w1")
    with pytest.raises(ValueError, match=r"^a.txt, line 7: 63 tokens and max_new_tokens 8 are more than the 64"):
        answer(
            speaker, speaker.params, [short, long], max_new_tokens=8, batch_size=1, where=["line 2", "a.txt, line 7"]
        )
    with pytest.raises(ValueError, match="no tokenizer"):
        answer(model, speaker.params, conversations, max_new_tokens=8)


class Letters:
    """A tokenizer whose tokens are bytes; a run of them that is no text is decoded as so many broken characters."""

    def decode(self, row: list[int], **options: bool) -> str:
        try:
            return bytes(row).decode()
        except UnicodeDecodeError:
            return bytes(row).decode("ascii", "replace")


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize(
    ("said", "stops", "expected"),
    [
        ("7 + 5 = 12\n\nQuestion: 3", ["\n\nQuestion"], "7 + 5 = 12"),
        ("7 + 5 = 12\n\nQuite", ["\n\nQuestion", "###"], "7 + 5 = 12\n\nQuite"),
        ("ends in a begin\n\nQ", ["\n\nQuestion"], "ends in a begin\n\nQ"),
        ("one abcd", ["abcd", "b"], "one a"),  # the one that is complete first
        ("aab", ["ab"], "a"),
        ("été €€ 😀", [], "été €€ 😀"),
        ("é\n\nQé", ["\n\nQé"], "é"),
    ],
)
def test_what_was_shown_is_never_taken_back(
    speaker: Model, monkeypatch: pytest.MonkeyPatch, said: str, stops: list[str], expected: str, chunk: int
) -> None:
    tokens = list(said.encode())
    rows = [[tokens[:n]] for n in [*range(chunk, len(tokens), chunk), len(tokens)]]
    monkeypatch.setattr("lorax_ft.inference.texts.stream", lambda *args, **options: iter(rows))
    model = dataclasses.replace(speaker, tokenizer=Letters())
    texts = [t for (t,) in stream_texts(model, {}, [[1]], max_new_tokens=99, chunk=chunk, stop_strings=stops)]
    assert all(new.startswith(old) for old, new in itertools.pairwise(texts))
    assert texts[-1] == expected
    if chunk == 1 and not stops:
        assert texts[:4] == ["", "é", "ét", "ét"]


def test_evaluate_answers(speaker: Model) -> None:
    questions = [asked("w1", "w2"), asked("w3"), asked("w4", "w5", "w6")]
    said = answer(speaker, speaker.params, questions, max_new_tokens=6, batch_size=2)
    references = [said[0], "something else", f"  {said[2]}\n"]
    conversations = [
        [*question, {"role": "assistant", "content": text}, *asked("more")]
        for question, text in zip(questions, references, strict=True)
    ]
    result = evaluate_answers(speaker, speaker.params, conversations, max_new_tokens=6, batch_size=2)
    assert (result.prompts, result.answers, result.references) == (questions, said, references)
    assert result.match.correct == (True, False, True)
    first = evaluate_answers(speaker, speaker.params, conversations, max_new_tokens=6, rows=2)
    assert (first.match.count, first.match.total, first.match.fraction) == (1, 2, 0.5)
    with pytest.raises(ValueError, match="conversation 1 has no assistant turn"):
        evaluate_answers(speaker, speaker.params, questions, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"does not match reference 1: 'w"):
        evaluate_answers(speaker, speaker.params, conversations, max_new_tokens=6, pattern="#### (.*)")


@pytest.mark.parametrize(
    ("said", "wanted", "pattern", "same"),
    [
        (" 42\n", "42", None, True),
        ("42.", "42", None, False),
        ("", "42", None, False),
        ("so 2 + 2 = 4\n#### 1,008", "#### 1008", r"#### (-?[\d,.]+)", True),
        ("#### 3 no, #### -18.", "1 #### 2 #### -18", r"#### (-?[\d,.]+)", True),
        ("#### 18.5", "#### 18", r"#### (-?[\d,.]+)", False),
        ("1008", "#### 1008", r"#### (-?[\d,.]+)", False),
        ("#### 18", "#### 118", r"#### (-?[\d,.]+)", False),
        ("answer:  yes, sir ", "answer: yes, sir", "answer:(.*)", True),
        ("answer: yes sir", "answer: yes, sir", "answer:(.*)", False),  # a comma in a text is no number's
        ("b", "a", "(a)|b", False),
    ],
)
def test_exact_match(said: str, wanted: str, pattern: str | None, same: bool) -> None:
    assert exact_match([said], [wanted], pattern=pattern).correct == (same,)


@pytest.mark.parametrize(
    ("answers", "references", "pattern", "words"),
    [
        ([], [], None, "0 answers and 0 references"),
        (["a"], ["a", "b"], None, "1 answers and 2 references"),
        (["a", "#1"], ["#1", "b"], "#(.)", "does not match reference 2: 'b'"),
        (["a"], ["a"], "a", "has no group"),
        (["a"], ["a"], "(a", "is not a regular expression"),
    ],
)
def test_exact_match_refuses(answers: list[str], references: list[str], pattern: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        exact_match(answers, references, pattern=pattern)


def test_locate(tmp_path: Path) -> None:
    run = tmp_path / "pissa"
    run.mkdir()
    (run / "config.json").write_text(Config(model=ModelConfig(path="base", dtype="bfloat16")).to_json())
    with pytest.raises(ValueError, match="has not come to an end"):
        locate(Tuned(run=str(run)))
    (run / "model").mkdir()
    config, adapter = locate(Tuned(run=str(run)))
    assert (config.model.path, config.model.dtype, adapter) == (str(run / "model"), "bfloat16", None)
    (run / "adapter").mkdir()
    config, adapter = locate(Tuned(run=str(run), dtype="float32"))
    assert (config.model.path, config.model.dtype, adapter) == ("base", "float32", run / "adapter")
    (run / "nf4_base").mkdir()
    config, adapter = locate(Tuned(run=str(run)))
    assert (config.model.path, adapter) == (str(run / "nf4_base"), run / "adapter")
    with pytest.raises(ValueError, match=r"no run at .*; beside it there is pissa"):
        locate(Tuned(run=str(tmp_path / "pisa")))
    with pytest.raises(ValueError, match=r"holds no adapter: there is no adapter_config\.json"):
        locate(Tuned(model="base", adapter=str(tmp_path)))
    assert locate(Tuned(model="base", quant="nf4"))[0].quant.format == "nf4"
    with pytest.raises(ValueError, match="--quant goes with --model"):
        Tuned(run="out", quant="nf4")


@dataclasses.dataclass(frozen=True)
class Options:
    count: int = 1
    """How many."""
    mode: str = "a"
    """Which."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}; it must be 0 or more")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "3"], "Unrecognized options: --cuont, 3; did you mean --count?"),
        (["--count", "three"], "invalid literal for int() with base 10: 'three'"),
        (["--count", "-3"], "count is -3; it must be 0 or more"),
        (["--count"], "--count"),
    ],
)
def test_arguments_fail_in_one_line(argv: list[str], message: str) -> None:
    assert cli.parse(Options, argv=["--count", "2"], default=Options(mode="b")) == Options(2, "b")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        cli.parse(Options, argv=argv)
    assert "\n" not in str(error.value)
    assert not set("│╭─") & set(str(error.value))


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file or directory\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_one_line_errors(
    error: BaseException, status: int, printed: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        raise error
    assert end.value.code == status
    assert capsys.readouterr().err == printed


def test_scripts(speaker: Model, params: Callable[[str], Tree], tmp_path: Path) -> None:
    """The whole way: an adapter on disk is asked, merged, and gives the same answer; then bad input."""
    base, run, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    save_model(base, speaker.params, speaker)
    save_peft(run / "adapter", params("lora"), dataclasses.replace(speaker, source=str(base)))
    (run / "config.json").write_text(Config(model=ModelConfig(path=str(base))).to_json())

    def call(script: str, *args: str, said: str = "") -> tuple[int, str, str]:
        command = [sys.executable, f"scripts/{script}.py", *args]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": CACHE}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, input=said)
        return done.returncode, done.stdout, done.stderr

    assert call("merge", "--run", str(run), "--output", str(merged))[::2] == (0, "")
    model = load_model(merged)
    expected, before = (answer(model, p, [asked("w7 w8")], max_new_tokens=8)[0] for p in (model.params, speaker.params))
    assert expected != before
    asking = call("generate", "--run", str(run), "w7 w8", "--max-new-tokens", "8")
    assert asking == (0, f"{expected}\n", "")
    message = f"error: {merged} is not empty; give another folder, or --overwrite to replace the model in it\n"
    assert call("merge", "--run", str(run), "--output", str(merged)) == (2, "", message)
    message = f"error: no run at {tmp_path / 'rum'}; beside it there is run\n"
    assert call("generate", "--run", str(tmp_path / "rum"), "w7") == (2, "", message)
    (tmp_path / "questions.txt").write_text("w7 w8\n\nw9\n")
    status, printed, _ = call(
        "generate", "--run", str(run), "--file", f"{tmp_path}/questions.txt", *["--max-new-tokens", "8"]
    )
    assert status == 0
    assert json.loads(printed.splitlines()[0]) == {"question": "w7 w8", "answer": expected}
    assert len(printed.splitlines()) == 2
    (tmp_path / "questions.txt").write_text("w7 w8\n\n" + "w9 " * 2048)
    message = f"error: {tmp_path}/questions.txt, line 3: 2051 tokens and max_new_tokens 8 are more than "
    refused = call("generate", "--run", str(run), "--file", f"{tmp_path}/questions.txt", "--max-new-tokens", "8")
    assert refused[:2] == (2, "")
    assert refused[2].startswith(message)
    said = "w7 w8\n/clear\n/adapter off\nw7 w8\n/clear\n/adapter on\nw7 w8\n/nonsense\n/adapter nowhere\n/exit\nw1\n"
    status, printed, errors = call("chat", "--run", str(run), "--max-new-tokens", "8", said=said)
    assert status == 0
    lines = [line.strip() for line in printed.splitlines()]
    assert lines[:7] == [expected, "cleared", "adapter: off", before, "cleared", "adapter: on", expected]
    assert len(lines) == 7
    wrong = errors.splitlines()
    assert wrong[0] == "error: there is no command /nonsense; /help lists them"
    assert wrong[1].startswith("error: nowhere holds no adapter_config.json")
    assert len(wrong) == 2
    for weights, text in ((("0.5", "0.5"), expected), (("0", "0"), before)):  # of the same adapter twice
        folder = tmp_path / f"merged{weights[0]}"
        twice = ["--also", str(run / "adapter"), "--weights", *weights, "--output", str(folder)]
        assert call("merge", "--run", str(run), *twice)[::2] == (0, "")
        merged_model = load_model(folder)
        assert answer(merged_model, merged_model.params, [asked("w7 w8")], max_new_tokens=8) == [text]
    status, _, errors = call("merge", "--run", str(run), "--weights", "1", "2", "--output", "x")
    assert status == 2
    assert errors.startswith("error: there are 1 adapters and 2 weights; give one for each")


def test_export(speaker: Model, params: Callable[[str], Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each target is read again by what it is for, as far as that is installed; what cannot be written says why."""
    save_model(tmp_path / "base", speaker.params, speaker)
    speaker = load_model(tmp_path / "base")
    save_peft(tmp_path / "lora", params("lora"), speaker)
    dora = add_adapters(speaker.params, AdapterConfig(rank=4, dora=True), layout=speaker.layout, key=jax.random.key(1))
    save_peft(tmp_path / "dora", dora, speaker)

    spec = importlib.util.spec_from_file_location("export_script", ROOT / "scripts/export.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "export_script", script)
    spec.loader.exec_module(script)

    def export(adapter: str, target: str, output: str, *rest: str) -> str:
        where = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / adapter)]
        given = [*where, "--target", target, "--output", str(tmp_path / output), *rest]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            script.main(cli.parse(script.Args, argv=given))
        return said.getvalue()

    assert "PeftModel" in export("lora", "peft", "peft")
    assert_close(logits(speaker, load_peft(tmp_path / "peft", speaker)), logits(speaker, params("lora")))
    assert "--max-lora-rank 16" in export("lora", "vllm", "vllm")
    assert json.loads((tmp_path / "vllm/adapter_config.json").read_text())["use_dora"] is False
    assert "merged" in export("dora", "vllm", "vllm_dora")
    assert_close(logits(load_model(tmp_path / "vllm_dora")), logits(speaker, dora))
    assert "AutoModelForCausalLM" in export("lora", "hf", "hf")
    assert_close(logits(load_model(tmp_path / "hf")), logits(speaker, params("lora")))
    with pytest.raises(ValueError, match=r"rank 4, above max_lora_rank 1: export with --max-lora-rank 8"):
        export("lora", "vllm", "other", "--max-lora-rank", "1")
    with monkeypatch.context() as only:
        only.setattr("lorax_ft.interop.vllm.RANKS", (1,))
        with pytest.raises(ValueError, match=r"rank 4, .* vLLM takes no higher one; merge it"):
            export("lora", "vllm", "other", "--max-lora-rank", "1")
    with pytest.raises(ValueError, match=r"max_lora_rank is 3; vLLM takes 1, 8"):
        export("lora", "vllm", "other", "--max-lora-rank", "3")
    with pytest.raises(ValueError, match=r"hf is not empty; give another folder, or --overwrite"):
        export("lora", "hf", "hf")
    with pytest.raises(ValueError, match=r"tokenizer of .* is not written as GGUF; supported: SentencePiece"):
        export("lora", "gguf", "tuned.gguf", "--gguf-type", "F16")
    with pytest.raises(ValueError, match=r"is no .gguf file"):
        export("lora", "gguf", "tuned.bin")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "tuned.gguf").exists()


def logits(model: Model, params: Tree | None = None) -> np.ndarray:
    return np.asarray(model.apply({"params": params or model.params}, jnp.arange(24).reshape(2, 12)))


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "step"), [("F16", 2**-11), ("Q8_0", 1 / 127)])
def test_the_embedded_model_as_gguf(tmp_path: Path, kind: Any, step: float) -> None:
    model = load_model(EMBEDDED_MODEL)
    config = AdapterConfig(rank=4, init="pissa")
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    (tmp_path / "link.gguf").symlink_to("tiny.gguf")
    save_gguf(tmp_path / "link.gguf", params, model, kind=kind)
    again = load_model(tmp_path / "tiny.gguf")
    for path, leaf in flatten(again.params).items():
        want = np.asarray(flatten(model.params)[path])
        assert np.abs(leaf - want).max() <= step * np.abs(want).max(), path
    text = "Tom has 14 apples.\n<|im_start|>user"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert answer(again, again.params, [chat], max_new_tokens=8) == answer(
        model, model.params, [chat], max_new_tokens=8
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.gguf", "tiny.gguf"]
    assert (tmp_path / "link.gguf").is_symlink()
