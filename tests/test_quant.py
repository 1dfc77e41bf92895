"""Quantised bases: the formats themselves, and every line of test_lowrank's table on top of each of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import Array
from test_lowrank import INITS, TABLE, changes_base, distance, random_statistics

from lorax_ft import (
    AdapterConfig,
    Config,
    OptimConfig,
    QuantConfig,
    adapt,
    add_adapters,
    attach_adapters,
    combine,
    layout,
    make_optimizer,
    make_train_step,
    merge_adapters,
    partition,
    quantize_base,
    with_norms,
)
from lorax_ft.models.model import Model
from lorax_ft.quant.double import VALUES
from lorax_ft.quant.kernels import Quantized, dense, quantize
from lorax_ft.quant.nf4 import CODEBOOK
from lorax_ft.training.contract import check_frozen
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, flatten, modules, unflatten

KEY = jax.random.key(7)
FORMATS = {
    "nf4": QuantConfig(format="nf4", double=False),
    "nf4_double": QuantConfig(format="nf4"),
    "int8": QuantConfig(format="int8"),
}
METHODS: dict[str, dict[str, Any]] = {
    **{name: TABLE[name] for name in TABLE if name.endswith(("-standard", "-rank_stabilized-dora"))},
    "pissa_rounds-standard": {"init": "pissa", "rounds": 5},
    "loftq-standard": {"init": "loftq"},
    "loftq_rounds-rank_stabilized-dora": {"init": "loftq", "scaling": "rank_stabilized", "dora": True, "rounds": 5},
}
CASES = [
    *(("nf4_double", method) for method in METHODS),
    *itertools.product(("nf4", "int8"), ("kaiming-standard", "loftq-standard", "pissa-rank_stabilized-dora")),
]

pytestmark = pytest.mark.usefixtures("strict")
Build = Callable[[str, str], Tree]


@pytest.fixture(scope="module")
def model(decoder: Callable[..., Model]) -> Model:
    """64 inputs are a block of NF4, which then lies row by row; the 96 of down_proj are none."""
    return decoder(width=64, mlp_width=96, layers=2, heads=8, kv_heads=4)


@pytest.fixture(scope="module")
def quantized(model: Model) -> Callable[[str], tuple[Tree, Any]]:
    """The parameters in a format, and what reads the original kernels."""
    return functools.cache(lambda name: quantize_base(model.params, FORMATS[name], layout=model.layout))


@pytest.fixture(scope="module")
def adapted(model: Model, quantized: Callable[[str], tuple[Tree, Any]]) -> Build:
    """The quantised parameters with a method of the table."""

    @functools.cache
    def build(name: str, method: str) -> Tree:
        params, originals = quantized(name)
        fields = {"rank": 3, "alpha": 6.0} | METHODS[method]
        rounds = fields.pop("rounds", 1)
        config = AdapterConfig(**fields)
        found = random_statistics(model, config)
        return add_adapters(
            params, config, layout=model.layout, key=KEY, originals=originals, rounds=rounds, statistics=found
        )

    return build


@pytest.fixture(scope="module")
def forward(model: Model) -> Callable[[Tree], Array]:
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, model.config.vocab_size)
    apply = jax.jit(model.apply)
    return lambda params: apply({"params": params}, tokens)


def dequantized(params: Tree) -> Tree:
    return unflatten({path: dense(leaf) for path, leaf in flatten(params).items()})


# -------------------- the table


@pytest.mark.parametrize(("name", "method"), CASES)
def test_starts_as_the_dequantised_base_or_nearer_to_the_original(
    model: Model, quantized: Any, adapted: Build, forward: Any, name: str, method: str
) -> None:
    base, params = quantized(name)[0], adapted(name, method)
    if changes_base(method) and "kept" not in method:
        lost, left = errors(model, base), errors(model, params)
        if method.startswith(("loftq", "pissa_rounds")) or (method.startswith("pissa") and name != "int8"):
            assert all(left[path] < lost[path] for path in lost)  # one round narrows blocks of 64, not int8's channels
        elif method.startswith("milora"):  # of others s A B may be larger than W
            assert all(left[path] < 1.05 * lost[path] for path in lost)
        return
    for path, leaf in flatten(base).items():
        assert jax.tree.all(jax.tree.map(np.array_equal, leaf, flatten(params)[path])), path
    start, plain = forward(params), forward(base)
    if method.startswith("lora_one"):  # a step of full fine-tuning away from it
        assert distance(start, plain) > 1e-3
    elif method.startswith(("kaiming", "gaussian")) and not method.endswith("dora"):
        np.testing.assert_array_equal(start, plain)
    else:
        assert distance(start, plain) < (1e-5 if "kept" in method else 1e-6)
    assert distance(plain, forward(dequantized(base))) < 1e-5


def errors(model: Model, params: Tree) -> dict[str, float]:
    """‖W − W' − s A B‖ by path; DoRA's magnitude is the norm at the start, whose gain is 1."""
    merged = merge_adapters(params, layout=model.layout)
    originals, got = flatten(model.params), flatten(merged)
    return {p: float(np.linalg.norm(got[p] - w)) for p, w in originals.items() if p.endswith("_proj/kernel")}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_merged_equals_forward_with_random_factors(
    model: Model, adapted: Build, randomise: Any, forward: Any, name: str, method: str
) -> None:
    params = randomise(adapted(name, method))
    got = forward(params)
    merged = merge_adapters(params, layout=model.layout)
    assert not any(isinstance(leaf, Quantized) for leaf in flatten(merged).values())
    assert distance(forward(merged), got) < 1e-5
    assert distance(forward(model.params), got) > 1e-2


@pytest.mark.parametrize(("name", "method"), CASES)
def test_gradients_equal_those_over_the_dequantised_base(
    model: Model, adapted: Build, randomise: Any, name: str, method: str
) -> None:
    params = randomise(adapted(name, method))
    trained, frozen = partition(params)
    gradient = gradients(model)
    got, want = flatten(gradient(trained, frozen)), flatten(gradient(trained, dequantized(frozen)))
    for path, leaf in got.items():
        assert distance(leaf, want[path]) < 1e-5, path
        assert np.abs(leaf).max() > 0, path


@functools.cache
def _gradients(apply: Any) -> Any:
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 97)

    def loss(trained: Tree, frozen: Tree) -> Array:
        return jnp.sum(jnp.sin(apply({"params": with_norms(combine(trained, frozen))}, tokens)))

    return jax.jit(jax.grad(loss))


def gradients(model: Model) -> Any:
    return _gradients(model.apply)


@pytest.mark.parametrize("method", ["kaiming-standard", "pissa-rank_stabilized-dora"])
@pytest.mark.parametrize("name", FORMATS)
def test_three_steps_leave_the_quantised_base_bitwise_alone(
    model: Model, adapted: Build, name: str, method: str
) -> None:
    trained, frozen = partition(jax.tree.map(jnp.copy, adapted(name, method)))
    start, kept = (jax.tree.map(np.array, tree) for tree in (trained, frozen))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (1, 4, 12)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 2), "weights": np.ones(tokens.shape, np.float32)}
    batch |= {"positions": np.tile(np.arange(12, dtype=np.int32), (1, 4, 1)), "segment_ids": np.ones_like(tokens)}
    with jax.numpy_dtype_promotion("standard"):  # optax adds an int32 count to a float (0.2.8)
        tx = make_optimizer(OptimConfig(learning_rate=1e-3), steps=3)
        step = jax.jit(make_train_step(model, tx, packed=False), donate_argnums=0)
        state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
        for _ in range(3):
            state, metrics = step(state, frozen, batch, KEY)
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    for path, leaf in flatten(state.trained).items():
        assert not np.array_equal(leaf, flatten(start)[path]), path


@pytest.mark.parametrize("method", ["kaiming-standard", "pissa-rank_stabilized-dora", "loftq-standard"])
@pytest.mark.parametrize("name", FORMATS)
def test_scanned_equals_unscanned(zoo: Any, name: str, method: str) -> None:
    """Attention's kernels have several in or out axes here."""
    trees = []
    for style in ("vit_scanned", "vit_unrolled"):
        case = zoo(style)
        base, originals = quantize_base(case.params, FORMATS[name], layout=case.layout)
        config = AdapterConfig(**{"rank": 3} | METHODS[method])
        trees.append(add_adapters(base, config, layout=case.layout, key=KEY, originals=originals))
    stacked, single = map(flatten, trees)
    for path, leaf in single.items():
        scope, *rest = path.split("/")
        if scope == "layers" and isinstance(leaf, Quantized):
            mine = jax.tree.map(lambda part, i=int(rest[0]): part[i], stacked["/".join([scope, *rest[1:]])])
            np.testing.assert_allclose(dense(mine), dense(leaf), atol=1e-5, err_msg=path)
    y = zoo("vit_scanned").forward(trees[0])
    assert distance(zoo("vit_unrolled").forward(trees[1]), y) < 1e-5
    case = zoo("vit_scanned")
    assert distance(case.plain(merge_adapters(trees[0], layout=case.layout)), y) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_a_start_is_taken_out_of_the_original_again(model: Model, quantized: Any, adapted: Build, name: str) -> None:
    """Base and kept start give the run's base bit for bit, as resuming needs; without the original it is an error."""
    params = adapted(name, "pissa-standard")
    base, originals = quantized(name)
    owned, _ = partition(params, by="ownership")
    again = attach_adapters(base, owned, originals=originals)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ValueError, match=r"down_proj: its kernel is quantised .* or set adapter.keep_base"):
        attach_adapters(base, owned)
    with pytest.raises(ValueError, match=r"its kernel is quantised .* or set adapter.keep_base"):
        add_adapters(base, AdapterConfig(rank=3, init="pissa"), layout=model.layout, key=KEY)


