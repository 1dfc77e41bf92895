"""Every method of the table on each quantized base, and quantized bases of any model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from method_cases import TABLE, changes_base, distance, random_statistics
from quant_cases import FORMATS

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
    supervised_loss,
    with_norms,
)
from lorax_ft.models.model import CausalLM, Model
from lorax_ft.quant.kernels import Quantized, dense
from lorax_ft.schema import METHODS as OPTIONS
from lorax_ft.training.contract import check_frozen
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, flatten, modules, unflatten

KEY = jax.random.key(7)
METHODS: dict[str, dict[str, Any]] = {
    **{
        name: TABLE[name] for name in TABLE if name.endswith(("-standard", "-rank_stabilized-dora"))
    },
    "pissa_rounds-standard": {"init": "pissa", "rounds": 5},
    "loftq-standard": {"init": "loftq"},
    "loftq_rounds-rank_stabilized-dora": {
        "init": "loftq",
        "scaling": "rank_stabilized",
        "dora": True,
        "rounds": 5,
    },
}
GROUPS = ("kaiming", "pissa-", "pissa_kept", "loftq-")  # these cover all kinds of leaves
CASES = [
    *(("nf4_double", method) for method in METHODS),
    *itertools.product(
        ("nf4", "int8"), ("kaiming-standard", "loftq-standard", "pissa-rank_stabilized-dora")
    ),
]

pytestmark = pytest.mark.usefixtures("strict")
Build = Callable[[str, str], Tree]


@pytest.fixture(scope="module")
def model(decoder: Callable[..., Model]) -> Model:
    """64 inputs make one NF4 block per row; the 96 of down_proj do not divide into blocks."""
    return decoder(width=64, mlp_width=96, layers=2, heads=8, kv_heads=4)


@pytest.fixture(scope="module")
def quantized(model: Model) -> Callable[[str], tuple[Tree, Any]]:
    """The quantized parameters, and a reader of the original kernels."""
    return functools.cache(
        lambda name: quantize_base(model.params, FORMATS[name], layout=model.layout)
    )


@pytest.fixture(scope="module")
def adapted(model: Model, quantized: Callable[[str], tuple[Tree, Any]]) -> Build:
    """The quantized parameters with the adapters of a method."""

    @functools.cache
    def build(name: str, method: str) -> Tree:
        params, originals = quantized(name)
        used = OPTIONS[METHODS[method].get("method", "lora")]
        fields = {k: v for k, v in {"rank": 3, "alpha": 6.0}.items() if k in used}
        fields |= METHODS[method]
        rounds = fields.pop("rounds", 1)
        config = AdapterConfig(**fields)
        found = random_statistics(model, config)
        return add_adapters(
            params,
            config,
            layout=model.layout,
            key=KEY,
            originals=originals,
            rounds=rounds,
            statistics=found,
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


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("name", "method"), CASES)
def test_starts_as_the_dequantized_base_or_nearer_to_the_original(
    model: Model, quantized: Any, adapted: Build, forward: Any, name: str, method: str
) -> None:
    base, params = quantized(name)[0], adapted(name, method)
    if changes_base(method) and "kept" not in method:
        lost, left = errors(model, base), errors(model, params)
        if method.startswith(("loftq", "pissa_rounds")) or (
            method.startswith("pissa") and name != "int8"
        ):
            # One round narrows NF4's blocks of 64, but not int8's channels.
            assert all(left[path] < lost[path] for path in lost)
        elif method.startswith("milora"):  # for other inits, s A B may be larger than W
            assert all(left[path] < 1.05 * lost[path] for path in lost)
        return
    for path, leaf in flatten(base).items():
        assert jax.tree.all(jax.tree.map(np.array_equal, leaf, flatten(params)[path])), path
    start, plain = forward(params), forward(base)
    if method.startswith("lora_one"):  # it starts one full fine-tuning step away
        assert distance(start, plain) > 1e-3
    elif method.startswith(("kaiming", "gaussian")) and not method.endswith("dora"):
        np.testing.assert_array_equal(start, plain)
    else:
        assert distance(start, plain) < (1e-5 if "kept" in method else 1e-6)
    assert distance(plain, forward(dequantized(base))) < 1e-5


def errors(model: Model, params: Tree) -> dict[str, float]:
    """‖W − W' − s A B‖ by path; DoRA's gain is 1 at initialization."""
    merged = merge_adapters(params, layout=model.layout)
    originals, got = flatten(model.params), flatten(merged)
    return {
        p: float(np.linalg.norm(got[p] - w))
        for p, w in originals.items()
        if p.endswith("_proj/kernel")
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "method"), CASES)
def test_merged_equals_forward_with_random_factors(
    model: Model, adapted: Build, randomize: Any, forward: Any, name: str, method: str
) -> None:
    params = randomize(adapted(name, method))
    got = forward(params)
    merged = merge_adapters(params, layout=model.layout)
    assert not any(isinstance(leaf, Quantized) for leaf in flatten(merged).values())
    assert distance(forward(merged), got) < 1e-5
    assert distance(forward(model.params), got) > 1e-2


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "method"), [case for case in CASES if case[1].startswith(GROUPS)])
def test_gradients_equal_those_over_the_dequantized_base(
    model: Model, adapted: Build, randomize: Any, name: str, method: str
) -> None:
    params = randomize(adapted(name, method))
    trained, frozen = partition(params)
    gradient = gradients(model)
    got, want = flatten(gradient(trained, frozen)), flatten(gradient(trained, dequantized(frozen)))
    for path, leaf in got.items():
        assert distance(leaf, want[path]) < 1e-5, path
        assert np.abs(leaf).max() > 0, path


@functools.cache
def _gradients(model: CausalLM) -> Any:
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 97)

    def loss(trained: Tree, frozen: Tree) -> Array:
        params = with_norms(combine(trained, frozen), layout=model.layout)
        return jnp.sum(jnp.sin(model.apply({"params": params}, tokens)))

    return jax.jit(jax.grad(loss))


def gradients(model: Model) -> Any:
    return _gradients(CausalLM(config=model.config))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", ["kaiming-standard", "pissa-rank_stabilized-dora"])
@pytest.mark.parametrize("name", FORMATS)
def test_three_steps_leave_the_quantized_base_bitwise_alone(
    model: Model, adapted: Build, name: str, method: str
) -> None:
    trained, frozen = partition(jax.tree.map(jnp.copy, adapted(name, method)))
    start, kept = (jax.tree.map(np.array, tree) for tree in (trained, frozen))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (1, 4, 12)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 2),
        "weights": np.ones(tokens.shape, np.float32),
    }
    batch |= {
        "positions": np.tile(np.arange(12, dtype=np.int32), (1, 4, 1)),
        "segment_ids": np.ones_like(tokens),
    }
    with jax.numpy_dtype_promotion("standard"):  # optax adds an int32 count to a float (0.2.8)
        tx = make_optimizer(OptimConfig(learning_rate=1e-3), steps=3)
        step = jax.jit(
            make_train_step(supervised_loss(model, packed=False), tx, layout=model.layout),
            donate_argnums=0,
        )
        state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
        for _ in range(3):
            state, metrics = step(state, frozen, batch, KEY)
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    for path, leaf in flatten(state.trained).items():
        assert not np.array_equal(leaf, flatten(start)[path]), path


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("nf4_double", "kaiming-standard"),
        ("nf4_double", "loftq-standard"),
        ("nf4", "pissa-rank_stabilized-dora"),
        ("int8", "pissa-rank_stabilized-dora"),
    ],
)
def test_scanned_equals_unscanned(zoo: Any, name: str, method: str) -> None:
    """The attention kernels of this model have several in or out axes."""
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
            mine = jax.tree.map(
                lambda part, i=int(rest[0]): part[i], stacked["/".join([scope, *rest[1:]])]
            )
            np.testing.assert_allclose(dense(mine), dense(leaf), atol=1e-5, err_msg=path)
    y = zoo("vit_scanned").forward(trees[0])
    assert distance(zoo("vit_unrolled").forward(trees[1]), y) < 1e-5
    case = zoo("vit_scanned")
    assert distance(case.plain(merge_adapters(trees[0], layout=case.layout)), y) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_a_start_is_taken_out_of_the_original_again(
    model: Model, quantized: Any, adapted: Build, name: str
) -> None:
    """The original base and the stored A₀, B₀ give the run's base bitwise, as resuming needs.

    Without the original it is an error.
    """
    params = adapted(name, "pissa-standard")
    base, originals = quantized(name)
    owned, _ = partition(params, by="ownership")
    again = attach_adapters(base, owned, layout=model.layout, originals=originals)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(
        ValueError, match=r"down_proj: its kernel is quantized .* or set adapter.keep_base"
    ):
        attach_adapters(base, owned, layout=model.layout)
    with pytest.raises(ValueError, match=r"its kernel is quantized .* or set adapter.keep_base"):
        add_adapters(base, AdapterConfig(rank=3, init="pissa"), layout=model.layout, key=KEY)


def test_more_rounds_come_nearer(model: Model, quantized: Any, adapted: Build) -> None:
    """QLoRA loses more than QPiSSA with 1 round, which loses more than with 5 (PiSSA, table 8)."""
    plain = errors(model, quantized("nf4")[0])
    one, five = (
        errors(model, adapted("nf4", f"{method}-standard")) for method in ("pissa", "pissa_rounds")
    )
    for path, error in plain.items():
        assert error > one[path] > five[path], path


# -------------------- any model


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("zoo_name", ["vit_rematted", "convolutions", "einsums", "boxed"])
def test_any_linen_model_takes_a_quantized_base(
    zoo: Any, randomize: Any, zoo_name: str, name: str
) -> None:
    case = zoo(zoo_name)
    base, originals = quantize_base(case.params, FORMATS[name], layout=case.layout)
    quantized = {
        path.removesuffix("/kernel")
        for path, leaf in flatten(base).items()
        if isinstance(leaf, Quantized)
    }
    whole = {"einsums": {"query", "square"}, "convolutions": {"depthwise"}}.get(zoo_name, set())
    assert (
        quantized
        == set(originals)
        == {path for path in modules(base) if "kernel" in modules(base)[path]} - whole
    )
    plain = case.plain(dequantized(base))
    assert distance(case.forward(base), plain) < 1e-6
    params = add_adapters(base, AdapterConfig(rank=3, dora=True), layout=case.layout, key=KEY)
    assert distance(case.forward(params), plain) < 1e-6
    params = randomize(params)
    assert (
        distance(case.plain(merge_adapters(params, layout=case.layout)), case.forward(params))
        < 1e-5
    )
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
    with pytest.raises(ValueError, match="_proj is already quantized"):
        quantize_base(base, FORMATS["int8"], layout=model.layout)
    only = {"embed_tokens": model.layout["embed_tokens"]}
    with pytest.raises(
        ValueError, match="none of the layers has a kernel of axes stack, in, out: embed_tokens"
    ):
        quantize_base(model.params, FORMATS["nf4"], layout=only)
    with pytest.raises(ValueError, match=r"adapter.init loftq .* set quant.format"):
        add_adapters(
            model.params, AdapterConfig(rank=3, init="loftq"), layout=model.layout, key=KEY
        )
    with pytest.raises(ValueError, match="down_proj is quantized, so its own weights cannot train"):
        partition(base, whole=("down_proj",))


def test_rounds_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quant.rounds is 5, which has no effect here"):
        Config(quant=QuantConfig(format="nf4", rounds=5))
    with pytest.raises(ValueError, match=r"quant.rounds is 2, which has no effect here"):
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
