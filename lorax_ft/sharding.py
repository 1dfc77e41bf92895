"""How arrays are sharded over the mesh: parameters, adapters, optimizer state and batches.

The base's leaves follow rules by slash path; an adapter's leaves follow their kernel's axes, as the
schema names them. Letters: M microbatches, B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import Array, lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft.checks import alternatives, divisors
from lorax_ft.config import MeshConfig
from lorax_ft.lowrank.layout import Layout
from lorax_ft.mesh_axes import (
    AXES,
    ROW_AXES,
    SHARDS,
    TOKEN_AXIS,
    MeshAxis,
    ambient_sizes,
    devices_along,
)
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import Axis, Place, is_adapter, leaf_schema
from lorax_ft.tree import Shape, Tree, first_match, flatten, join, unflatten

Rules = Sequence[tuple[str, tuple[MeshAxis, ...]]]
"""(regular expression for a slash path, mesh axes of the leaf's axes); the first match wins."""

# Every leaf of a decoder must match a rule. The first axis of `layers` counts the layers.
DECODER_RULES: Rules = (
    (r"embed_tokens/embedding", ("tensor", SHARDS)),
    (r"lm_head/kernel", (SHARDS, "tensor")),
    (r"layers/.*/experts/(gate|up)_proj/kernel", (None, "expert", SHARDS, "tensor")),
    (r"layers/.*/experts/down_proj/kernel", (None, "expert", "tensor", SHARDS)),
    (r"layers/.*/experts/(gate|up)_proj/bias", (None, "expert", "tensor")),
    (r"layers/.*/experts/down_proj/bias", (None, "expert")),
    (r"layers/.*/(q|k|v|qkv|gate|up|gate_up)_proj/kernel", (None, SHARDS, "tensor")),
    (r"layers/.*/(q|k|v|qkv|gate|up|gate_up)_proj/bias", (None, "tensor")),
    (r"layers/.*/in_proj_(qkv|z)/kernel", (None, SHARDS, "tensor")),
    (r"layers/.*/in_proj_(a|b)/kernel", (None, SHARDS, None)),
    (r"layers/.*/(o|out|down)_proj/kernel", (None, "tensor", SHARDS)),
    (r"layers/.*/(o|down)_proj/bias", ()),
    # There is none; an adapter beside the whole MLP is split as it would be.
    (r"layers/(.*/)?mlp/kernel", (None, SHARDS, SHARDS)),
    (r"layers/(.*/)?mlp/gate/(kernel|bias)", ()),
    (r"layers/(.*/)?(self_attn/sinks|layer_scalar)", ()),
    (r"layers/(.*/)?linear_attn/(conv1d/kernel|A_log|dt_bias)", ()),
    (r"(.*/)?\w*norm/scale", ()),
)


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the `AXES` over all devices of all processes.

    Of several TPU slices, which only the data center's network connects, data goes across: its
    gradients are those of the adapters alone.

    Args:
      config: the axes' sizes.
      devices: which devices; None: all.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or data does not divide by the
        number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    rest = (config.fsdp, config.expert, config.context, config.tensor)
    data = config.data
    if data == -1:
        data = len(devices) // math.prod(rest)
    if data * math.prod(rest) != len(devices):
        raise ValueError(_misfit(config, len(devices)))
    # Explicit axes, jax.make_mesh's default since 0.9, fail in nn.Embed on a sharded table.
    types = (AxisType.Auto,) * len(AXES)
    slices = _slices(devices)
    if data % slices:
        raise ValueError(
            f"mesh.data is {data}, which does not divide by the {slices} slices: the weights would "
            "have to cross the network between them"
        )
    # Of a v5p of 8x8x16 chips, fsdp may take 4 along one of its axes, which jax.make_mesh refuses.
    if slices == 1:
        grid = mesh_utils.create_device_mesh((data, *rest), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *rest),
            (slices, 1, 1, 1, 1),
            devices=devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, AXES, axis_types=types)


def _misfit(config: MeshConfig, devices: int) -> str:
    """What is wrong with a mesh whose sizes do not multiply to the number of devices."""
    sizes = {name: getattr(config, name) for name in AXES}
    described = " × ".join(f"{name}={size}" for name, size in sizes.items())
    rest = math.prod(sizes.values()) // sizes["data"]
    if devices % rest:
        others = " × ".join(f"mesh.{name}" for name in sizes if name != "data")
        way_out = f"{others} must be {alternatives(divisors(devices))}, not {rest}"
    else:
        way_out = f"with these others, mesh.data must be {devices // rest}, or -1"
    return f"a mesh of {described} does not fit {devices} devices; {way_out}"


def _slices(devices: Sequence[Any]) -> int:
    """The number of TPU slices that devices belong to."""
    # JAX numbers the hosts of GPUs as slices too, but there any axis may go across.
    numbers = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    return max(len(numbers), 1)


def param_shardings(
    shapes: Tree,
    rules: Rules,
    *,
    layout: Layout,
    mesh: Mesh,
) -> Tree:
    """A `NamedSharding` for every leaf.

    Args:
      shapes: the parameters or their shapes, adapters included.
      rules: for the base's leaves.
      layout: the layers of the model, which give adapters the meaning of their axes.
      mesh: the devices.

    Returns:
      The tree of shardings; at a quantized kernel one for each part. An adapter's in and out axes
      are split as its kernel's, its rank axis is whole. An axis that does not divide by its mesh
      axis is whole on every device.

    Raises:
      ValueError: no rule matches a leaf.
    """
    places = {}
    for path, leaf in flatten(shapes).items():
        if is_adapter(path):
            axes = _adapter_axes(path, rules, layout)
            fitting = fitted(axes, leaf.shape, mesh.shape)
            places[path] = NamedSharding(mesh, fitting)
        else:
            places[path] = base_sharding(path, leaf, rules, mesh=mesh)
    return unflatten(places)


