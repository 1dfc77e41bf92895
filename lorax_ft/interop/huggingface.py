"""Hugging Face checkpoints: their files, the decoder they describe, and the names of its tensors.

A leaf `layers/mlp/up_proj/kernel` `[L, in, out]` stacks the tensors
`model.layers.{i}.mlp.up_proj.weight` `[out, in]` of all layers i. The logical path of one of them
is `layers/{i}/mlp/up_proj/kernel`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.files import read_json, within
from lorax_ft.interop.bitsandbytes import assemble_nf4, check_quantization_config
from lorax_ft.interop.config_sizes import check_counts, check_sizes
from lorax_ft.interop.families import FAMILIES
from lorax_ft.interop.families.family import describe_common, rotating_whole_heads, without_ignored
from lorax_ft.interop.lazy_tensor import (
    FLOATS,
    FLOATS_AND_BYTES,
    LazyTensor,
    Tensors,
    lazy_tensors,
)
from lorax_ft.interop.mxfp4 import assemble_mxfp4
from lorax_ft.interop.text_part import text_config, text_tensors
from lorax_ft.interop.tokenizer import import_transformers
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import PART_OF
from lorax_ft.program import command, either
from lorax_ft.tree import Shape, with_layer_numbers

Names = Mapping[str, str]
"""Our name of a path component -> the name in a family's checkpoints, where the two differ."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
"""Our leaf -> the end of its tensor's name; a leaf that is not here has its own name."""


def read_folder(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Reads a checkpoint's config.json, without its quantization_config, and its tensors.

    Of a checkpoint that holds other parts, such as a vision tower, they are those of the text part.

    Raises:
      ValueError: a file is missing or damaged, or the folder holds something else.
    """
    is_adapter = any(folder.glob("adapter_*"))
    if is_adapter and not (folder / "config.json").is_file():
        way = either(
            "adapter.continue_from or load_peft",
            "--adapter.continue_from to train it, or --adapter to use it",
        )
        raise ValueError(
            f"{folder} holds an adapter, not a model; give its base model, and the adapter with "
            f"{way}"
        )
    config = text_config(read_json(within(folder, "config.json")))
    quantization = config.pop("quantization_config", None)
    # Before the weights: an unsupported architecture is the more useful error than a missing file.
    decoder_config(config, source=str(folder))
    dtypes = FLOATS
    is_mxfp4 = isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
    if quantization is not None:
        if not is_mxfp4:
            check_quantization_config(quantization, source=str(folder))
        dtypes = FLOATS_AND_BYTES
    tensors: dict[str, LazyTensor] = {}
    for file in _shards(folder):
        tensors |= lazy_tensors(file, dtypes=dtypes)
    if is_mxfp4:
        tensors = assemble_mxfp4(tensors, source=str(folder))
    elif quantization is not None:
        tensors = assemble_nf4(tensors, source=str(folder))
    if PART_OF in config:
        return config, text_tensors(tensors)
    return config, tensors


def _shards(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors."""
    if (folder / WEIGHTS).is_file():
        return [within(folder, WEIGHTS)]
    index = within(folder, INDEX)
    if not index.is_file():
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    shards = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ValueError(
                f"{index} maps {name[:80]} to {repr(shard)[:80]}, which is not a file name"
            )
        shards.add(within(folder, shard))
    return sorted(shards)


def decoder_config(hf_config: Mapping[str, Any], *, source: str, **computing: Any) -> DecoderConfig:
    """Returns the config of the decoder that a config.json describes.

    Args:
      hf_config: the content of config.json.
      source: where it comes from, for errors.
      computing: fields that config.json does not have: dtype, attention and remat.

    Raises:
      ValueError: the architecture or one of its options is not supported, or a value has the wrong
        type.
    """
    model_type = hf_config.get("model_type")
    if {"model", "adapter", "train"} <= set(hf_config):
        raise ValueError(
            f"{source} is the output folder of a training run, not a model; give the run's base "
            f"model, or export the run with {command('export')} --target hf"
        )
    if model_type is None:
        raise ValueError(f"{source}: its config.json has no model_type; it describes no model")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{source} has the architecture {repr(model_type)[:80]}; supported: {known}"
        )
    check_counts(hf_config, source)
    family = FAMILIES[model_type]
    try:
        # A deep copy, because from_dict may change nested values in place.
        values = copy.deepcopy(without_ignored(hf_config, family))
        config_class = import_transformers().CONFIG_MAPPING[model_type]
        config = config_class.from_dict(values)
        # Where layers differ in a value, such as head_dim, the config's own is read, too.
        config.allow_global_per_layer_attribute_access = True
        # Models do so once more, and then heed an original_max_position_embeddings beside the rope.
        config.standardize_rope_params()
        if not family.partial_rotary:
            config.rope_parameters = rotating_whole_heads(config.rope_parameters)
        fields = describe_common(config)
        fields |= family.describe(config)
    except Exception as error:  # transformers validates with exceptions of several types
        reason = " ".join(str(error).split())[:500]  # it may repeat a value of the file
        raise ValueError(f"{source}: its config.json has {reason}") from error
    decoder = DecoderConfig(**fields, **computing)
    check_sizes(decoder, source)
    if decoder.heads % decoder.kv_heads:
        raise ValueError(
            f"{source}: its config.json has {decoder.layers} layers, {decoder.heads} heads and "
            f"{decoder.kv_heads} key/value heads, which do not fit"
        )
    return decoder


