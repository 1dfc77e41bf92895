"""The training step of a config for chips that are not here, compiled from the shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.models import splash
from lorax_ft.models.grouped import check_expert_axis
from lorax_ft.models.model import CausalLM, abstract_params
from lorax_ft.models.soft_prompt import add_soft_prompt
from lorax_ft.plan.chips import Topology
from lorax_ft.plan.flops import count_flops
from lorax_ft.plan.hlo import Traffic, traffic
from lorax_ft.quant.kernels import quantize
from lorax_ft.run.program import trace_step
from lorax_ft.run.setup import check_rows
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.state import abstract_state
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, flatten, unflatten

STEPS = 100
"""Of the learning rate's schedule: any number gives the same program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The arguments of a step: shapes and where they lie."""

    state: TrainState
    frozen: Tree
    batch: Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says of a step. Bytes are those of one chip."""

    weights: int
    """The frozen leaves: the base, and what of the adapters does not train."""
    trained: int
    moments: int
    """The optimizer's state."""
    batch: int
    arguments: int
    """All of these as the compiler lays them out, with its padding."""
    temporaries: int
    """Activations, gradients, and weights that are gathered from other chips."""
    flops: float
    """Of matrix products, on one chip."""
    traffic: Traffic
    seconds: float
    """How long the compiler took."""

    @property
    def total(self) -> int:
        """What must fit into the memory of a chip; the new state takes the place of the old one."""
        return self.arguments + self.temporaries


class DoesNotFitError(Exception):
    """The compiler found no program that fits into the memory of a chip."""

    def __init__(self, needed: float) -> None:
        super().__init__(f"{needed:.0f} bytes")
        self.needed = needed
        """Bytes that it would need."""


def make_model(
    fields: Mapping[str, Any], config: Config, topology: Topology, *, source: str
) -> CausalLM:
    """The model of a config.json.

    Raises:
      ValueError: as `decoder_config` and `check_expert_axis`.
    """
    # auto looks at the backend of this process, which is a CPU: named is what it is elsewhere.
    products = config.model.expert_products
    decoder = decoder_config(
        fields,
        source=source,
        dtype=config.model.dtype,
        attention="xla",
        expert_products="ragged" if products == "auto" else products,
        remat="full" if config.model.remat == "auto" else config.model.remat,
    )
    check_expert_axis(decoder, config.mesh.expert, source=source)
    length = config.data.max_length
    if topology.chip.is_tpu and config.model.attention != "xla" and isinstance(length, int):
        sizes = dataclasses.asdict(config.mesh)
        if splash.missing(decoder, tokens=length, cached=False, sizes=sizes) is None:
            decoder = dataclasses.replace(decoder, attention="splash")
    return CausalLM(config=decoder)


def make_mesh(config: Config, topology: Topology) -> Mesh:
    """The mesh of a config on a topology.

    Raises:
      ValueError: the mesh does not fit the topology, the rows of a batch do not fit the mesh, or
        libtpu is not installed.
    """
    mesh = sharding.make_mesh(config.mesh, devices=_devices(topology))
    check_rows(config, mesh)
    return mesh


def _devices(topology: Topology) -> Sequence[Any]:
    """The devices of a topology, which are not here."""
    if not topology.chip.is_tpu:
        # CPUs take the place of GPUs, for which nothing compiles without one.
        return jax.devices("cpu")[: topology.devices]
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    # libtpu's C code answers with exceptions of JAX's runtime.
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if importlib.util.find_spec("libtpu") is None:
            reason = 'it needs libtpu: pip install "lorax_ft[tpu-compile]"'
        raise ValueError(f"cannot compile for {topology.name}: {reason}") from error
    return found.devices


