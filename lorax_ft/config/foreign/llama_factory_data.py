"""What LLaMA-Factory's keys of the data mean where several of them mean something together."""

from __future__ import annotations

from lorax_ft.config.foreign.dataset_info import Described, common_fields, describe
from lorax_ft.config.foreign.llama_factory_templates import FORMATS
from lorax_ft.config.foreign.rules import Keys, Options, closest, shown


def training_data(keys: Keys) -> Options:
    """The training data, and how its rows are read."""
    names = keys.read("dataset", "names")
    if not names:
        raise keys.error("dataset", "dataset is missing; add it, or give --data.train")
    train = _described(keys, "dataset")
    validation = [] if "data.validation" in keys.overridden else _described(keys, "eval_dataset")
    shapes = {one.shape for one in (*train, *validation)}
    return {
        "data.train": tuple(one.source for one in train),
        "data.split": _one_split(train, keys, "data.split"),
        "data.shape": shapes.pop() if len(shapes) == 1 else "auto",
        "data.fields": common_fields((*train, *validation), keys),
    }


def validation_data(keys: Keys) -> Options:
    """The validation data: sets of its own, or a part of the training rows."""
    sets = _described(keys, "eval_dataset")
    size = keys.read("val_size", "number", 0, unless="data.validation_rows")
    if sets and size:
        raise keys.error("val_size", "val_size and eval_dataset exclude each other; give one")
    if sets:
        apart = keys.read("eval_on_each_dataset", "flag", False)
        paths = tuple(f"{one.name}={one.source}" if apart else one.source for one in sets)
        return {
            "data.validation": paths,
            "data.validation_split": _one_split(sets, keys, "data.validation_split"),
            "data.validation_rows": 0,
        }
    if size >= 1:
        size = int(size)
        keys.note("val_size", f"data.validation_rows {size}, at most a tenth of the rows")
    return {"data.validation_rows": size}


def _one_split(datasets: list[Described], keys: Keys, option: str) -> str:
    """The split of all of these datasets, unless an option says it."""
    key, splits = datasets[0].key, {one.split for one in datasets}
    if len(splits) > 1 and option not in keys.overridden:
        raise keys.error(
            key,
            f"{key}: one split for all of them, not {' and '.join(sorted(splits))}; "
            f"--{option} names one",
        )
    return splits.pop()


def _described(keys: Keys, key: str) -> list[Described]:
    """The datasets that a key names."""
    names = keys.read(key, "names", ())
    folder = keys.read("dataset_dir", "text", "data")
    return describe(names, folder, keys, key=key, most=keys.read("max_samples", "count"))


def loss_on(keys: Keys) -> Options:
    """What counts in the loss."""
    if keys.read("train_on_prompt", "flag", False):
        return {"data.loss_on": "all"}
    if keys.read("mask_history", "flag", False):
        return {"data.loss_on": "last"}
    return {}


def packing(keys: Keys) -> Options:
    """Several samples in a row."""
    packs = keys.read("packing", "flag", False)
    apart = keys.read("neat_packing", "flag", False)
    if packs and not apart:
        keys.note("packing", "data.pack, where samples do not attend to one another (neat_packing)")
    return {"data.pack": packs or apart}


def template(keys: Keys) -> Options:
    """The chat template, by its name there; with it, whether empty thoughts count in the loss."""
    name = keys.read("template", "text")
    if name is None:
        return {}
    if name not in FORMATS:
        keys.note(
            "template",
            f"{shown(name)} is unknown here, so the tokenizer's own is used (model.chat_template)"
            f"{closest(name, FORMATS)}",
        )
        return {}
    options = {"model.chat_template": name}
    if FORMATS[name].thinks and keys.read("enable_thinking", "flag", True):
        options["data.reasoning_loss"] = "all"
    return options


def thinking(keys: Keys) -> Options:
    """The variable that switches a reasoning model's thoughts."""
    value = keys.read("enable_thinking", "flag")
    return {} if value is None else {"data.template_args": (f"enable_thinking={value}".lower(),)}