def test_more_rounds_come_nearer(model: Model, quantized: Any, adapted: Build) -> None:
    """QLoRA loses more than QPiSSA of 1 round, and that more than of 5 (PiSSA, table 8)."""
    plain = errors(model, quantized("nf4")[0])
    one, five = (errors(model, adapted("nf4", f"{method}-standard")) for method in ("pissa", "pissa_rounds"))
    for path, error in plain.items():
        assert error > one[path] > five[path], path


# -------------------- any model


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("zoo_name", ["vit_rematted", "convolutions", "einsums", "boxed"])
def test_any_linen_model_takes_a_quantised_base(zoo: Any, randomise: Any, zoo_name: str, name: str) -> None:
    case = zoo(zoo_name)
    base, originals = quantize_base(case.params, FORMATS[name], layout=case.layout)
    quantised = {path.removesuffix("/kernel") for path, leaf in flatten(base).items() if isinstance(leaf, Quantized)}
    whole = {"einsums": {"query", "square"}, "convolutions": {"depthwise"}}.get(zoo_name, set())
    assert quantised == set(originals) == {path for path in modules(base) if "kernel" in modules(base)[path]} - whole
    plain = case.plain(dequantized(base))
    assert distance(case.forward(base), plain) < 1e-6
    params = add_adapters(base, AdapterConfig(rank=3, dora=True), layout=case.layout, key=KEY)
    assert distance(case.forward(params), plain) < 1e-6
    params = randomise(params)
    assert distance(case.plain(merge_adapters(params, layout=case.layout)), case.forward(params)) < 1e-5
    assert set(layout(adapt(case.apply), base, *case.example)) == set(case.layout)