def abstract_arguments(model: CausalLM, config: Config, mesh: Mesh) -> Shapes:
    """The shapes and shardings of the state, the frozen leaves and the batch.

    Raises:
      ValueError: as `abstract_state`.
    """
    base = {}
    for path, leaf in flatten(abstract_params(model.config)).items():
        base[path] = _base_leaf(path, leaf, config, model)
    tx = make_optimizer(config.optim, steps=STEPS)
    params = _with_soft_prompt(unflatten(base), config, model)
    state, frozen = abstract_state(params, config.adapter, tx, layout=model.layout, mesh=mesh)
    train, length = config.train, config.data.max_length
    if length == "auto":
        raise ValueError("data.max_length is auto, which needs the data; give the number of tokens")
    shape = (train.microbatches, train.batch_size // train.microbatches, length)
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    place = sharding.batch_sharding(mesh, microbatched=True)
    batch = {}
    for name, dtype in {**dtypes, "weights": jnp.float32}.items():
        batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return Shapes(state=state, frozen=frozen, batch=batch)


def _with_soft_prompt(params: Tree, config: Config, model: CausalLM) -> Tree:
    """The shapes of the parameters, with those of a soft prompt."""
    if config.prompt.kind == "none":
        return params
    # Its shapes do not depend on what it starts from, and this needs neither text nor weights.
    prompt = dataclasses.replace(config.prompt, init="random", text=None)
    if prompt.encoder != "none":
        prompt = config.prompt
    add = functools.partial(add_soft_prompt, config=prompt, model=model)
    return jax.eval_shape(lambda params, key: add(params, key=key), params, jax.random.key(0))


def _base_leaf(path: str, leaf: Any, config: Config, model: CausalLM) -> Any:
    """The shape of a leaf of the base in the config's dtype, or quantized."""
    leaf = jax.ShapeDtypeStruct(leaf.shape, config.model.dtype)
    quant = config.quant
    module, _, name = path.rpartition("/")
    # A convolution has a kernel, but no place in the layout.
    is_linear = name == "kernel" and module in model.layout
    if quant.format == "none" or not (is_linear and model.layout[module].quantizable):
        return leaf
    stacked = leaf.ndim - 2

    def quantized(kernel: Any) -> Any:
        return quantize(
            kernel, format=quant.format, double_quant=quant.double, n_stack=stacked, n_in=1
        )

    return jax.eval_shape(quantized, leaf)


def trace(model: CausalLM, config: Config, mesh: Mesh, shapes: Shapes) -> Any:
    """A run's own step, traced for these shapes."""
    everywhere = sharding.replicated(mesh)
    key: Any = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=everywhere)
    return trace_step(
        model,
        make_optimizer(config.optim, steps=STEPS),
        config,
        state=shapes.state,
        frozen=shapes.frozen,
        batch=shapes.batch,
        key=key,
        mesh=mesh,
    )


def compile_traced(traced: Any, mesh: Mesh) -> tuple[Any, str]:
    """The compiled program of a traced step, and its text.

    Raises:
      DoesNotFitError: the compiler for TPUs knows their memory, and gives up.
    """
    try:
        with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
            # The compiler writes the text. jaxlib 0.10.2 (`as_text`) cannot read some programs of
            # libtpu 0.0.52, such as those of experts.
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = traced.lower().compile(compiler_options=options)
            # "after_optimizations.txt", or "cpu_after_optimizations.txt".
            (file,) = Path(folder).glob("*after_optimizations.txt")
            return compiled, file.read_text()
    except jax.errors.JaxRuntimeError as error:
        # "... required for HLO temporaries (16.99G) exceeds available HBM (15.75G)", in GiB.
        needed = re.search(r"RESOURCE_EXHAUSTED.*?\((\d+(?:\.\d+)?)G\)", str(error), re.DOTALL)
        if needed is None:
            raise
        raise DoesNotFitError(float(needed[1]) * 2**30) from error


def measure(model: CausalLM, config: Config, mesh: Mesh) -> Program:
    """Compile the step of a config, and read from it what a chip holds, computes and receives.

    Raises:
      ValueError: as `abstract_arguments`.
      DoesNotFitError: as `compile_traced`.
    """
    shapes = abstract_arguments(model, config, mesh)
    began = time.perf_counter()
    traced = trace(model, config, mesh, shapes)
    compiled, text = compile_traced(traced, mesh)
    memory = compiled.memory_analysis()
    return Program(
        weights=sharding.bytes_a_device(shapes.frozen),
        trained=sharding.bytes_a_device(shapes.state.trained),
        moments=sharding.bytes_a_device(shapes.state.opt_state),
        batch=sharding.bytes_a_device(shapes.batch),
        arguments=memory.argument_size_in_bytes,
        # Results that are not in the place of arguments: the metrics.
        temporaries=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        # Rows of experts have room for the worst case; this is the mean.
        flops=count_flops(traced.jaxpr.jaxpr, used=1 / config.mesh.expert) / mesh.size,
        traffic=traffic(text),
        seconds=time.perf_counter() - began,
    )
