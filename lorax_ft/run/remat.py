"""What `model.remat auto` makes the backward pass recompute: as little as memory allows."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lorax_ft.config import Config
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.decoder import saved_per_token
from lorax_ft.models.model import Model
from lorax_ft.run.memory import device_memory
from lorax_ft.sharding import batch_devices

Remat = Literal["none", "products", "mlp", "full"]
KINDS: tuple[Remat, ...] = ("products", "mlp", "full")
"""From the fastest to the one that saves least."""
SHARE = 0.5
"""Of the memory beside the weights, for what is saved; the rest is for temporaries."""


def with_remat(model: Model, config: Config, *, tokens: int, held: float) -> Model:
    """The model with the rematerialization that the config names, or that fits.

    Args:
      model: the model's functions.
      config: the run.
      tokens: of a microbatch on each device.
      held: bytes of each device that are taken, such as those of the weights.
    """
    if config.model.remat != "auto":
        return model
    # All processes must compile the same program.
    smallest = np.min(multihost_utils.process_allgather(np.float64(device_memory())))
    on_cpu = jax.default_backend() == "cpu"
    kind = choose(
        model.config,
        tokens,
        memory=float(smallest) - held,
        on_cpu=on_cpu,
        expert_devices=config.mesh.expert,
        scaled=scales_outputs(config),
    )
    decoder = dataclasses.replace(model.config, remat=kind)
    return dataclasses.replace(model, config=decoder)


def choose(
    decoder: DecoderConfig,
    tokens: int,
    *,
    memory: float,
    on_cpu: bool,
    expert_devices: int = 1,
    scaled: bool = False,
) -> Remat:
    """The first of `KINDS` that saves at most a share of the memory.

    It depends on nothing that varies from run to run, so that a resumed run computes the same.

    Args:
      decoder: the model.
      tokens: of a microbatch on a device.
      memory: of a device in bytes, beside what it holds anyway.
      on_cpu: whether the devices are CPUs.
      expert_devices: mesh.expert.
      scaled: `scales_outputs`.
    """
    # On a CPU XLA converts a whole stack of bfloat16 to float32 to write one layer (jaxlib 0.10.2).
    if on_cpu and decoder.dtype == "bfloat16":
        return "full"
    for kind in KINDS:
        saved = saved_bytes(decoder, kind, tokens, expert_devices, scaled=scaled)
        if saved <= SHARE * memory:
            return kind
    return "full"


def saved_bytes(
    decoder: DecoderConfig,
    kind: str,
    tokens: int,
    expert_devices: int = 1,
    *,
    scaled: bool = False,
) -> float:
    """The bytes that a kind of rematerialization saves of so many tokens."""
    size = jnp.dtype(decoder.dtype).itemsize
    numbers = saved_per_token(decoder, kind, expert_devices, scaled=scaled)
    return float(numbers * tokens * size)


def scales_outputs(config: Config) -> bool:
    """Whether the adapters scale outputs of projections by what trains: DoRA and IA3."""
    return config.adapter.dora or config.adapter.method == "ia3"


def tokens_a_device(config: Config, mesh: Mesh, length: int) -> int:
    """The tokens of a microbatch on each device."""
    rows = config.train.batch_size // config.train.microbatches
    return rows * length // batch_devices(mesh)