def base_sharding(
    path: str,
    leaf: Any,
    rules: Rules,
    *,
    mesh: Mesh,
) -> Any:
    """The sharding of one leaf of the base; of a quantized kernel, one for each part.

    Raises:
      ValueError: no rule matches it.
    """
    axes = _rule(path, len(leaf.shape), rules)

    def placed(array: Any, array_axes: tuple[MeshAxis, ...]) -> NamedSharding:
        fitting = fitted(array_axes, array.shape, mesh.shape)
        return NamedSharding(mesh, fitting)

    if not isinstance(leaf, Quantized):
        return placed(leaf, axes)
    part_axes = leaf.axes(axes, mesh.shape)
    return jax.tree.map(placed, leaf, part_axes)


def state_shardings(
    tx: optax.GradientTransformation,
    trained: Tree,
    shardings: Tree,
    *,
    mesh: Mesh,
) -> Any:
    """Shardings of an optimizer's state: moments as their parameter, all else on every device."""
    shapes = flatten(trained)
    places = flatten(shardings)

    def place_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = []
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):
                names.append(key.key)
        # A moment's path in the state ends with its parameter's path.
        for start in range(len(names)):
            suffix = "/".join(names[start:])
            if suffix in shapes and shapes[suffix].shape == leaf.shape:
                return places[suffix]
        return replicated(mesh)

    state = jax.eval_shape(tx.init, trained)
    return jax.tree_util.tree_map_with_path(place_of, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, *, microbatched: bool) -> NamedSharding:
    """Rows over `ROW_AXES`, tokens over context: of `[B, T]`, or of `[M, B, T]`."""
    if microbatched:
        return NamedSharding(mesh, P(None, ROW_AXES, TOKEN_AXIS))
    return NamedSharding(mesh, P(ROW_AXES, TOKEN_AXIS))


def batch_devices(mesh: Mesh) -> int:
    """How many devices the tokens of a batch are split over."""
    return devices_along((*ROW_AXES, TOKEN_AXIS), mesh.shape)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same in every process, as a global array.

    Each process provides its own shards.
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place_batch(
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    *,
    microbatches: int = 0,
) -> dict[str, jax.Array]:
    """A batch `[B, T]` on the mesh, as `[M, B / M, T]` where `microbatches` is given."""
    sharding = batch_sharding(mesh, microbatched=microbatches > 0)
    placed = {}
    for name, rows in batch.items():
        if microbatches:
            rows = rows.reshape(microbatches, -1, rows.shape[-1])  # [M, B / M, T]
        placed[name] = place(rows, sharding)
    return placed


def gathered(path: str, kernel: Quantized) -> Quantized:
    """A layer's quantized kernel, split over the ambient mesh's tensor axis and no other.

    It is dequantized after that, so that devices exchange codes and not values: a quarter of the
    bytes. Without it XLA dequantizes first.

    Args:
      path: the module's, such as `layers/mlp/up_proj`.
      kernel: as the layer sees it, without the axis of layers.
    """
    sizes = ambient_sizes()
    axes = first_match(DECODER_RULES, f"{path}/kernel")
    if axes is None or devices_along(SHARDS, sizes) == 1:
        return kernel
    _, *without_layers = axes
    whole_over_shards = tuple(None if axis == SHARDS else axis for axis in without_layers)

    def constrained(part: Array, part_axes: tuple[MeshAxis, ...]) -> Array:
        fitting = fitted(part_axes, part.shape, sizes)
        return lax.with_sharding_constraint(part, fitting)

    part_axes = kernel.axes(whole_over_shards, sizes)
    return jax.tree.map(constrained, kernel, part_axes)


def fitted(axes: tuple[MeshAxis, ...], shape: Shape, sizes: Mapping[str, int]) -> P:
    """The mesh axes of an array's axes, without those that do not divide them."""
    kept = []
    # JAX shards an axis only into equal parts.
    for axis, size in zip(axes, shape, strict=True):
        kept.append(axis if size % devices_along(axis, sizes) == 0 else None)
    return P(*kept)


def _adapter_axes(path: str, rules: Rules, layout: Layout) -> tuple[MeshAxis, ...]:
    """The mesh axes of an adapter's leaf: those of the kernel's axes that its row names."""
    module, _, name = path.rpartition("/")
    row = leaf_schema(name)
    if row.place is not Place.MODULE:
        return (None,) * len(row.axes)
    spec = layout[module]
    kernel_path = join(module, spec.weight)
    ndim = len(spec.stack) + len(spec.ins) + len(spec.outs)
    kernel = _rule(kernel_path, ndim, rules)
    meanings: dict[Axis, tuple[int, ...]] = {
        "stack": spec.stack,
        "in": spec.ins,
        "out": spec.outs,
    }
    axes: list[MeshAxis] = []
    for axis in row.axes:
        if axis not in meanings:
            # Ranks are small, and splitting them would add a sum over devices.
            axes.append(None)
            continue
        for place in meanings[axis]:
            axes.append(kernel[place])
    return tuple(axes)


def _rule(path: str, ndim: int, rules: Rules) -> tuple[MeshAxis, ...]:
    """The mesh axes that the rules give to a leaf of the base, one for each of its axes."""
    axes = first_match(rules, path)
    if axes is None:
        raise ValueError(f"no sharding rule matches the parameter {path}; add one to DECODER_RULES")
    # Axes that the rule does not name are whole on every device.
    whole = (None,) * (ndim - len(axes))
    return axes + whole


def bytes_a_device(tree: Any) -> int:
    """The size of a tree's shards on one device in bytes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shard = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shard) * leaf.dtype.itemsize
    return total
