"""Models as GGUF files for llama.cpp, through the gguf package's writer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from lorax_ft.interop.folder import scratch_beside
from lorax_ft.interop.gguf_architectures import ARCHITECTURES, FIELDS, module_names, read_config
from lorax_ft.interop.gguf_rope import FACTORS, divisors, write_rope
from lorax_ft.interop.huggingface import LEAVES, decoder_config
from lorax_ft.interop.save_gguf_tokenizer import tokenizer_metadata
from lorax_ft.interop.tokenizer import import_transformers
from lorax_ft.lowrank.merge import merged_leaves
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import Model
from lorax_ft.models.rope import Rope
from lorax_ft.tree import Tree

WRITTEN = {architecture.kind: name for name, architecture in ARCHITECTURES.items()} | {
    "mistral": "llama"
}
"""The architectures that families are written as."""
COMPUTING = ("dtype", "attention", "remat")  # of a config: what no file holds
FAR = 10**9  # a position that no text reaches


def save_gguf(
    file: str | Path, params: Tree, model: Model, *, kind: Literal["F16", "Q8_0"] = "Q8_0"
) -> None:
    """Writes `params`, with their adapters merged, as one .gguf file with its tokenizer.

    Args:
      file: written beside and renamed.
      params: parameters, with or without adapters.
      model: gives sizes and tokenizer.
      kind: of the matrices; vectors and routers are float32.

    Raises:
      ValueError: llama.cpp has no form for the architecture or a property of it, or does not know the tokenizer.
      OSError: the disk is full, or may not be written.
    """
    import gguf

    given, file = file, Path(file).resolve()  # where a link leads
    if file == Path(model.source or " ").resolve():
        raise ValueError(f"{given} is where the model was loaded from; give another file")
    c = model.config
    if kind == "Q8_0" and any(size % 32 for size in (c.width, c.mlp_width, c.heads * c.head_dim)):
        raise ValueError(
            "Q8_0 takes rows of a multiple of 32, which this model's are not; write F16 (--gguf-type F16)"
        )
    metadata, factors = _described(model)
    metadata |= tokenizer_metadata(model, metadata)
    with scratch_beside(file, given=given) as scratch:
        new = scratch / file.name
        writer = gguf.GGUFWriter(new, metadata.pop("general.architecture"), use_temp_file=True)
        writer.add_name(model.source or "lorax_ft")
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, value in factors.items():
            writer.add_tensor(name, value)
        _add_tensors(writer, params, model, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        new.replace(file)


def _described(model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys and the rotary tensors of a model, which read again describe the same decoder.

    Raises:
      ValueError: they do not.
    """
    source, kind = model.source or "the model", model.hf_config.get("model_type", "")
    if kind not in WRITTEN:
        raise ValueError(
            f"{source} ({kind}) is not written as GGUF; supported: {', '.join(WRITTEN)}; "
            "write a folder instead (--target hf), which llama.cpp's own converter reads"
        )
    metadata, factors = _metadata(model)
    arrays: dict[str, Any] = factors | {
        "token_embd.weight": SimpleNamespace(shape=(model.config.vocab_size,))
    }
    arrays |= {} if model.config.tied else {"output.weight": None}
    modules = module_names(model.config).items()
    arrays |= {
        f"blk.0.{name}.bias": None
        for name, path in modules
        if path.rpartition("/")[2] in model.config.biases
    }
    again = decoder_config(read_config(metadata, arrays), source=source)
    lost = _difference(model.config, again)
    if lost is None and FACTORS in factors and metadata["general.architecture"] != "llama":
        lost = "layer_types"  # llama.cpp takes the tensor of Llamas only
    if lost:
        raise ValueError(
            f"{source} ({kind}) has {lost} = {getattr(model.config, lost)}, for which llama.cpp's "
            f"{metadata['general.architecture']} has no form; write a folder instead (--target hf)"
        )
    return metadata, factors


