"""Strict JAX settings for all tests, and the fixtures that several test files share."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("COLUMNS", None)  # tables would have the width of this terminal
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Keep compiled programs between runs: these tests spend most of their time in XLA.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"lorax_ft_tests_{os.getuid()}")
)
os.environ.setdefault("LORAX_FT_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# LLVM's optimizations take a third of the compile time, and these programs are too small to
# benefit from them.
# Eight devices share two cores. XLA's concurrent scheduling of collectives deadlocks there (jaxlib
# 0.10.2), and its default timeout of 40 s is too short.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import sharding
from lorax_ft.config import MeshConfig, QuantConfig
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.save import save_model, save_quantized
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import LoadedModel, Model, abstract_params
from lorax_ft.schema import Group, is_adapter, leaf_schema
from lorax_ft.tree import Tree, flatten, unflatten

jax.config.update("jax_num_cpu_devices", 8)

# A shell's background job ignores these, and tests raise them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Imported late: these modules create keys and arrays, which fixes the number of devices.
import generation_cases
import nf4_cases
from method_cases import KEY, Adapted, adapter_config, random_statistics
from run_cases import Main, last_of_each
from zoo import TINY, Case, built_case, built_decoder

Randomize = Callable[..., Tree]


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all but each n-th case of a test marked `sampled(n)` to the second tier."""
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is None:
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % sampled.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drop compiled programs: several thousand take 9 GB, and more maps than Linux allows."""
    yield
    if Path("/proc/self").exists():
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
        if maps < 20_000 and resident < 3 * 2**30:
            return
    jax.clear_caches()


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's default dtype promotion, for tests that run optax schedules.

    optax 0.2.8 adds an int32 step count to a float.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def strict() -> Iterator[None]:
    """No implicit dtype promotion: the library's own numerics must not rely on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], Case]:
    """The models of the zoo by name; each is built once."""
    return functools.cache(built_case)


@pytest.fixture(scope="session")
def tiny() -> DecoderConfig:
    """The sizes of the zoo's decoder."""
    return TINY


@pytest.fixture(scope="session")
def decoder() -> Callable[..., Model]:
    """A tiny `Model`, with fields of its config replaced: `decoder(tied=False)`."""
    return built_decoder


@pytest.fixture(scope="session")
def padded_batches() -> Callable[..., list[dict[str, np.ndarray]]]:
    """Padded batches of rows of different lengths: `padded_batches(2, rows=4, tokens=8)`."""
    return _padded_batches


@pytest.fixture(scope="session")
def randomize() -> Randomize:
    """A function that gives every trained adapter leaf random values: `randomize(params, seed)`."""
    return _randomize


@pytest.fixture(scope="session")
def adapted(zoo: Any) -> Adapted:
    """The parameters of a zoo model with adapters: `adapted(model, method, rank=4)`."""

    @functools.cache
    def build(model: str, method: str, **fields: Any) -> Tree:
        case = zoo(model)
        config = adapter_config(model, method, **fields)
        return add_adapters(
            case.params,
            config,
            layout=case.layout,
            key=KEY,
            statistics=random_statistics(case, config),
        )

    return build


@pytest.fixture(scope="module")
def model(decoder: Callable[..., Model]) -> Model:
    """The zoo's decoder, unless a test file defines its own model."""
    return decoder()


@pytest.fixture(scope="module")
def params(model: Model, randomize: Callable[..., Tree]) -> Callable[[str], Tree]:
    """The parameters of a case of `generation_cases`, with random factors: `params("dora")`."""

    def build(case: str) -> Tree:
        config = generation_cases.CASES[case]
        if config is None:
            return model.params
        return randomize(
            add_adapters(model.params, config, layout=model.layout, key=jax.random.key(1))
        )

    return functools.cache(build)


@pytest.fixture(scope="module")
def speaker(model: Model) -> Model:
    """The model with a word-level tokenizer and a config.json."""
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
    return dataclasses.replace(
        model, tokenizer=generation_cases.make_tokenizer(), hf_config=hf_config
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random float32 weights with the sizes of `nf4_cases`."""
    config = decoder_config(nf4_cases.HF_CONFIG, source="these tests")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_params(config)
    )
    folder = tmp_path_factory.mktemp("source") / "model"
    save_model(
        folder, params, LoadedModel(config=config, params=params, hf_config=nf4_cases.HF_CONFIG)
    )
    return folder


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in NF4 with double quantization."""
    model = load_model(source, quant=QuantConfig(format="nf4"))
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_quantized(folder, model.params, model)
    return folder


def _padded_batches(count: int = 2, rows: int = 4, tokens: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        inside = np.arange(tokens) < rng.integers(3, tokens, (rows, 1))
        drawn = rng.integers(1, 97, (2, rows, tokens))
        found.append(
            {
                "tokens": np.where(inside, drawn[0], 0).astype(np.int32),
                "targets": np.where(inside, drawn[1], 0).astype(np.int32),
                "weights": (inside & (np.arange(tokens) > 1)).astype(np.float32),
                "positions": np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
                "segment_ids": inside.astype(np.int32),
            }
        )
    return found


def _randomize(params: Tree, seed: int = 0, *, size: float = 0.1) -> Tree:
    rng = np.random.default_rng(seed)

    def move(path: str, leaf: Any) -> Any:
        group = leaf_schema(path.rpartition("/")[2]).group
        if not is_adapter(path) or group is None:
            return leaf
        noise = jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        multiplies = group in (Group.MAGNITUDE, Group.VECTOR)
        # A vector that starts at 0, such as VeRA's b, would stay there.
        multiplies = multiplies and bool(jnp.any(leaf != 0))
        return leaf * (1 + size * noise) if multiplies else leaf + size * noise

    return unflatten({path: move(path, leaf) for path, leaf in flatten(params).items()})


@pytest.fixture
def few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh of as many devices as the config names, of the eight that tests have."""
    make_mesh = sharding.make_mesh

    def small(config: MeshConfig) -> Any:
        count = math.prod([config.data, config.fsdp, config.expert, config.context, config.tensor])
        return make_mesh(config, devices=jax.devices()[:count])

    monkeypatch.setattr(sharding, "make_mesh", small)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """scripts/train.py's main, called with a command line; returns its exit status."""
    from lorax_ft.commands import train

    def call(*argv: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *last_of_each(argv)])
        try:
            train.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call
