"""Where each leaf lives on the mesh: rules for the base by slash path, adapters derived from their kernel's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft.config import MeshConfig
from lorax_ft.lowrank.linear import ADAPTER_LEAVES
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Tree, first_match, flatten, unflatten

Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, tuple[str | None, ...]]]
ROW_AXES = ("data", "fsdp")  # the mesh axes that rows are split over

QUANTIZABLE = r"layers/.*_proj/kernel"
"""The leaves that a quantized base has in fewer bits: all linear layers but the head and the routers."""

# Which axes of a leaf the mesh splits, by slash path; the first match wins and every leaf must have one.
DECODER_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/.*/experts/(gate|up)_proj/kernel", (None, None, "fsdp", "tensor")),
    (r"layers/.*/experts/down_proj/kernel", (None, None, "tensor", "fsdp")),
    (r"layers/.*/(q|k|v|qkv|gate|up|gate_up)_proj/kernel", (None, "fsdp", "tensor")),
    (r"layers/.*/(q|k|v|qkv|gate|up|gate_up)_proj/bias", (None, "tensor")),
    (r"layers/.*/(o|down)_proj/kernel", (None, "tensor", "fsdp")),
    (r"layers/.*/(o|down)_proj/bias", ()),
    (r"layers/mlp/gate/kernel", ()),
    (r"(.*/)?\w*norm/scale", ()),
)


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes data, fsdp and tensor over all devices of all processes.

    Args:
      config: the axes' sizes.
      devices: which devices; None takes all.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    rest = config.fsdp * config.tensor
    data = len(devices) // rest if config.data == -1 else config.data
    if data * rest != len(devices):
        raise ValueError(
            f"a mesh of data={config.data} × fsdp={config.fsdp} × tensor={config.tensor} "
            f"does not fit {len(devices)} devices"
        )
    # Explicit axes, which jax.make_mesh takes by default since 0.9, fail in nn.Embed on a sharded table.
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def param_shardings(shapes: Tree, rules: Rules, *, mesh: Mesh) -> Tree:
    """A `NamedSharding` for every leaf.

    Args:
      shapes: the parameters or their shapes, adapters included.
      rules: (regular expression, axes) for the base's leaves by slash path; the first match wins.
      mesh: the devices.

    Returns:
      The tree of shardings; at a quantized kernel one for each part. A's in axes and B's out axes lie as their
      kernel's do, the rank is whole. An axis that does not divide by its mesh axis is whole on every device.

    Raises:
      ValueError: no rule matches a leaf.
    """
    flat = flatten(shapes)
    return unflatten({path: _sharding(path, flat, rules, mesh) for path in flat})


def state_shardings(
    tx: optax.GradientTransformation, trained: Tree, shardings: Tree, *, mesh: Mesh
) -> Any:
    """Shardings of an optimizer's state: moments lie where their parameter does, all else is on every device."""
    shapes, places = flatten(trained), flatten(shardings)

    def place_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        suffixes = ("/".join(names[i:]) for i in range(len(names)))
        same = next((p for p in suffixes if p in shapes and shapes[p].shape == leaf.shape), None)
        return replicated(mesh) if same is None else places[same]

    return jax.tree_util.tree_map_with_path(place_of, jax.eval_shape(tx.init, trained))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, *, microbatched: bool) -> NamedSharding:
    """Rows split over data and fsdp: `[B, T]`, or `[M, B, T]` where the batch is cut into microbatches."""
    return NamedSharding(mesh, P(None, ROW_AXES) if microbatched else P(ROW_AXES))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same in every process, as a global array; each process hands over its shards."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, microbatches: int = 0
) -> dict[str, jax.Array]:
    """A batch `[B, T]` on the mesh, as `[M, B / M, T]` where `microbatches` is given."""
    sharding = batch_sharding(mesh, microbatched=microbatches > 0)
    cut = {
        k: v.reshape(microbatches, -1, v.shape[-1]) if microbatches else v for k, v in batch.items()
    }
    return {k: place(v, sharding) for k, v in cut.items()}