def _metadata(model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """GGUF's keys for what a model is, and the tensors that stand for its rotary embedding."""
    c, kind = model.config, model.hf_config["model_type"]
    architecture, name = ARCHITECTURES[WRITTEN[kind]], WRITTEN[kind].partition(" ")[0]
    hf = import_transformers().CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(model.hf_config)))
    keys: dict[str, Any] = {}
    for key, (field, type_) in {**FIELDS, **architecture.fields}.items():
        if (value := getattr(hf, field, None)) is not None:
            keys[key] = type_(value)
    keys |= {
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "vocab_size": c.vocab_size,
    }
    ropes = {layer_type.window: layer_type.rope for layer_type in c.layer_types if layer_type.rope}
    full = ropes.get(None) or next(iter(ropes.values()))
    rope_keys, factors = write_rope(full)
    keys |= rope_keys
    if architecture.local_theta:
        keys["rope.freq_base_swa"] = next(
            (rope.theta for window, rope in ropes.items() if window), full.theta
        )
    return {"general.architecture": name} | {
        f"{name}.{key}": value for key, value in keys.items()
    }, factors


def _difference(ours: DecoderConfig, again: DecoderConfig) -> str | None:
    """The first field in which two decoders differ, if any."""
    for field in dataclasses.fields(DecoderConfig):
        if field.name == "layer_types":
            layers = (
                c.layer_types * c.layers if len(c.layer_types) == 1 else c.layer_types
                for c in (ours, again)
            )
            if not all(
                a.window == b.window and _turn_alike(a.rope, b.rope)
                for a, b in zip(*layers, strict=True)
            ):
                return "layer_types"
        elif field.name not in COMPUTING and getattr(ours, field.name) != getattr(
            again, field.name
        ):
            return field.name
    return None


def _turn_alike(a: Rope | None, b: Rope | None) -> bool:
    """Whether two rotary embeddings are one, be it in other words: factors for what they follow from."""
    if a is None or b is None or not {a.scaling, b.scaling} <= {"llama3", "longrope"}:
        return a == b
    pairs = [(divisors(a, position=at), divisors(b, position=at)) for at in (0, FAR)]
    same = (a.dims, a.theta, a.magnitude) == (b.dims, b.theta, b.magnitude)
    return same and all(np.allclose(*pair, rtol=1e-4) for pair in pairs)


def _add(writer: Any, key: str, value: Any) -> None:
    """One key with a value in GGUF's type for it."""
    by_type = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    by_type.get(type(value), writer.add_array)(key, value)


def _add_tensors(writer: Any, params: Tree, model: Model, kind: str) -> None:
    """All tensors, the matrices packed.

    Raises:
      ValueError: one that llama.cpp does not know.
    """
    import gguf

    packed = gguf.GGMLQuantizationType[kind]
    may_have_head = (
        gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[writer.arch.upper()]]
    )
    for name, value in _tensors(params, model):
        if name == "output.weight" and not may_have_head:
            raise ValueError(
                f"the head is tuned, and llama.cpp's {writer.arch} has none beside the embedding table"
            )
        if (
            value.ndim == 1 or "ffn_gate_inp" in name
        ):  # a router's choices must not change by rounding
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, packed), raw_dtype=packed)


def _tensors(params: Tree, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors under llama.cpp's names and in its order of rows, in float32."""
    c = model.config
    theirs = {path: name for name, path in module_names(c).items()}
    interleaved = ARCHITECTURES[WRITTEN[model.hf_config["model_type"]]].interleaved
    heads = {"attn_q": c.heads, "attn_k": c.kv_heads} if interleaved else {}
    for path, leaf in merged_leaves(params, layout=model.layout):
        module, _, kind = path.removeprefix("layers/").rpartition("/")
        name, whole = theirs[module], np.asarray(leaf)
        parts = (
            {f"blk.{i}.": part for i, part in enumerate(whole)}
            if path.startswith("layers/")
            else {"": whole}
        )
        for block, part in parts.items():
            value = np.asarray(part, np.float32)
            value = value.swapaxes(-1, -2) if kind == "kernel" else value
            if count := heads.get(name):
                value = (
                    value.reshape(count, 2, -1, *value.shape[1:])
                    .swapaxes(1, 2)
                    .reshape(value.shape)
                )
            value = value + np.float32(c.norm_offset) if name.endswith("norm") else value
            yield f"{block}{name}.{LEAVES[kind]}", np.ascontiguousarray(value)
