"""Adapters of any Flax model, written and read: a folder with a safetensors file of their leaves.

PEFT loads the adapters of `save_peft`, which are on modules that PyTorch has too. These are on
paths of a parameter tree: `blocks/attention/query/lora_a`.
"""

from __future__ import annotations

import dataclasses
import difflib
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
from lorax_ft.files import existing_folder, names_in, within
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.lazy_tensor import FLOATS_AND_INDICES, all_finite, lazy_tensors
from lorax_ft.interop.leaf_checks import ANOTHER_MODEL, check_leaves, check_numbers
from lorax_ft.interop.peft_config import CONFIG as PEFT_CONFIG
from lorax_ft.lowrank.activation import INVOCATION, check_activated
from lorax_ft.lowrank.adapters import attach_adapters
from lorax_ft.lowrank.groups import partition
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.requantize import Original
from lorax_ft.lowrank.watch import check_tree
from lorax_ft.schema import is_adapter
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import Tree, combine, flatten, unflatten

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
    check_tree(params, name="save_adapter")
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
      folder: what `save_adapter` wrote, on a disk.
      base: the parameters that the adapters were made for, as they were loaded.
      layout: the layers of the model.
      originals: as in `add_adapters`, if the base is quantized and the init changed it.

    Raises:
      ValueError: there is no such folder, or it is damaged, or does not fit the base.
    """
    check_tree(base, name="load_adapter")
    file = _weights(folder)
    own = flatten(nn.meta.unbox(base))
    if adapted := next(filter(is_adapter, own), None):
        raise ValueError(f"the base has {adapted} already; give the parameters as they were loaded")
    leaves = {}
    for path, tensor in lazy_tensors(file, dtypes=FLOATS_AND_INDICES).items():
        leaf = tensor.read(())
        # As JAX does, in which a large float64 becomes infinite.
        with np.errstate(over="ignore"):
            leaves[path] = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    whole = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    for path, leaf in whole.items():
        _check_whole(path, leaf, own, where=file)
    adapters = {path: leaf for path, leaf in leaves.items() if is_adapter(path)}
    if not leaves:
        raise ValueError(f"{file} holds no adapter")
    loaded = {**own, **jax.tree.map(jnp.asarray, whole)}
    check_leaves(combine(loaded, adapters), layout=layout, where=file)
    params = attach_adapters(
        unflatten(loaded),
        unflatten(jax.tree.map(jnp.asarray, adapters)),
        layout=layout,
        originals=originals,
    )
    if INVOCATION in params:
        check_activated(params)
    return params


def _weights(folder: str | Path) -> Path:
    """The file of the leaves in a folder.

    Raises:
      ValueError: there is no such folder or file.
    """
    found = existing_folder(folder, holding=WEIGHTS)
    file = within(found, WEIGHTS)
    if file.exists():
        return file
    if (found / PEFT_CONFIG).is_file():
        raise ValueError(f"{found} is a folder of PEFT's, without {WEIGHTS}; load it by load_peft")
    raise ValueError(
        f"{found} holds no {WEIGHTS}, but {names_in(found)}; give the folder that save_adapter "
        "wrote"
    )


def _check_whole(path: str, leaf: np.ndarray, base: Mapping[str, Any], *, where: Path) -> None:
    """Raise where a weight that trained in full is not one of the base."""
    if path not in base:
        near = difflib.get_close_matches(path, base, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"{where}: {path} is not there in the model{hint}")
    shape = base[path].shape
    if leaf.shape != shape:
        raise ValueError(
            f"{where}: {path} has the shape {leaf.shape}, and the model's has {shape}: "
            f"{ANOTHER_MODEL}"
        )
    # A model of one's own may have a parameter without elements, or a mask of infinities. The base,
    # which can be large, is looked at only where the leaf is such a mask.
    is_empty = not leaf.size
    if is_empty or (not all_finite(leaf) and not jnp.isfinite(base[path]).all()):
        return
    check_numbers(leaf, path, base[path].dtype, where=where)
