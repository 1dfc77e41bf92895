"""Steps on meshes of fake devices and runs in two processes give one device's numbers.

Letters: M microbatches, B rows, T tokens, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from zoo import TINY

from lorax_ft import sharding
from lorax_ft.config import (
    AdapterConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    TrainConfig,
)
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.lowrank.groups import partition
from lorax_ft.lowrank.quantize import quantize_base
from lorax_ft.models.config import LayerType
from lorax_ft.models.model import CausalLM, LoadedModel, Model, abstract_params
from lorax_ft.plan.program import abstract_arguments, compile_traced, trace
from lorax_ft.run.log import LOG, read_log
from lorax_ft.run.loop import train
from lorax_ft.schema import INITS
from lorax_ft.sharding import DECODER_RULES
from lorax_ft.training import head_loss
from lorax_ft.training.losses import supervised_loss
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.step import TrainState, make_train_step
from lorax_ft.tree import flatten, unflatten

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS, ROWS, TOKENS = 3, 16, 16
HF_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
SIZES: dict[str, int] = {
    "vocab_size": 96,
    "width": 32,
    "mlp_width": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
}
MESHES = {  # and the microbatches on it
    "data=8": (MeshConfig(data=8), 1),
    "data=2,fsdp=4": (MeshConfig(data=2, fsdp=4), 1),
    "context=8": (MeshConfig(data=1, context=8), 1),
    "fsdp=2,context=2,tensor=2": (MeshConfig(data=1, fsdp=2, context=2, tensor=2), 1),
    "data=2,fsdp=2,tensor=2 in 4 microbatches": (MeshConfig(data=2, fsdp=2, tensor=2), 4),
}
METHODS = {
    "lora": AdapterConfig(rank=4),
    "dora": AdapterConfig(rank=4, dora=True),
    "full": AdapterConfig(targets=(), train_whole=("all",)),
    "lora_fa": AdapterConfig(rank=4, freeze=("lora_a",)),
    "nf4": AdapterConfig(rank=4, init="pissa", dora=True),
    "int8": AdapterConfig(rank=4),
}
QUANT = {"nf4": QuantConfig(format="nf4", rounds=2), "int8": QuantConfig(format="int8")}
WIDE = {"width": 128, "mlp_width": 256}  # of a quantized base, so that its blocks can be split too
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0, clip_norm=1.0)

Build = Callable[..., Model]


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of three steps."""

    losses: np.ndarray
    trained: dict[str, np.ndarray]
    state: TrainState


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    """optax mixes floats and ints (`decay**count`), which conftest's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def one_device(decoder: Build) -> Callable[..., Run]:
    """Three steps of a method on one device, computed once."""
    return functools.cache(
        lambda method, dtype="float32": steps(decoder, method, None, dtype=dtype)
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "mesh"),
    [("lora", mesh) for mesh in MESHES if mesh != "fsdp=2,context=2,tensor=2"]
    + [(method, list(MESHES)[-1]) for method in ("dora", "full", "lora_fa", "nf4", "int8")]
    + [("nf4", "fsdp=2,context=2,tensor=2")],
)
def test_steps_do_not_depend_on_the_mesh(
    decoder: Build, one_device: Callable[..., Run], method: str, mesh: str
) -> None:
    expected, got = one_device(method), steps(decoder, method, *MESHES[mesh])
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    for path, leaf in expected.trained.items():
        np.testing.assert_allclose(got.trained[path], leaf, rtol=1e-5, atol=1e-4, err_msg=path)
    check_places(got.state)


@pytest.mark.slow
def test_every_kind_of_token_is_the_same_where_tokens_are_split(
    decoder: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, sinks and a soft cap, chunks of the loss, dropout and NEFTune's noise."""
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 2)  # on a mesh; one device has another number
    rope = TINY.layer_types[0].rope
    fields = {
        "layer_types": (LayerType(rope=rope, window=5), LayerType(rope=rope)),
        "sinks": True,
        "attention_softcap": 3.0,
        "remat": "products",
    }
    noise = {"dropout": 0.3, "neftune_alpha": 50.0}
    expected = steps(decoder, "lora", None, fields=fields, noise=noise)
    got = steps(decoder, "lora", MeshConfig(data=4, context=2), 1, fields=fields, noise=noise)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    for path, leaf in expected.trained.items():
        np.testing.assert_allclose(got.trained[path], leaf, rtol=1e-5, atol=1e-4, err_msg=path)
    silent = steps(decoder, "lora", None, fields=fields)
    assert np.all(np.abs(silent.losses - expected.losses) > 1e-3)


