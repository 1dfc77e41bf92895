"""Hugging Face checkpoints: config.json, safetensors and the names in them, to our trees.

A leaf `layers/mlp/up_proj/kernel` `[L, in, out]` holds the tensors `model.layers.{i}.mlp.up_proj.weight`
`[out, in]` of all layers i. The logical path of one of them is `layers/{i}/mlp/up_proj/kernel`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.bitsandbytes import check_packing, unpacked
from lorax_ft.interop.families import FAMILIES
from lorax_ft.interop.families.family import describe_common
from lorax_ft.interop.lazy_tensor import FLOATS, KINDS, Index, LazyTensor, lazy_tensors
from lorax_ft.interop.tokenizer import import_transformers
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.decoder import Decoder
from lorax_ft.tree import Tree, flatten, unflatten

Tensors = Mapping[str, LazyTensor]
"""A checkpoint's tensors, by name."""
Names = Mapping[str, str]
"""A family's own names for parts of paths."""
Parts = Mapping[tuple[int, ...], LazyTensor]
"""The tensors of a leaf, by their index in its stack."""
Place = Callable[[str, tuple[int, ...], Callable[[Index], np.ndarray], Parts], Any]
"""Puts a leaf on its devices: (slash path, shape, function that reads a part of it, its tensors) -> array."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
READERS = 4  # tensors that are read at once
ALIGNMENT = 64  # bytes
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def read_folder(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """The config.json of a checkpoint without its quantization_config, and its tensors.

    Raises:
      ValueError: a file is missing or damaged, or the folder holds something else.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter, not a model; load its base model, then use load_peft"
        )
    config = read_json(folder / "config.json")
    packing = config.pop("quantization_config", None)
    decoder_config(
        config, source=str(folder)
    )  # an architecture that is not supported is said before a missing file
    if packing is not None:
        check_packing(packing, source=str(folder))
    kinds = FLOATS if packing is None else KINDS
    tensors = {
        name: t for file in _shards(folder) for name, t in lazy_tensors(file, kinds=kinds).items()
    }
    return config, tensors if packing is None else unpacked(tensors, source=str(folder))


def decoder_config(hf_config: Mapping[str, Any], *, source: str, **computing: Any) -> DecoderConfig:
    """The decoder that a config.json describes; `computing` holds its dtype, attention and remat.

    Raises:
      ValueError: the architecture or an option of it is not supported, or a value has another type.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{source} has the architecture {kind!r}; supported: {', '.join(FAMILIES)}"
        )
    try:
        config = (
            import_transformers().CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(hf_config)))
        )
        described = describe_common(config) | FAMILIES[kind].describe(config)
    except Exception as error:  # transformers' checks raise errors of several types
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: its config.json has {reason}") from error
    if described["heads"] % described["kv_heads"] or described["layers"] < 1:
        raise ValueError(
            f"{source}: its config.json has {described['layers']} layers, {described['heads']} heads and "
            f"{described['kv_heads']} key/value heads, which do not fit"
        )
    return DecoderConfig(**described, **computing)


def load_params(
    config: DecoderConfig, tensors: Tensors, *, names: Names, source: str, place: Place
) -> Tree:
    """The parameters of a decoder, read tensor by tensor, in the dtype of its config.

    Raises:
      ValueError: a tensor is missing, is one too many, or has another shape.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    wanted = {
        path: [(n, i, shape[len(i) :]) for n, i in hf_names(path, shape, names)]
        for path, shape in shapes.items()
    }
    flat = [entry for entries in wanted.values() for entry in entries]
    missing = sorted({name for name, _, _ in flat} - set(tensors))
    if missing:
        raise ValueError(f"{source} lacks the tensor {missing[0]}{and_more(missing)}")
    extra = sorted(
        name
        for name in tensors.keys() - {name for name, _, _ in flat}
        if not _ignored(name, config)
    )
    if extra:
        raise ValueError(
            f"{source} holds the tensor {extra[0]}{and_more(extra)}, which its architecture does not have"
        )
    params = {}
    for path, entries in wanted.items():
        for name, _, shape in entries:
            if tensors[name].shape != (shape[::-1] if path.endswith("/kernel") else shape):
                raise ValueError(
                    f"{source}: {name} has the shape {tensors[name].shape[::-1]}, not {shape} (in, out)"
                )
    for path, entries in wanted.items():
        parts = {index: tensors[name] for name, index, _ in entries}
        read = functools.partial(
            _read_leaf, parts, shapes[path], config.dtype, path.endswith("/kernel")
        )
        params[path] = place(path, shapes[path], read, parts)
    return unflatten(params)