def test_embeddings_heads_and_routers_stay_whole(model: Model, quantized: Any) -> None:
    flat = flatten(quantized("nf4")[0])
    assert {p for p, leaf in flat.items() if isinstance(leaf, Quantized)} == {
        p for p in flat if p.endswith("_proj/kernel")
    }


def test_mistakes_are_one_clear_line(model: Model, quantized: Any) -> None:
    base, _ = quantized("nf4")
    with pytest.raises(ValueError, match=r"quant\.format is none; give nf4 or int8"):
        quantize_base(model.params, QuantConfig(), layout=model.layout)
    with pytest.raises(ValueError, match="_proj is quantised already"):
        quantize_base(base, FORMATS["int8"], layout=model.layout)
    only = {"embed_tokens": model.layout["embed_tokens"]}
    with pytest.raises(ValueError, match="none of the layers has a kernel of axes stack, in, out: embed_tokens"):
        quantize_base(model.params, FORMATS["nf4"], layout=only)
    with pytest.raises(ValueError, match=r"adapter.init is loftq, .* set quant.format"):
        add_adapters(model.params, AdapterConfig(rank=3, init="loftq"), layout=model.layout, key=KEY)
    with pytest.raises(ValueError, match="down_proj is quantised, so its own weights do not train"):
        partition(base, whole=("down_proj",))