def test_no_activation_of_a_whole_row_is_on_a_device() -> None:
    """Only keys, values, masks and scores have an axis of all tokens; nothing has all of D too.

    The sizes are such that every axis is known by its length.
    """
    tokens, sizes = 24 * 8, {**SIZES, "width": 40, "mlp_width": 56, "vocab_size": 88}
    model = CausalLM(config=dataclasses.replace(TINY, **sizes, max_positions=tokens, remat="full"))
    config = Config(
        data=DataConfig(max_length=tokens, pack=True),
        adapter=AdapterConfig(rank=4, dropout=0.1),
        train=TrainConfig(batch_size=2, neftune_alpha=5.0),
        mesh=MeshConfig(data=2, context=4),
    )
    mesh = sharding.make_mesh(config.mesh)
    shapes = abstract_arguments(model, config, mesh)
    _, text = compile_traced(trace(model, config, mesh, shapes), mesh)
    found = set()
    for dtype, numbers in re.findall(r"(\w+)\[([\d,]+)\]", text):
        shape = tuple(map(int, numbers.split(",")))
        if tokens in shape:
            found.add((dtype, shape))
    gathered = {shape for dtype, shape in found if dtype == "f32" and tokens // 4 not in shape}
    heads, channels = SIZES["kv_heads"], TINY.head_dim
    # In any order, and with axes of one row, or none.
    assert {tuple(sorted(set(shape) - {1, tokens})) for shape in gathered} <= {
        tuple(sorted({heads, channels})),
        tuple(sorted({heads * channels})),
        # The embedding's, whose width is split before the tokens are.
        (40 // 4,),
        # Both queries of a key are the rows of one matrix of scores.
        tuple(sorted({heads, SIZES["heads"] // heads * tokens // 4})),
    }
    assert (1, tokens, heads, channels) in gathered
    widths = {40, 56, 88}
    assert not [shape for _, shape in found if widths & set(shape)]


# Where `tensor` splits a contraction, jaxlib 0.12 rounds each part of the sum to bfloat16 on a CPU,
# before it adds them; jaxlib 0.10 adds them in float32.
TENSOR_RTOL = 1e-5 if jax.__version_info__ < (0, 12) else 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "rtol", "drift"),
    [
        ("data=2,fsdp=4", 1e-5, 0.03),
        # Each of the microbatches, and of the parts of a sum, rounds its gradients.
        ("data=2,fsdp=2,tensor=2 in 4 microbatches", TENSOR_RTOL, 0.1),
    ],
)
def test_first_steps_over_a_bfloat16_base_do_not_depend_on_the_mesh(
    decoder: Build, one_device: Callable[..., Run], mesh: str, rtol: float, drift: float
) -> None:
    expected = one_device("lora", "bfloat16")
    got = steps(decoder, "lora", *MESHES[mesh], dtype="bfloat16")
    # Before the first update, and after it.
    np.testing.assert_allclose(got.losses[0], expected.losses[0], rtol=rtol)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-3)
    for path, leaf in expected.trained.items():
        assert flatten(got.state.trained)[path].dtype == jnp.float32
        # Adam's first step is the gradient's sign: a sum in another order may flip a tiny one.
        moved = np.mean(np.abs(got.trained[path] - leaf))
        assert moved < drift * OPTIM.learning_rate, path
        assert path.endswith("lora_a") or np.mean(got.trained[path] != 0) == 1, path


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs by two processes: lora, corda, lora_ga, and pissa on NF4.

    They train to step 3 and are resumed to step 5.
    """
    folder = tmp_path_factory.mktemp("two")
    write_model_and_data(folder)
    configs = {
        "lora": run_config(folder, "lora", 3),
        "pissa": run_config(folder, "pissa", 3),
        "resumed": run_config(folder, "pissa", 5, resume=True),
        "corda": run_config(folder, "corda", 3),
        "lora_ga": run_config(folder, "lora_ga", 3),
    }
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(config.to_json())
    train_in_processes(
        folder, [folder / f"{name}.json" for name in configs], processes=2, devices=2
    )
    return folder


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("method", "last"), [("lora", 3), ("pissa", 5), ("corda", 3), ("lora_ga", 3)]
)
def test_two_processes_train_as_one(
    in_two_processes: Path, tmp_path: Path, method: str, last: int
) -> None:
    config = run_config(in_two_processes, method, last)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, output=str(tmp_path / method)),
        mesh=MeshConfig(),
    )
    train(config)
    expected, got = read_log(tmp_path / method), read_log(in_two_processes / method)
    steps = [line["step"] for line in got if "loss" in line]
    # Each line once: resuming appends, and only one process writes.
    assert steps == list(range(1, last + 1))
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in log if name in line] for log in (expected, got)]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-4, err_msg=name)
    ends = [[line for line in log if "validation_loss" in line][-1] for log in (expected, got)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    adapters = [
        load_file(folder / method / "adapter/adapter_model.safetensors")
        for folder in (tmp_path, in_two_processes)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, leaf in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], leaf, atol=1e-3, err_msg=name)
    if method == "pissa":  # the base minus the initial A B is quantized again
        bases = [
            (folder / method / "nf4_base/model.safetensors").read_bytes()
            for folder in (tmp_path, in_two_processes)
        ]
        assert bases[0] == bases[1]


def test_one_process_on_another_mesh_goes_on_with_a_run_of_two(
    in_two_processes: Path, tmp_path: Path
) -> None:
    """Steps 4 and 5 after three steps of two processes; tests/slow has the other ways."""
    shutil.copytree(in_two_processes / "lora", tmp_path / "resumed")
    meshes = {"resumed": MeshConfig(data=2, fsdp=2, tensor=2), "whole": MeshConfig()}
    for name, mesh in meshes.items():
        config = run_config(in_two_processes, "lora", 5, resume=name == "resumed")
        config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, output=str(tmp_path / name)),
            mesh=mesh,
        )
        train(config)
    losses = [
        [(line["step"], line["loss"]) for line in read_log(tmp_path / name) if "loss" in line]
        for name in meshes
    ]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path) -> None:
    """Two processes of a Slurm job run `train.py --multihost`; the second one gets a SIGTERM."""
    root, out = Path(__file__).parents[1], tmp_path / "run"
    options = "--multihost --train.steps 500 --train.report_to"
    options += " --eval.rows 4 --eval.samples 0 --eval.exact_match_rows 0"
    command = [sys.executable, "scripts/train.py", "--config", "configs/lora.py", *options.split()]
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
    }
    environment = os.environ | slurm | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    environment.pop("XLA_FLAGS", None)
    started = []
    for i in range(2):
        own = environment | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        with (tmp_path / f"{i}.out").open("w") as said:
            whole = [*command, "--train.output", str(out)]
            started.append(
                subprocess.Popen(whole, stdout=said, stderr=subprocess.STDOUT, env=own, cwd=root)
            )
    try:
        while not (out / LOG).exists() or len((out / LOG).read_text().splitlines()) < 4:
            assert started[0].poll() is None, (tmp_path / "0.out").read_text()
            time.sleep(0.2)
        started[1].terminate()
        assert [process.wait(timeout=120) for process in started] == [130, 130]
    finally:
        for process in started:
            process.kill()
    (checkpoint,) = (out / "checkpoints").iterdir()
    for i in range(2):
        assert (
            f"interrupted after step {checkpoint.name}; the same command goes on"
            in (tmp_path / f"{i}.out").read_text()
        )


def test_only_the_first_process_writes(in_two_processes: Path) -> None:
    first, second = ((in_two_processes / f"process{i}.out").read_text() for i in range(2))
    ends = [
        [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for text in (first, second)
    ]
    assert [[end["steps"] for end in of_process] for of_process in ends] == [[3, 3, 5, 3, 3]] * 2
    assert ends[0][0]["written"] > ends[1][0]["written"] == []
    assert "Trainable modules" in first
    assert "Trainable modules" not in second


def write_model_and_data(folder: Path) -> None:
    """A random model with a byte-level tokenizer, and questions."""
    tokenizer = byte_tokenizer()
    hf_config = {**HF_CONFIG, "vocab_size": len(tokenizer)}
    config = decoder_config(hf_config, source="these tests")
    rng = np.random.default_rng(0)
    mean = {path: float(path.endswith("scale")) for path in flatten(abstract_params(config))}
    shapes = flatten(abstract_params(config))
    params = unflatten(
        {p: jnp.asarray(rng.normal(mean[p], 0.2, s.shape), jnp.float32) for p, s in shapes.items()}
    )
    save_model(
        folder / "model",
        params,
        LoadedModel(config=config, params=params, tokenizer=tokenizer, hf_config=hf_config),
    )
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def byte_tokenizer() -> Any:
    """Bytes and two special tokens, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {
        token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[1], chat_template=CHATML
    )


def run_config(folder: Path, method: str, steps: int, *, resume: bool = False) -> Config:
    """A short run on four devices: replicated weights for LoRA, sharded weights for the others."""
    init: Any = "kaiming" if method == "lora" else method
    measured = {"calibration_batches": 4} if INITS[init].statistic else {}
    generates = int(method == "lora")
    return Config(
        model=ModelConfig(path=str(folder / "model")),
        quant=QuantConfig(format="nf4" if method == "pissa" else "none"),
        adapter=AdapterConfig(rank=4, init=init, **measured),
        data=DataConfig(train=(str(folder / "data.jsonl"),), validation_rows=4, max_length=48),
        optim=OPTIM,
        train=TrainConfig(
            output=str(folder / method), steps=steps, batch_size=8, report_to=(), resume=resume
        ),
        # Each run compiles its own generation; one that does is enough.
        eval=EvalConfig(exact_match_rows=2 * generates, samples=generates, max_new_tokens=4),
        mesh=MeshConfig() if method == "lora" else MeshConfig(data=1, fsdp=4),
    )


def train_in_processes(folder: Path, configs: list[Path], *, processes: int, devices: int) -> None:
    """Train in several processes of one machine; the output of each goes to process{i}.out."""
    started = start_processes(folder, configs, processes=processes, devices=devices)
    try:
        codes = [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * processes, "\n".join(
        (folder / f"process{i}.out").read_text()[-3000:] for i in range(processes)
    )


def start_processes(
    folder: Path, configs: list[Path], *, processes: int, devices: int
) -> list[subprocess.Popen[bytes]]:
    """Start what `train_in_processes` waits for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).parent / "programs/train_process.py"
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment["TESTS_COMPILATION_CACHE"] = jax.config.jax_compilation_cache_dir or ""
    started = []
    for i in range(processes):
        command = [
            sys.executable,
            str(program),
            *map(str, (port, processes, i, devices)),
            *map(str, configs),
        ]
        with (folder / f"process{i}.out").open("w") as out:
            started.append(
                subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
            )
    return started


def steps(
    decoder: Build,
    method: str,
    mesh_config: MeshConfig | None,
    microbatches: int = 1,
    *,
    dtype: str = "float32",
    fields: Mapping[str, Any] | None = None,
    noise: Mapping[str, float] | None = None,
) -> Run:
    """Three steps on a mesh of all devices, or on the first device alone.

    Args:
      decoder: builds a model.
      method: a key of `METHODS`.
      mesh_config: the mesh; None: the first device.
      microbatches: of a batch.
      dtype: of the base.
      fields: of the decoder's config.
      noise: arguments of `supervised_loss`.
    """
    devices = jax.devices()[:1] if mesh_config is None else jax.devices()
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), devices=devices)
    config = METHODS[method]
    sizes = SIZES | (WIDE if method in QUANT else {})
    model = decoder(**{**sizes, "dtype": dtype, "remat": "none", **(fields or {})})
    params, originals = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params), {}
    if method in QUANT:
        params, originals = quantize_base(params, QUANT[method], layout=model.layout)
    rounds = QUANT[method].rounds if method in QUANT else 1
    params = add_adapters(
        params,
        config,
        layout=model.layout,
        key=jax.random.key(1),
        originals=originals,
        rounds=rounds,
    )
    if config.train_whole:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    shardings = sharding.param_shardings(params, DECODER_RULES, layout=model.layout, mesh=mesh)
    trained, frozen = partition(
        jax.device_put(params, shardings), whole=config.train_whole, freeze=config.freeze
    )
    tx = make_optimizer(OPTIM, steps=STEPS)
    places = unflatten({path: flatten(shardings)[path] for path in flatten(trained)})
    opt_places = sharding.state_shardings(tx, trained, places, mesh=mesh)
    state_places = TrainState(sharding.replicated(mesh), places, opt_places)
    state = TrainState(
        sharding.place(np.zeros((), np.int32), state_places.step),
        trained,
        jax.jit(tx.init, out_shardings=opt_places)(trained),
    )
    step = jax.jit(
        make_train_step(
            supervised_loss(model, packed=True, **(noise or {})), tx, layout=model.layout
        ),
        donate_argnums=0,
        out_shardings=(state_places, sharding.replicated(mesh)),
    )
    found = []
    for i in range(STEPS):
        batch = sharding.place_batch(make_batch(i), mesh, microbatches=microbatches)
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, batch, jax.random.key(2))
        found.append(float(metrics["loss"]))
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(state.trained).items()}
    return Run(np.array(found), leaves, state)


def check_places(state: TrainState) -> None:
    """Adapters are sharded like their kernels, but not along the rank; moments like parameters."""
    trained = flatten(state.trained)
    places = {path: leaf.sharding for path, leaf in trained.items()}
    mesh = next(iter(places.values())).mesh
    for path, place in places.items():
        module, name = path.rsplit("/", 1)
        base = path if name in ("kernel", "embedding", "scale") else f"{module}/kernel"
        axes = next(axes for rule, axes in DECODER_RULES if re.fullmatch(rule, base))
        if base != path:
            _, ins, outs = axes
            axes = {
                "lora_a": (None, ins, None),
                "lora_b": (None, None, outs),
                "magnitude": (None, outs),
            }[name]
        assert place.is_equivalent_to(
            NamedSharding(mesh, PartitionSpec(*axes)), trained[path].ndim
        ), path
    moments = 0
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        path = next((p for p in places if path.endswith(p)), None)
        if path and leaf.ndim:
            assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), keys
            moments += 1
    assert moments == 2 * len(places)


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Random rows `[B, T]` of two samples each, with padding and different numbers of labels."""
    rng = np.random.default_rng(seed)
    cuts, ends = rng.integers(4, 8, (ROWS, 1)), rng.integers(10, TOKENS + 1, (ROWS, 1))
    slots = np.arange(TOKENS)[None]
    segments = np.where(slots < cuts, 1, np.where(slots < ends, 2, 0))
    tokens = rng.integers(0, SIZES["vocab_size"], (ROWS, TOKENS))
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.roll(tokens, -1, 1).astype(np.int32),
        "weights": ((segments > 0) & (rng.random((ROWS, TOKENS)) < 0.7)).astype(np.float32),
        "positions": np.where(slots < cuts, slots, slots - cuts).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
    }
