"""The methods that are compared, as settings over one common config. Imports no JAX.

dora                              a method of the table below
r64=lora adapter.rank=64          the method lora, at another rank, under the name r64
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from lorax_ft.config import AdapterConfig, Config, PromptConfig
from lorax_ft.schema import INITS, Factor
from lorax_ft.schema import METHODS as ADAPTER_METHODS
from lorax_ft.sweep.axes import RATE, make_point, parse_setting

FACTOR_A, FACTOR_B = get_args(Factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method: what it changes of the common config."""

    label: str
    """Its name in tables."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values by field, such as "adapter.dora"."""


def _soft_prompt(kind: str, encoder: str) -> dict[str, Any]:
    """The settings of a soft prompt that trains alone."""
    return {"adapter.targets": (), "prompt.kind": kind, "prompt.encoder": encoder}


METHODS: Mapping[str, Method] = {
    "full": Method(
        label="full fine-tuning",
        settings={"adapter.targets": (), "adapter.train_whole": ("all",)},
    ),
    "lora": Method(label="LoRA"),
    "lora_plus": Method(label="LoRA+", settings={"optim.lora_plus_ratio": 16.0}),
    "rslora": Method(label="rsLoRA", settings={"adapter.scaling": "rank_stabilized"}),
    "dora": Method(label="DoRA", settings={"adapter.dora": True}),
    "pissa": Method(label="PiSSA", settings={"adapter.init": "pissa"}),
    "qlora": Method(label="QLoRA", settings={"quant.format": "nf4"}),
    "neftune": Method(label="NEFTune", settings={"train.neftune_alpha": 5.0}),
    "lora_fa": Method(label="LoRA-FA", settings={"adapter.freeze": (FACTOR_A,)}),
    "olora": Method(label="OLoRA", settings={"adapter.init": "olora"}),
    "milora": Method(label="MiLoRA", settings={"adapter.init": "milora"}),
    "mica": Method(label="MiCA", settings={"adapter.init": "mica", "adapter.freeze": (FACTOR_B,)}),
    "orthogonal": Method(label="orthogonal", settings={"adapter.init": "orthogonal"}),
    "eva": Method(label="EVA", settings={"adapter.init": "eva"}),
    "corda": Method(label="CorDA", settings={"adapter.init": "corda"}),
    "lora_ga": Method(label="LoRA-GA", settings={"adapter.init": "lora_ga"}),
    "lora_one": Method(label="LoRA-One", settings={"adapter.init": "lora_one"}),
    "qpissa": Method(
        label="QPiSSA",
        settings={"quant.format": "nf4", "quant.rounds": 5, "adapter.init": "pissa"},
    ),
    "loftq": Method(
        label="LoftQ",
        settings={"quant.format": "nf4", "quant.rounds": 5, "adapter.init": "loftq"},
    ),
    "ia3": Method(label="IA3", settings={"adapter.method": "ia3"}),
    "miss": Method(label="MiSS", settings={"adapter.method": "miss"}),
    "vera": Method(label="VeRA", settings={"adapter.method": "vera"}),
    "loha": Method(label="LoHa", settings={"adapter.method": "loha"}),
    "lokr": Method(label="LoKr", settings={"adapter.method": "lokr"}),
    "shira": Method(label="SHiRA", settings={"adapter.method": "shira"}),
    "hira": Method(label="HiRA", settings={"adapter.method": "hira"}),
    "oft": Method(label="OFT", settings={"adapter.method": "oft"}),
    "bottleneck": Method(
        label="bottleneck",
        settings={"adapter.method": "bottleneck", "adapter.targets": ("o_proj", "down_proj")},
    ),
    "prompt_tuning": Method(label="prompt tuning", settings=_soft_prompt("prompt", "none")),
    "p_tuning": Method(label="P-tuning", settings=_soft_prompt("prompt", "mlp")),
    "prefix_tuning": Method(label="prefix tuning", settings=_soft_prompt("prefix", "mlp")),
    "p_tuning_v2": Method(label="P-tuning v2", settings=_soft_prompt("prefix", "none")),
}
"""By the name that `--methods` takes."""
DEFAULT = ("full", "lora", "lora_plus", "rslora", "dora", "pissa", "qlora", "neftune")
REFERENCE = "lora"
"""The method that the others are compared with, if it is among them; else that is the first one."""
VARIED = (RATE, "train.seed")
"""Fields that a comparison varies itself."""
DATA = "data"
"""The folder beside those of the methods, in which the data of a comparison lie."""


