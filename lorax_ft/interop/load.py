"""Loading a model from wherever it is: a folder, a GGUF file, the hub."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Literal

from lorax_ft.interop.gguf import read_gguf
from lorax_ft.interop.huggingface import (
    Place,
    decoder_config,
    family_names,
    head_is_table,
    load_params,
    read_folder,
    read_json,
)
from lorax_ft.interop.tokenizer import load_tokenizer
from lorax_ft.models.model import Model

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Literal["auto", "xla", "cudnn"] = "auto",
    remat: Literal["none", "dots", "mlp", "full"] = "full",
    place: Place | None = None,
) -> Model:
    """Loads a decoder with its parameters and tokenizer.

    Args:
      path: a Hugging Face folder, a .gguf file, or a hub id such as "HuggingFaceTB/SmolLM2-135M".
      revision: branch, tag or commit of a hub id.
      dtype: of the parameters and the activations.
      attention: the attention kernel; auto takes cuDNN on a GPU in bfloat16, causal blocks on a CPU, and XLA elsewhere.
      remat: what the backward pass recomputes.
      place: puts each leaf on its devices, `(slash path, shape, read) -> jax.Array`; `read(slices)` gives a part of it.

    Raises:
      ValueError: nothing is there, or it is damaged or not supported.
    """
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
        config, hf_config = dataclasses.replace(config, tied=False), {**hf_config, "tie_word_embeddings": False}
    params = load_params(config, tensors, names=family_names(hf_config), source=source, place=place)
    return Model(
        config=config,
        params=params,
        tokenizer=tokenizer,
        hf_config=hf_config,
        source=source,
        generation_config=read_json(generation) if generation.is_file() else {},
    )


def _locate(path: str | Path, revision: str | None) -> Path:
    """The folder or .gguf file at `path`, downloaded first if it is a hub id."""
    local = Path(path).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.is_file():
        raise ValueError(f"{path} is a file but not a .gguf file; give a folder, a .gguf file or a hub id")
    looks_local = (
        isinstance(path, Path) or local.suffix == ".gguf" or str(path)[:1] in "./~" or str(path).count("/") != 1
    )
    if looks_local or local.parent.is_dir():
        raise ValueError(f"no model at {path}{_nearest(local)}")
    return _download(str(path), revision)


def _nearest(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; there is no folder {missing.parent}"
    names = sorted(p.name for p in missing.parent.iterdir() if p.is_dir() or p.suffix == ".gguf")
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.3) or names[:3]
    return f"; in {missing.parent} there is {', '.join(near)}" if near else f"; {missing.parent} holds no model"


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # connections, permissions, unknown ids: each has a type of its own
        tried = f"the hub id {hub_id}" + (f" at revision {revision}" if revision else "")
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no folder at {hub_id}, and {tried} failed: {type(error).__name__}: {reason}") from error
