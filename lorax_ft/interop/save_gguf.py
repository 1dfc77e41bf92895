"""Write models as GGUF files for llama.cpp, with the gguf package's writer."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from lorax_ft.interop.folder import scratch_beside
from lorax_ft.interop.gguf_architectures import (
    ARCHITECTURES,
    FIELDS,
    Architecture,
    read_config,
)
from lorax_ft.interop.gguf_modules import module_names
from lorax_ft.interop.gguf_rope import FACTORS, divisors, write_rope
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.save_gguf_tensors import add_tensors
from lorax_ft.interop.save_gguf_tokenizer import tokenizer_metadata
from lorax_ft.interop.tokenizer import import_transformers
from lorax_ft.models.config import DecoderConfig, LayerType
from lorax_ft.models.model import Model
from lorax_ft.models.rope import Rope
from lorax_ft.tree import Tree

ARCHITECTURE_OF = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
"""Keys of `ARCHITECTURES` by the `model_type` of config.json."""
ARCHITECTURE_OF["mistral"] = "llama"  # llama.cpp has no architecture of its own for it
COMPUTING = ("dtype", "attention", "remat")  # fields of a config that no file holds
FAR = 10**9  # a position beyond every text's end, where longrope's long factors apply


def save_gguf(
    file: str | Path,
    params: Tree,
    model: Model,
    *,
    kind: Literal["F16", "Q8_0"] = "Q8_0",
) -> None:
    """Writes `params`, with their adapters merged, as one .gguf file that includes the tokenizer.

    Args:
      file: the place; the file is written next to it and then renamed.
      params: parameters, with or without adapters.
      model: provides sizes and tokenizer.
      kind: GGML type of the matrices; vectors and routers are float32.

    Raises:
      ValueError: llama.cpp does not support the architecture, one of its properties or the
        tokenizer.
      OSError: the disk is full, or the place is not writable.
    """
    import gguf

    given = file
    file = Path(file).resolve()  # a link stays, and its target is replaced
    if model.source and file == Path(model.source).resolve():
        raise ValueError(f"{given} is where the model was loaded from; give another file")
    _check_block_size(model.config, kind)
    metadata, factors = _metadata(model)
    metadata |= tokenizer_metadata(model, metadata)
    architecture = metadata.pop("general.architecture")
    with scratch_beside(file, given=given) as scratch:
        new = scratch / file.name
        # The tensors wait in a temporary file, not in memory.
        writer = gguf.GGUFWriter(new, architecture, use_temp_file=True)
        writer.add_name(model.source or "lorax_ft")
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, value in factors.items():
            writer.add_tensor(name, value)
        interleaved = ARCHITECTURES[ARCHITECTURE_OF[model.hf_config["model_type"]]].interleaved
        add_tensors(writer, params, model, kind=kind, interleaved=interleaved)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        new.replace(file)


def _check_block_size(config: DecoderConfig, kind: str) -> None:
    """Raises if the rows of a matrix are not whole blocks; Q8_0 has one scale for 32 values."""
    row_sizes = [config.width, config.mlp_width]
    for layer in set(config.each_layer):
        if layer.linear:
            row_sizes.append(layer.linear.value_heads * layer.linear.value_dim)
        else:
            row_sizes.append(config.heads * config.heads_of(layer).dim)
    if kind == "Q8_0" and any(size % 32 for size in row_sizes):
        raise ValueError(
            "Q8_0 needs matrix rows of a multiple of 32 values, but this model has "
            f"{', '.join(map(str, row_sizes))}; "
            "write F16 (--gguf-type F16)"
        )


def _metadata(model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the model's keys and rotary tensors, after reading them back to check them.

    Raises:
      ValueError: the keys describe another decoder than the model's.
    """
    source = model.source or "the model"
    model_type = model.hf_config.get("model_type", "")
    if model_type not in ARCHITECTURE_OF:
        supported = ", ".join(ARCHITECTURE_OF)
        raise ValueError(
            f"{source} ({model_type}) cannot be written as GGUF; supported: {supported}; "
            "write a folder instead (--target hf), which llama.cpp's own converter reads"
        )
    key_of_ours = ARCHITECTURE_OF[model_type]
    # " with experts" is this library's addition; llama.cpp's name ends before it.
    name, _, _ = key_of_ours.partition(" ")
    try:
        keys, factors = _keys(model, ARCHITECTURES[key_of_ours])
    except ValueError as error:
        raise ValueError(
            f"{source} ({model_type}) {error}; write a folder instead (--target hf)"
        ) from error
    metadata = {"general.architecture": name}
    for key, value in keys.items():
        metadata[f"{name}.{key}"] = value
    # What is read back must be the same decoder, so that no property is lost without a word.
    tensors = factors | _stand_ins(model.config)
    again = decoder_config(read_config(metadata, tensors), source=source)
    lost = _difference(model.config, again)
    # A file may have this tensor for any architecture, but llama.cpp loads it for these only.
    if lost is None and FACTORS in factors and name not in ("llama", "gemma4"):
        lost = "layer_types"
    if lost:
        raise ValueError(
            f"{source} ({model_type}) has {lost} = {getattr(model.config, lost)}, which "
            f"llama.cpp's {name} does not support; write a folder instead (--target hf)"
        )
    return metadata, factors