def config_of(method: Method, config: Config) -> Config:
    """The common config with the method's settings.

    Options that the method does not use, such as alpha beside IA3, go back to their defaults. The
    virtual tokens of a soft prompt stand beside those of data.max_length, so that each sample is
    trained on as with the other methods.

    Raises:
      ValueError: the settings do not fit the config, or it has no modules for them to adapt.
    """
    settings = dict(method.settings)
    if not config.adapter.targets and "adapter.targets" not in settings:
        raise ValueError(
            f"{method.label}: adapter.targets of the config is empty, so there is nothing to "
            "adapt; give --adapter.targets all-linear, or another --config"
        )
    kind = settings.get("adapter.method", config.adapter.method)
    init = settings.get("adapter.init", config.adapter.init)
    used_by_init = {name: row.options for name, row in INITS.items()}
    for used_by, chosen in ((ADAPTER_METHODS, kind), (used_by_init, init)):
        for options in used_by.values():
            for option in set(options) - set(used_by[chosen]):
                default = getattr(AdapterConfig, option)
                settings.setdefault(f"adapter.{option}", default)
    length = config.data.max_length
    try:
        if isinstance(length, int):
            more = _prompt_of(settings, config).count - config.prompt.count
            settings.setdefault("data.max_length", length + more)
        return make_point(config, settings, number=0).config
    except ValueError as error:
        # Without the defaults that were set above (`make_point`).
        raise ValueError(f"{method.label}: {error.__cause__ or error}") from None


def chosen_methods(entries: Sequence[str]) -> dict[str, Method]:
    """The methods of these entries by name; "all" stands for every one of `METHODS`.

    Raises:
      ValueError: a name is unknown or given twice, or a setting does not fit.
    """
    if list(entries) == ["all"]:
        entries = list(METHODS)
    chosen: dict[str, Method] = {}
    for entry in entries:
        name, method = _parse(entry)
        if name in chosen:
            raise ValueError(f"--methods names {name} twice")
        chosen[name] = method
    if not chosen:
        raise ValueError("--methods is empty; name two methods or more")
    return chosen


def reference_of(names: Iterable[str]) -> str:
    """The name of the method that the others are compared with."""
    listed = list(names)
    return REFERENCE if REFERENCE in listed else listed[0]


def _prompt_of(settings: Mapping[str, Any], config: Config) -> PromptConfig:
    """The soft prompt of the config with these settings."""
    section = "prompt."
    own = {f.removeprefix(section): v for f, v in settings.items() if f.startswith(section)}
    return dataclasses.replace(config.prompt, **own)


def _parse(entry: str) -> tuple[str, Method]:
    """The name and the method of an entry "METHOD" or "NAME=METHOD field=value field=value"."""
    first, _, rest = entry.strip().partition(" ")
    # Before each "field=": a field of several values has them apart, as on a command line.
    settings = re.split(r"\s+(?=[\w.-]+=)", rest.strip()) if rest else []
    name, equals, known = first.rpartition("=")
    if known not in METHODS:
        near = difflib.get_close_matches(known, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--methods {entry}: known are {', '.join(METHODS)}, or all{hint}")
    if not equals and not settings:
        return known, METHODS[known]
    # It also names a folder. A method with other settings needs a name of its own.
    if not re.fullmatch(r"[\w.-]*\w", name) or name in (*METHODS, DATA):
        raise ValueError(
            f"--methods {entry!r}: a method with settings needs a new name of letters, digits, _, "
            f'. or -, such as "r64={known} adapter.rank=64"'
        )
    changed = dict(METHODS[known].settings)
    for setting in settings:
        try:
            field, value = parse_setting(setting)
        except ValueError as error:
            raise ValueError(f"--methods {name}: {error}") from None
        if field in VARIED:
            raise ValueError(
                f"--methods {name} sets {field}, which a comparison varies itself; see --rates and "
                "--seeds"
            )
        changed[field] = value
    return name, Method(label=name, settings=changed)
