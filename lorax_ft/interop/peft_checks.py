"""What a PEFT folder must be, to be loaded on a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_ft.files import existing_folder, read_json, within
from lorax_ft.interop.adapter_folder import WEIGHTS as OWN_WEIGHTS
from lorax_ft.interop.peft_config import BIN, CONFIG, WEIGHTS, check_fields, without_tensors
from lorax_ft.interop.peft_methods import method_of_config
from lorax_ft.interop.peft_names import Place
from lorax_ft.interop.peft_prompts import check_prompt_config, holds_soft_prompt
from lorax_ft.interop.peft_tensors import FIELD, Entry
from lorax_ft.interop.peft_tokens import trains_tokens_alone
from lorax_ft.models.model import LoadedModel, Model, abstract_params
from lorax_ft.schema import leaf_schema
from lorax_ft.tree import Layer, Tree, modules

BASE = "nf4_base"  # the folder beside a run's adapter with its base, if no other checkpoint is it
OTHER_MODELS = "save_adapter writes adapters of any Flax model, and load_adapter reads them"


def check_decoder(model: Any, function: str) -> None:
    """Raise where the model is not one of this library's, whose modules PEFT knows by name."""
    if not isinstance(model, Model):
        raise ValueError(
            f"{function} is for the decoders that load_model returns, whose modules PEFT knows, "
            f"and the model is a {type(model).__name__}; {OTHER_MODELS}"
        )


def check_modules(params: Tree, model: Model) -> None:
    """Raise where the parameters are not those of the model, such as of one from `from_nnx`."""
    own = model.params if isinstance(model, LoadedModel) else abstract_params(model.config)
    known = {"", *modules(own), *model.layout, *model.layout.blocks}
    for path in modules(params):
        if path not in known:
            raise ValueError(
                f"{path} is no module of {model.source or 'the model'}, so PEFT has no name for "
                f"it; {OTHER_MODELS}"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
      ValueError: it is missing, the weights are only there as a pickle, its type is not supported,
        or it has an option that changes numbers and is not supported.
    """
    existing_folder(folder, holding=CONFIG)
    if (folder / OWN_WEIGHTS).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is what save_adapter wrote; load it by load_adapter")
    if (folder / BIN).is_file() and not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds an adapter as {BIN}, a pickle that could run code and is not read; "
            f"load it in PEFT and save it again, which writes {WEIGHTS}"
        )
    in_run = folder / "adapter"
    if (in_run / CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is the output folder of a run; its adapter is in {in_run}")
    config = read_json(within(folder, CONFIG))
    within(folder, WEIGHTS)
    check_fields(config, folder)
    if holds_soft_prompt(config):
        check_prompt_config(config, folder)
    elif not trains_tokens_alone(config):
        method_of_config(config, folder).check_config(config, folder)
    return config


def check_base(config: Mapping[str, Any], folder: Path, model: Model) -> None:
    """Raise where the adapter is for a base without its start and the model is not that base.

    Likewise where the model is such a base, and the adapter is for another.
    """
    # PEFT allows null here.
    named = Path(config.get("base_model_name_or_path") or "")
    source = Path(model.source).resolve()
    beside_folder = folder.resolve().parent / BASE
    is_own_base = source in (named.resolve(), beside_folder)
    if model.without_start and not is_own_base:
        raise ValueError(
            f"{model.source} is the base of another adapter, without its start; {folder} was "
            f"trained on {named}: load that"
        )
    if named.name == BASE and not (is_own_base and model.without_start):
        raise ValueError(f"{folder} was trained on {named}, not on {model.source}; load {named}")


def check_adaptable(entry: Entry, layer: Layer, *, where: Path) -> None:
    """Raise where a tensor belongs to a norm, or has the wrong number of axes."""
    if "scale" in layer:
        raise ValueError(f"{where}: {entry.key} adapts a norm, which is not supported")
    # Magnitudes are vectors; PEFT has a vector of IA3 as a matrix with one row or column.
    is_vector = len(leaf_schema(entry.leaf).axes) == 2
    if entry.value.ndim != 2 and not is_vector:
        raise ValueError(
            f"{where}: {entry.key} has the shape {entry.value.shape}; it must be a matrix"
        )


def check_complete(
    config: Mapping[str, Any],
    targets: Mapping[Place, Entry],
    known: Mapping[str, Place],
    folder: Path,
) -> None:
    """Raise where the folder lacks tensors of its targets, or has no tensors at all."""
    with_tensors = [entry.target for entry in targets.values()]
    missing = without_tensors(config, with_tensors, known)
    if missing:
        raise ValueError(
            f"{folder}: {CONFIG} targets {missing[0]}, but {WEIGHTS} holds no tensor for it; is it "
            "another model's?"
        )
    if not targets and not config.get(FIELD):
        raise ValueError(f"{folder}: {WEIGHTS} holds no adapter")