def _keys(model: Model, architecture: Architecture) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns GGUF's keys, without the architecture's prefix, and the rotary tensors."""
    config = model.config
    # transformers' class supplies the defaults that config.json leaves out.
    hf_class = import_transformers().CONFIG_MAPPING[model.hf_config["model_type"]]
    # `from_dict` may change the dicts that it is given.
    hf = hf_class.from_dict(copy.deepcopy(dict(model.hf_config)))
    # Where layers differ in a value, such as head_dim, the config's own is read, too.
    hf.allow_global_per_layer_attribute_access = True
    keys: dict[str, Any] = {}
    fields = {**FIELDS, **architecture.fields}
    for key, (field, type_) in fields.items():
        value = getattr(hf, field, None)
        if value is not None:
            keys[key] = type_(value)
    keys["attention.key_length"] = config.head_dim
    keys["attention.value_length"] = config.head_dim
    keys["vocab_size"] = config.vocab_size
    # GGUF has one rotary embedding for all layers, except for Gemma 3's base in layers with a
    # window; `_metadata` refuses the models for which that is not enough.
    ropes = {kind.window: kind.rope for kind in config.layer_types if kind.rope}
    # Of the layers without a window, where there are some.
    main_rope = ropes.get(None) or next(iter(ropes.values()))
    rope_keys, factors = write_rope(main_rope)
    keys |= rope_keys
    if architecture.local_theta:
        windowed = [rope.theta for window, rope in ropes.items() if window]
        keys["rope.freq_base_swa"] = next(iter(windowed), main_rope.theta)
    if architecture.write:
        own_keys, own_tensors = architecture.write(config, hf)
        keys |= own_keys
        factors |= own_tensors
    return keys, factors


def _stand_ins(config: DecoderConfig) -> dict[str, Any]:
    """Returns placeholders for those tensors whose presence or shape `read_config` looks at."""
    table = SimpleNamespace(shape=(config.vocab_size,))
    tensors: dict[str, Any] = {"token_embd.weight": table}
    if not config.tied:
        tensors["output.weight"] = None
    for layer, layer_type in enumerate(config.each_layer):
        if not layer_type.linear and not config.heads_of(layer_type).keys_are_values:
            tensors[f"blk.{layer}.attn_v.weight"] = None
    for name, path in module_names(config).items():
        _, _, module = path.rpartition("/")
        if module in config.biases:
            tensors[f"blk.0.{name}.bias"] = None
    return tensors


def _difference(ours: DecoderConfig, again: DecoderConfig) -> str | None:
    """Returns the first field in which two decoders differ, or None."""
    for field in dataclasses.fields(DecoderConfig):
        name = field.name
        if name in COMPUTING:
            continue
        if name == "layer_types":
            same = _same_layers(ours, again)
        else:
            same = getattr(ours, name) == getattr(again, name)
        if not same:
            return name
    return None


def _same_layers(ours: DecoderConfig, again: DecoderConfig) -> bool:
    """Whether all layers of two decoders have the same window and rotary embedding."""
    for a, b in zip(_every_layer(ours), _every_layer(again), strict=True):
        if a.window != b.window or not _same_rope(a.rope, b.rope):
            return False
    return True


def _every_layer(config: DecoderConfig) -> tuple[LayerType, ...]:
    """The type of each layer; in a config, one entry may stand for all of them."""
    if len(config.layer_types) == 1:
        return config.layer_types * config.layers
    return config.layer_types


def _same_rope(a: Rope | None, b: Rope | None) -> bool:
    """Whether two rotary embeddings compute the same.

    Files store llama3 as the divisors that follow from its parameters, and reading them may give
    longrope with these divisors. So these two are compared by what they compute.
    """
    if a is None or b is None:
        return a == b
    if not {a.scaling, b.scaling} <= {"llama3", "longrope"}:
        return a == b
    if (a.dims, a.theta, a.magnitude) != (b.dims, b.theta, b.magnitude):
        return False
    # longrope has one set of divisors for short texts and another for long ones.
    for position in (0, FAR):
        first = divisors(a, position=position)
        second = divisors(b, position=position)
        if not np.allclose(first, second, rtol=1e-4):
            return False
    return True


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds a key with the GGUF type that fits the value's Python type."""
    by_type = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    # Not isinstance: a bool is an int too.
    add = by_type.get(type(value), writer.add_array)
    add(key, value)
