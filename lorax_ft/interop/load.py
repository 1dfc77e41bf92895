"""Loading a model from wherever it is: a folder, a GGUF file, the hub."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from lorax_ft.config import ModelConfig, QuantConfig
from lorax_ft.interop.bitsandbytes import NF4Tensor
from lorax_ft.interop.gguf import read_gguf
from lorax_ft.interop.huggingface import (
    Parts,
    Tensors,
    decoder_config,
    family_names,
    head_is_table,
    load_params,
    read_folder,
    read_json,
)
from lorax_ft.interop.lazy_tensor import Index
from lorax_ft.interop.tokenizer import load_tokenizer
from lorax_ft.lowrank.requantize import Original
from lorax_ft.models.model import Model
from lorax_ft.quant.kernels import Format, Quantized, quantize
from lorax_ft.quant.stream import streamed
from lorax_ft.sharding import QUANTIZABLE

Shardings = Callable[[str, Any], Any]
"""Where a leaf goes: (slash path, its shapes) -> its sharding."""

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
HUB_DOUBLES = ("consolidated*", "original/*")  # the same weights again, in their makers' own form


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Literal["auto", "xla", "cudnn"] = "auto",
    remat: Literal["none", "dots", "mlp", "full"] = "full",
    quant: QuantConfig | None = None,
    shardings: Shardings | None = None,
) -> Model:
    """Loads a decoder with its parameters and tokenizer.

    Args:
      path: a Hugging Face folder, a .gguf file, or a hub id such as "HuggingFaceTB/SmolLM2-135M".
      revision: branch, tag or commit of a hub id.
      dtype: of the parameters and the activations.
      attention: the attention kernel; auto takes cuDNN on a GPU in bfloat16, causal blocks on a CPU, and XLA elsewhere.
      remat: what the backward pass recomputes.
      quant: in how many bits the kernels of linear layers are kept; they are quantized a matrix at a time. A checkpoint
        that bitsandbytes packed in NF4 is taken as it is.
      shardings: where leaves go, `(slash path, shapes) -> sharding`, of a quantized one that of each part; None: the
        default device.

    Raises:
      ValueError: nothing is there, or it is damaged or not supported.
    """
    ModelConfig(
        path=str(path), revision=revision, dtype=dtype, attention=attention, remat=remat
    )  # checks them
    if not isinstance(quant, QuantConfig | None):
        raise ValueError(
            f"quant is {quant!r}; give a QuantConfig, such as QuantConfig(format='nf4')"
        )
    location = _locate(path, revision)
    if location.suffix == ".gguf":
        hf_config, tensors, tokenizer = read_gguf(location)
    else:
        hf_config, tensors = read_folder(location)
        tokenizer = load_tokenizer(location)
    generation = location / "generation_config.json"
    source = str(path)
    config = decoder_config(hf_config, source=source, dtype=dtype, attention=attention, remat=remat)
    if config.tied and not head_is_table(tensors):
        config, hf_config = (
            dataclasses.replace(config, tied=False),
            {**hf_config, "tie_word_embeddings": False},
        )
    loader = Loader(dtype=dtype, quant=_to_do(quant, tensors, source), shardings=shardings or _here)
    params = load_params(
        config, tensors, names=family_names(hf_config), source=source, place=loader.place
    )
    return Model(
        config=config,
        params=params,
        originals=loader.originals,
        prequantized=any(isinstance(tensor, NF4Tensor) for tensor in tensors.values()),
        tokenizer=tokenizer,
        hf_config=hf_config,
        source=source,
        generation_config=read_json(generation) if generation.is_file() else {},
    )


class Loader:
    """Puts leaves on their devices, quantized where they are to be, and remembers how to read those again."""

    def __init__(self, *, dtype: str, quant: QuantConfig, shardings: Shardings) -> None:
        self._dtype, self._quant, self._shardings = dtype, quant, shardings
        self.originals: dict[str, Original] = {}

    def place(
        self, path: str, shape: tuple[int, ...], read: Callable[[Index], np.ndarray], parts: Parts
    ) -> Any:
        """The leaf at a slash path. What is packed in some matrices of a stack alone is dequantized."""
        abstract = jax.ShapeDtypeStruct(shape, self._dtype)
        packed = {index: part for index, part in parts.items() if isinstance(part, NF4Tensor)}
        whole = len(packed) < len(parts) and self._quant.format == "none"
        if whole or not re.fullmatch(QUANTIZABLE, path):
            on: Any = self._shardings(path, abstract)
            return jax.make_array_from_callback(shape, on, read)  # type: ignore[arg-type]
        format: Format = "int8" if self._quant.format == "int8" else "nf4"
        double_quant = (
            all(part.double_quant for part in packed.values()) if packed else self._quant.double
        )
        n_stack = len(shape) - 2

        def original(index: tuple[int, ...]) -> np.ndarray:
            inside = (slice(0, size) for size in shape[n_stack:])
            return read((*(slice(i, i + 1) for i in index), *inside)).reshape(shape[n_stack:])

        def matrix(index: tuple[int, ...]) -> Quantized:
            if packed:
                return packed[index].nf4(self._dtype)
            return quantize(
                jnp.asarray(original(index)),
                format=format,
                double_quant=double_quant,
                n_stack=0,
                n_in=1,
            )

        self.originals[path.removesuffix("/kernel")] = original
        like = jax.eval_shape(
            lambda w: quantize(
                w, format=format, double_quant=double_quant, n_stack=n_stack, n_in=1
            ),
            abstract,
        )
        return streamed(matrix, stack=shape[:n_stack], like=like, on=self._shardings(path, like))


def _to_do(quant: QuantConfig | None, tensors: Tensors, source: str) -> QuantConfig:
    """How kernels are to be quantized: not at all, where the checkpoint's are."""
    if not any(isinstance(tensor, NF4Tensor) for tensor in tensors.values()):
        return quant or QuantConfig()
    if quant and quant.format == "int8":
        raise ValueError(
            f"quant.format is int8, but {source} is in NF4 already; leave it out, and it stays as it is"
        )
    return QuantConfig()