def head_is_table(tensors: Tensors) -> bool:
    """Whether a checkpoint whose config ties the head has no other head; transformers unties where it has."""
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    return head is None or table is None or np.array_equal(head.read(()), table.read(()))


def _shards(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{folder / INDEX} holds no weight_map of file names")
    return [folder / shard for shard in sorted(set(weight_map.values()))]


def _read_leaf(
    parts: Parts, shape: tuple[int, ...], dtype: str, transposed: bool, index: Index
) -> np.ndarray:
    """The part of a leaf `[*stack, in, out]` in `index`, of whose stack each entry is a tensor."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    n = len(next(iter(parts)))
    inside = tuple(slice(r.start, r.stop) for r in ranges[n:])
    leaf = _aligned_empty([len(r) for r in ranges], np.dtype(dtype))

    def fill(place: tuple[int, ...]) -> None:
        part = parts[tuple(r[i] for r, i in zip(ranges, place, strict=False))]
        value = part.read(inside[::-1] if transposed else inside)
        leaf[place] = value.T if transposed else value

    with ThreadPoolExecutor(READERS) as pool:  # copies of arrays run side by side
        list(pool.map(fill, np.ndindex(*leaf.shape[:n])))
    return leaf


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that JAX takes on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def abstract_params(config: DecoderConfig, *, tied: bool | None = None) -> Tree:
    """The shapes of a decoder's parameters, as `jax.ShapeDtypeStruct`; `tied` overrides the config's."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    decoder = Decoder(dataclasses.replace(config, dtype="float32"))  # as parameters are by default
    params: Tree = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"]
    if not (config.tied if tied is None else tied):
        params = params | {
            "lm_head": {
                "kernel": jax.ShapeDtypeStruct((config.width, config.vocab_size), jnp.float32)
            }
        }
    return params


def hf_names(path: str, shape: tuple[int, ...], names: Names) -> Iterator[tuple[str, Any]]:
    """The checkpoint's tensors in the leaf at `path`, each with its index in the leaf.

    >>> list(hf_names("layers/mlp/up_proj/kernel", (2, 8, 16), {}))
    [('model.layers.0.mlp.up_proj.weight', (0,)), ('model.layers.1.mlp.up_proj.weight', (1,))]
    >>> list(hf_names("lm_head/kernel", (8, 32), {}))
    [('lm_head.weight', ())]
    """
    module, _, leaf = path.rpartition("/")
    for logical, index in unstacked(module, shape):
        yield f"{hf_module(logical, names)}.{LEAVES[leaf]}", index


def unstacked(path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The modules that the module at `path` stacks, each with its index; itself, where it stacks none.

    Args:
      path: of a module.
      shape: of one of its leaves: layers come first, then experts.

    >>> list(unstacked("layers/mlp/up_proj", (2, 8, 16)))
    [('layers/0/mlp/up_proj', (0,)), ('layers/1/mlp/up_proj', (1,))]
    >>> list(unstacked("layers/mlp/experts/up_proj", (1, 2, 8, 16)))
    [('layers/0/mlp/experts/0/up_proj', (0, 0)), ('layers/0/mlp/experts/1/up_proj', (0, 1))]
    """
    parts = path.split("/")
    stacks = [part for part in ("layers", "experts") if part in parts]
    for index in np.ndindex(*shape[: len(stacks)]):
        numbers = dict(zip(stacks, index, strict=True))
        yield (
            "/".join(f"{part}/{numbers[part]}" if part in numbers else part for part in parts),
            index,
        )


def hf_module(path: str, names: Names) -> str:
    """Hugging Face's name of the module at a logical path; `names` are the family's own for parts of it.

    >>> hf_module("layers/3/mlp/up_proj", {}), hf_module("layers/3/mlp/experts/0/up_proj", {"up_proj": "w3"})
    ('model.layers.3.mlp.up_proj', 'model.layers.3.mlp.experts.0.w3')
    """
    return (
        path
        if path == "lm_head"
        else ".".join(["model", *(names.get(part, part) for part in path.split("/"))])
    )


def family_names(hf_config: Mapping[str, Any]) -> Names:
    """The names of a checkpoint's family for parts of paths, where they are not ours."""
    kind = hf_config.get("model_type")
    return FAMILIES[kind].names if kind in FAMILIES else {}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a missing or malformed file is a `ValueError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} holds no {file.name}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _ignored(name: str, config: DecoderConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied)


def and_more(names: list[str]) -> str:
    """How many names stand behind the first, for an error."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
