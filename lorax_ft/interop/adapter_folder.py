"""Adapters of any Flax model, written and read: a folder with a safetensors file of their leaves.

PEFT loads the adapters of `save_peft`, which are on modules that PyTorch has too. These are on
paths of a parameter tree: `blocks/attention/query/lora_a`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax_ft.config import AdapterConfig
from lorax_ft.files import within
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.lazy_tensor import FLOATS_AND_INDICES, lazy_tensors
from lorax_ft.lowrank.adapters import attach_adapters
from lorax_ft.lowrank.groups import partition
from lorax_ft.lowrank.layout import Layout, blocks_of
from lorax_ft.lowrank.merge import merge_adapters
from lorax_ft.lowrank.requantize import Original
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.lowrank.terms import TERMS, bottleneck
from lorax_ft.lowrank.terms.low_rank import INVOCATION
from lorax_ft.schema import is_adapter
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import Layer, Tree, combine, flatten, modules, split, unflatten

WEIGHTS = "adapter.safetensors"
CONFIG = "adapter.json"


def save_adapter(folder: str | Path, params: Tree, *, config: AdapterConfig | None = None) -> None:
    """Writes the adapters in `params`, and what trained in full, as a folder for `load_adapter`.

    adapter.safetensors has the leaves by their slash paths, and adapter.json the config, for a
    reader. Nothing of the base is written, so the folder is small, and fits the same base only.

    Args:
      folder: on a disk, a bucket (gs://, s3://) or the hub (hf://owner/name); written to a
        temporary folder first, then renamed or uploaded.
      params: base and adapters together.
      config: what the adapters were made from: says which modules were trained in full
        (`train_whole`). None writes the adapters alone.

    Raises:
      ValueError: there is no adapter, there is a soft prompt, or the folder holds other files.

    >>> import tempfile
    >>> from lorax_ft.lowrank.adapters import add_adapters
    >>> from lorax_ft.lowrank.layout import layout
    >>> dense, x = nn.Dense(3), jnp.ones((1, 4))
    >>> base = dense.init(jax.random.key(0), x)["params"]
    >>> layers = layout(dense.apply, base, x)
    >>> config = AdapterConfig(rank=2, init="pissa")
    >>> params = add_adapters(base, config, layout=layers, key=jax.random.key(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(folder, params, config=config)
    ...     again = load_adapter(folder, base, layout=layers)
    >>> bool((again["kernel"] == params["kernel"]).all()), sorted(again) == sorted(params)
    (True, True)
    """
    if virtual_tokens(params):
        raise ValueError("a soft prompt is a decoder's; save it by lorax_ft.save_peft")
    whole = config.train_whole if config is not None else ()
    ours, _ = partition(params, by="ownership", whole=whole)
    leaves = flatten(nn.meta.unbox(ours))
    if not leaves:
        raise ValueError("the parameters hold no adapter; build one with lorax_ft.add_adapters")
    tensors = {path: np.array(jax.device_get(leaf), order="C") for path, leaf in leaves.items()}
    described = dataclasses.asdict(config) if config is not None else {}
    with new_folder(folder) as new:
        save_file(tensors, new / WEIGHTS)
        (new / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def load_adapter(
    folder: str | Path,
    base: Tree,
    *,
    layout: Layout,
    originals: Mapping[str, Original] = MappingProxyType({}),
) -> Tree:
    """The base with the adapters of a folder in it.

    A base that the init changed (PiSSA) is computed again from the start, which is in the folder.

    Args:
      folder: what `save_adapter` wrote.
      base: the parameters that the adapters were made for, as they were loaded.
      layout: the layers of the model.
      originals: as in `add_adapters`, if the base is quantized and the init changed it.

    Raises:
      ValueError: the folder is damaged, or does not fit the base.
    """
    file = within(Path(folder), WEIGHTS)
    tensors = lazy_tensors(file, dtypes=FLOATS_AND_INDICES)
    leaves = {path: jnp.asarray(tensor.read(())) for path, tensor in tensors.items()}
    base = nn.meta.unbox(base)
    known = [*modules(base), *blocks_of(layout)]
    for path in leaves:
        module = path.rpartition("/")[0]
        if module and module not in known:
            near = difflib.get_close_matches(module, known, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"{file}: {path}: the model has no module {module}{hint}")
    adapters, whole = split(unflatten(leaves), is_adapter)
    _check_shapes(flatten(whole), flatten(base), where=file)
    loaded = unflatten({**flatten(base), **flatten(whole)})
    _check_fits(combine(loaded, adapters), base, layout=layout, where=file)
    return attach_adapters(loaded, adapters, layout=layout, originals=originals)


def _check_shapes(leaves: Mapping[str, Any], base: Mapping[str, Any], *, where: Path) -> None:
    """Raise where a weight that trained in full is not one of the base."""
    for path, leaf in leaves.items():
        if path not in base or base[path].shape != leaf.shape:
            there = f"has the shape {base[path].shape} there" if path in base else "is not there"
            raise ValueError(f"{where}: {path} has the shape {leaf.shape}, and {there}")


def _check_fits(params: Tree, base: Tree, *, layout: Layout, where: Path) -> None:
    """Raise where values are not finite, or the shapes of adapters do not fit their kernels."""
    for path, leaf in flatten(params).items():
        if is_adapter(path) and not np.isfinite(leaf).all():
            raise ValueError(f"{where}: {path} has values that are not finite")
    _check_bottlenecks(modules(params), layout, where=where)
    params = _mergeable(params)
    try:
        merged = jax.eval_shape(functools.partial(merge_adapters, layout=layout), params)
    # Shapes that do not fit are whatever the operation on them raises.
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}: the adapters do not fit the model: {reason}") from error
    _check_shapes(flatten(merged), flatten(base), where=where)


def _check_bottlenecks(layers: Mapping[str, Layer], layout: Layout, *, where: Path) -> None:
    """Raise where the leaves of a bottleneck do not fit the module beside which they stand."""
    for path, layer in layers.items():
        if bottleneck.B not in layer:
            continue
        spec = layout.get(path) or blocks_of(layout).get(path)
        if spec is None:
            raise ValueError(f"{where}: no bottleneck can stand beside the model's {path}")
        kernel = base_shape(layers, path, spec)
        rank = layer[bottleneck.B].shape[-2]
        for name in bottleneck.TERM.all_leaves:
            shape = layer[name].shape if name in layer else None
            needed = spec.leaf_shape(name, kernel, sizes={"rank": rank})
            if shape not in (None, needed):
                raise ValueError(
                    f"{where}: {path}/{name} has the shape {shape}; the model needs {needed}"
                )


def _mergeable(params: Tree) -> Tree:
    """The parameters without what no kernel can take, whose shapes merging does not check."""
    bottlenecks = {name for term in TERMS if term.merge is None for name in term.all_leaves}
    kept, _ = split(params, lambda path: path.rpartition("/")[2] not in {*bottlenecks, INVOCATION})
    return kept