# -------------------- the formats


def test_the_codebook_is_its_quantile_construction() -> None:
    """QLoRA (2305.14314, section 3): quantiles of N(0, 1), 8 below 0 and 9 above with it, scaled to [−1, 1]."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*above, 0, *below]) / above.max()
    np.testing.assert_allclose(CODEBOOK, values, atol=3e-7)


def normal(shape: tuple[int, ...], seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_errors_on_normal_weights() -> None:
    """In blocks of 64: mean absolute error 0.0728, MSE 0.00846; NF4 < FP4 < INT4 in MSE."""
    w = normal((1024, 1024))
    error = np.asarray(dense(quantize(w, format="nf4", n_stack=0, n_in=1)) - w, np.float64)
    assert np.abs(error).mean() == pytest.approx(0.0728, rel=0.01)
    assert (error**2).mean() == pytest.approx(0.00846, rel=0.01)
    # FP4 is E2M1 and INT4 has ±7 steps. INT4 of 16 levels beats FP4, and bitsandbytes' FP4, with a subnormal of 1/192.
    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    blocks = np.asarray(w, np.float64).T.reshape(-1, 64)
    fp4_error, int4_error = (rounded_error(blocks, np.union1d(-values, values)) for values in (fp4, np.arange(8) / 7))
    assert (error**2).mean() < fp4_error < int4_error


def rounded_error(blocks: np.ndarray, codebook: np.ndarray) -> float:
    """The MSE of blocks of absmax 1 rounded to the nearest value of a codebook, scaled back."""
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, blocks / absmax)
    return float(((codebook[codes] * absmax - blocks) ** 2).mean())


@pytest.mark.parametrize("shape", [(3, 576, 1536), (3, 576, 576), (2, 1536, 192)])
def test_a_parameter_takes_4_127_bits(shape: tuple[int, ...]) -> None:
    """Real bytes; and the absmax in 8 bits costs the kernel next to nothing (QLoRA, section 3)."""
    w = normal(shape)
    single, doubled = (quantize(w, format="nf4", doubled=d, n_stack=1, n_in=1) for d in (False, True))
    bits = [8 * sum(part.nbytes for part in jax.tree.leaves(leaf)) / w.size for leaf in (single, doubled)]
    assert bits == pytest.approx([4.5, 4.127], abs=1e-3)
    lost = [float(jnp.mean((dense(leaf) - w) ** 2)) for leaf in (single, doubled)]
    assert lost[1] == pytest.approx(lost[0], rel=0.01)


def test_codes_lie_as_bitsandbytes_has_them() -> None:
    """Blocks of 64 along `[out, in]`, two codes a byte, the first in the high half, ties to the lower code."""
    w = np.asarray(normal((128, 6)))
    for i, o in ((128, 6), (70, 5), (3, 3)):
        leaf = quantize(jnp.asarray(w[:i, :o]), format="nf4", n_stack=0, n_in=1)
        flat = w[:i, :o].T.reshape(-1)
        padded = np.pad(flat, (0, -flat.size % 64)).reshape(-1, 64)
        absmax = np.abs(padded).max(1)
        codes = np.abs(padded[..., None] / absmax[:, None, None] - np.array(CODEBOOK)).argmin(-1).reshape(-1)
        codes = codes[: flat.size + flat.size % 2]
        np.testing.assert_array_equal(np.asarray(leaf.codes).reshape(-1), 16 * codes[::2] + codes[1::2])
        np.testing.assert_array_equal(np.asarray(leaf.absmax).reshape(-1), absmax)


@settings(max_examples=12, deadline=None)
@example(stack=(), ins=[30], outs=[1], name="nf4", dtype="float32")  # a single row, as of whole blocks
@given(
    stack=st.sampled_from([(), (2,), (2, 3)]),
    ins=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    outs=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    name=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_kernels_of_any_shape_come_back(
    stack: tuple[int, ...], ins: list[int], outs: list[int], name: str, dtype: str
) -> None:
    """In their shape and type, each value within half a step of its block's absmax; matrix by matrix."""
    w = normal((*stack, *ins, *outs)).astype(dtype)
    config = FORMATS[name]
    to = functools.partial(quantize, format=config.format, doubled=config.double)  # type: ignore[arg-type]
    leaf = to(w, n_stack=len(stack), n_in=len(ins))
    back = dense(leaf)
    assert leaf.shape == back.shape == w.shape
    assert leaf.ndim == w.ndim
    assert back.dtype == w.dtype
    largest = np.abs(np.float32(w)).max()
    widest = 0.5 / 127 if name == "int8" else (1 - 0.6961928) / 2
    step = {"float32": 1e-6, "bfloat16": 2**-8}[dtype] + (0.02 if name == "nf4_double" else 0)
    assert np.abs(np.float32(back) - np.float32(w)).max() <= (widest + step) * largest
    for index in np.ndindex(*stack):
        alone = dense(to(w[index], n_stack=0, n_in=len(ins)))
        np.testing.assert_allclose(np.float32(back[index]), np.float32(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    config = FORMATS[name]
    w = normal((128, 8)).at[:, 3].set(0).at[64:, 5].set(0)  # a channel, and a block
    leaf = quantize(w, format=config.format, doubled=config.double, n_stack=0, n_in=1)  # type: ignore[arg-type]
    back = np.asarray(dense(leaf))
    assert np.isfinite(back).all()
    assert not back[:, 3].any()
    assert not back[64:, 5].any()
    nothing = quantize(0 * w, format=config.format, doubled=config.double, n_stack=0, n_in=1)  # type: ignore[arg-type]
    assert not np.asarray(dense(nothing)).any()


def test_int8_is_within_half_a_step_of_each_channel() -> None:
    w = normal((100, 12)) * jnp.logspace(-3, 3, 12)
    back = dense(quantize(w, format="int8", n_stack=0, n_in=1))
    absmax = np.abs(w).max(axis=0)
    assert (np.abs(back - w).max(axis=0) <= 0.5001 / 127 * absmax).all()
    np.testing.assert_allclose(np.abs(back).max(axis=0), absmax, rtol=1e-6)


def test_the_dynamic_values_are_256_and_ascend() -> None:
    assert VALUES.shape == (256,)
    assert (np.diff(VALUES) > 0).all()
    assert VALUES[0] == -np.float32(0.99296875)
    assert VALUES[-1] == 1
    assert 0 in VALUES


def test_quantised_leaves_are_trees_of_arrays() -> None:
    """So that jit, device_put, checkpoints and eval_shape take them."""
    leaf = quantize(normal((128, 8)), format="nf4", doubled=True, n_stack=0, n_in=1)
    assert [part.dtype for part in jax.tree.leaves(leaf)] == ["uint8", "uint8", "float32", "float32"]
    shapes = jax.eval_shape(lambda w: quantize(w, format="nf4", doubled=True, n_stack=0, n_in=1), normal((128, 8)))
    assert jax.tree.structure(shapes) == jax.tree.structure(leaf)
    assert dataclasses.replace(leaf, dtype="bfloat16").dequantized().dtype == jnp.bfloat16
    assert sorted(INITS) == sorted({name.split("-")[0] for name in TABLE})


def test_rounds_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quant.rounds is 5, but nothing goes in rounds"):
        Config(quant=QuantConfig(format="nf4", rounds=5))
    with pytest.raises(ValueError, match=r"quant.rounds is 2, but nothing goes in rounds"):
        Config(quant=QuantConfig(rounds=2), adapter=AdapterConfig(init="pissa"))
    Config(quant=QuantConfig(format="nf4", rounds=5), adapter=AdapterConfig(init="loftq"))


def test_a_factor_frozen_at_zero_is_refused_unless_a_magnitude_trains(model: Model) -> None:
    plain, dora = (
        add_adapters(model.params, AdapterConfig(rank=3, dora=dora), layout=model.layout, key=KEY)
        for dora in (False, True)
    )
    with pytest.raises(ValueError, match=r"starts at 0, and adapter.freeze keeps it there"):
        check_frozen(plain, ("lora_a", "lora_b"))
    check_frozen(plain, ("lora_a",))
    check_frozen(dora, ("lora_a", "lora_b"))