def hf_names(path: str, shape: Shape, names: Names) -> Iterator[tuple[str, Any]]:
    """Yields the names of the tensors that the leaf at `path` stacks, each with its index there.

    >>> list(hf_names("layers/mlp/up_proj/kernel", (2, 8, 16), {}))
    [('model.layers.0.mlp.up_proj.weight', (0,)), ('model.layers.1.mlp.up_proj.weight', (1,))]
    >>> list(hf_names("lm_head/kernel", (8, 32), {}))
    [('lm_head.weight', ())]
    """
    module, _, leaf = path.rpartition("/")
    suffix = LEAVES.get(leaf, leaf)
    for logical, index in unstacked(module, shape):
        hf_path = hf_module(logical, names)
        yield f"{hf_path}.{suffix}", index


def hf_tensors(path: str, leaf: np.ndarray, names: Names) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a leaf under the checkpoint's names, in PyTorch's `[out, in]`."""
    for name, index in hf_names(path, leaf.shape, names):
        tensor = leaf[index]
        if path.endswith("/kernel"):
            tensor = tensor.T
        yield name, tensor


def unstacked(path: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Yields the logical paths of the modules that a module stacks, each with its index.

    A module that stacks none yields its own path, with the index ().

    Args:
      path: of a module.
      shape: of one of its leaves; stack axes come first: layers, then experts.

    >>> list(unstacked("layers/mlp/up_proj", (2, 8, 16)))
    [('layers/0/mlp/up_proj', (0,)), ('layers/1/mlp/up_proj', (1,))]
    >>> list(unstacked("layers/1_of_2/mlp/up_proj", (2, 8, 16)))
    [('layers/1/mlp/up_proj', (0,)), ('layers/3/mlp/up_proj', (1,))]
    >>> list(unstacked("layers/mlp/experts/up_proj", (1, 2, 8, 16)))
    [('layers/0/mlp/experts/0/up_proj', (0, 0)), ('layers/0/mlp/experts/1/up_proj', (0, 1))]
    """
    components = path.split("/")
    stacks = [name for name in ("layers", "experts") if name in components]
    for index in np.ndindex(*shape[: len(stacks)]):
        numbers = dict(zip(stacks, index, strict=True))
        logical = []
        for name in components:
            logical.append(name)
            if name in numbers:
                logical.append(str(numbers[name]))
        yield with_layer_numbers("/".join(logical)), index


def hf_module(path: str, names: Names, *, place: str = "model") -> str:
    """Hugging Face's name of the module at a logical path; `names` are the family's own.

    `place` is where the decoder lies: "model.language_model" beside a vision tower.

    >>> hf_module("layers/3/mlp/up_proj", {})
    'model.layers.3.mlp.up_proj'
    >>> hf_module("layers/3/mlp/experts/0/up_proj", {"up_proj": "w3"})
    'model.layers.3.mlp.experts.0.w3'
    """
    # The head belongs to the causal language model, everything else to the model inside it.
    if path == "lm_head":
        return path
    components = [names.get(name, name) for name in path.split("/")]
    return ".".join([place, *components])


def family_names(hf_config: Mapping[str, Any]) -> Names:
    """The names that a checkpoint's family has for path components, where they differ from ours."""
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        return {}
    family = FAMILIES[model_type]
    return family.names


def stacks_experts(hf_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this family holds the experts of a layer in one tensor."""
    family = FAMILIES.get(str(hf_config.get("model_type")))
    return family is not None and family.stacks_experts