def _here(path: str, leaf: Any) -> Any:
    """The default device."""
    return jax.tree.map(lambda part: SingleDeviceSharding(jax.devices()[0]), leaf)


def _locate(path: str | Path, revision: str | None) -> Path:
    """The folder or .gguf file at `path`, downloaded first if it is a hub id."""
    local = Path(path).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        files = [] if (local / "config.json").exists() else sorted(local.glob("*.gguf"))
        if files:
            raise ValueError(f"{path} holds no config.json, but {files[0].name}; give {files[0]}")
        return local
    if local.is_file():
        raise ValueError(
            f"{path} is a file but not a .gguf file; give a folder, a .gguf file or a hub id"
        )
    looks_local = (
        isinstance(path, Path)
        or local.suffix == ".gguf"
        or str(path)[:1] in "./~"
        or str(path).count("/") != 1
    )
    if looks_local or local.parent.is_dir():
        raise ValueError(f"no model at {path}{_nearest(local)}")
    return _download(str(path), revision)


def _nearest(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; there is no folder {missing.parent}"
    names = sorted(p.name for p in missing.parent.iterdir() if p.is_dir() or p.suffix == ".gguf")
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.3) or names[:3]
    return (
        f"; in {missing.parent} there is {', '.join(near)}"
        if near
        else f"; {missing.parent} holds no model"
    )


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=list(HUB_DOUBLES),
        )
        return Path(found)
    except Exception as error:  # connections, permissions, unknown ids: each has a type of its own
        tried = f"the hub id {hub_id}" + (f" at revision {revision}" if revision else "")
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            reason = (
                "the hub cannot be reached, and the cache does not have it; give a local folder"
            )
        raise ValueError(
            f"no folder at {hub_id}, and {tried} failed: {type(error).__name__}: {reason}"
        ) from error