def split_rows(x: Array) -> Array:
    """x `[B, ...]` with its rows split over the ambient mesh (`jax.set_mesh`), if there is one that divides them.

    Without it XLA may leave the width split, as the embedding table is, and gather the whole batch on every device.
    """
    axes = tuple(axis for axis in ROW_AXES if axis in jax.sharding.get_abstract_mesh().shape)
    if not axes or x.shape[0] % row_devices():
        return x
    return lax.with_sharding_constraint(x, P(axes))


def row_devices() -> int:
    """Over how many devices of the ambient mesh (`jax.set_mesh`) the rows of a batch are split; 1 without one."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in ROW_AXES)


def gathered(path: str, kernel: Quantized) -> Quantized:
    """A layer's quantized kernel, whole over the ambient mesh's fsdp axis, and split over tensor as the rules say.

    It is dequantized after that, so that codes travel between devices and not the values: a quarter of the bytes.
    Without it XLA dequantizes first.

    Args:
      path: the module's, such as `layers/mlp/up_proj`.
      kernel: as the layer sees it, without the axis of layers.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = first_match(DECODER_RULES, f"{path}/kernel")
    if sizes.get("fsdp", 1) == 1 or axes is None:
        return kernel
    _, *own = (None if axis == "fsdp" else axis for axis in axes)
    places = kernel.axes(tuple(own), sizes)

    def constrained(part: Array, axes: tuple[Axis, ...]) -> Array:
        return lax.with_sharding_constraint(part, fitted(axes, part.shape, sizes))

    return jax.tree.map(constrained, kernel, places)


def fitted(axes: tuple[Axis, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """The mesh axes of an array's axes, without those that do not divide them."""

    def fits(axis: Axis, size: int) -> bool:
        names = axis if isinstance(axis, tuple) else (axis,)
        return axis is not None and size % math.prod(sizes[name] for name in names if name) == 0

    return P(*(axis if fits(axis, size) else None for axis, size in zip(axes, shape, strict=True)))


def _sharding(path: str, flat: Mapping[str, Any], rules: Rules, mesh: Mesh) -> Any:
    shape = flat[path].shape
    parent, _, name = path.rpartition("/")
    if isinstance(flat[path], Quantized):
        axes = flat[path].axes(_axes(path, len(shape), rules), mesh.shape)
        return jax.tree.map(
            lambda part, a: NamedSharding(mesh, fitted(a, part.shape, mesh.shape)), flat[path], axes
        )
    if name not in ADAPTER_LEAVES:
        return NamedSharding(mesh, fitted(_axes(path, len(shape), rules), shape, mesh.shape))
    base = f"{parent}/embedding" if f"{parent}/embedding" in flat else f"{parent}/kernel"
    n_stack = flat[f"{parent}/lora_scale"].ndim
    n_in = flat[f"{parent}/lora_a"].ndim - n_stack - 1
    n_out = flat[f"{parent}/lora_b"].ndim - n_stack - 1
    kernel = _axes(base, n_stack + n_in + n_out, rules)
    stack, ins, outs = kernel[:n_stack], kernel[n_stack : n_stack + n_in], kernel[n_stack + n_in :]
    axes = {
        "lora_a": (*stack, *ins, None),
        "lora_b": (*stack, None, *outs),
        "magnitude": (*stack, *outs),
    }
    axes |= {"lora_a0": axes["lora_a"], "lora_b0": axes["lora_b"]}
    return NamedSharding(mesh, fitted(axes.get(name, stack), shape, mesh.shape))


def _axes(path: str, ndim: int, rules: Rules) -> tuple[str | None, ...]:
    axes = first_match(rules, path)
    if axes is None:
        raise ValueError(f"no sharding rule matches the parameter {path}; add one beside the model")
    return (*axes, *[None] * (ndim - len(axes)))
