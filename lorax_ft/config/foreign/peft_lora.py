"""PEFT's LoraConfig."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorax_ft.config.foreign import peft
from lorax_ft.config.foreign.peft import given
from lorax_ft.config.foreign.rules import Keys, Options, Rule, choice, holds, refused, same
from lorax_ft.schema import INITS

_INITS = {
    True: "kaiming",
    "true": "kaiming",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
    "loftq": "loftq",
    "eva": "eva",
    "corda": "corda",
    "lora_ga": "lora_ga",
    "mica": "mica",
}
_INIT_CONFIGS: Mapping[str, tuple[str, ...]] = {
    "eva_config": ("rho",),
    "corda_config": ("corda_method",),
    "lora_ga_config": ("stable_gamma",),
    "loftq_config": ("loftq_bits", "loftq_iter"),
}
"""The objects of starts, with their keys that have an option here."""
_ONLY_LORA = "LoRA has no such part here"


def init(keys: Keys) -> Options:
    """The start of A and B."""
    value = keys.read("init_lora_weights", "any", True)
    randomized = re.fullmatch(r"pissa_niter_(\d{1,9})", value) if isinstance(value, str) else None
    if randomized is not None:
        return {"adapter.init": "pissa", "adapter.svd_iterations": int(randomized[1])}
    if value is False:
        raise keys.error(
            "init_lora_weights",
            "init_lora_weights false: A and B both random change the model; every start here "
            "leaves it as it is; --adapter.init replaces it",
        )
    chosen = keys.choose("init_lora_weights", _INITS, True, instead="adapter.init")
    options: Options = {"adapter.init": chosen}
    frozen = INITS[chosen].frozen
    if frozen is not None:
        options["adapter.freeze"] = (frozen,)
    return options | _init_options(chosen, keys)


def _init_options(chosen: str, keys: Keys) -> Options:
    """The options of a start, which have an object of their own in PEFT."""
    own = f"{chosen}_config"
    for section, known in _INIT_CONFIGS.items():
        for name in keys.read(section, "object", {}):
            if section != own:
                keys.note(section, f"not honored: it belongs to init_lora_weights {section[:-7]}")
            elif name not in known:
                keys.note(section, f"only {' and '.join(known)} of it is honored")
    own_values = keys.read(own, "object", {}) if own in _INIT_CONFIGS else {}
    match chosen:
        case "eva":
            return {"adapter.eva_rho": own_values.get("rho", 2.0)}
        case "corda":
            return {"adapter.corda_mode": own_values.get("corda_method", "ipm")}
        case "lora_ga":
            return {"adapter.lora_ga_gamma": own_values.get("stable_gamma", 16)}
        case "loftq":
            bits = own_values.get("loftq_bits", 4)
            if bits not in (4, 8) and "quant.format" not in keys.overridden:
                raise keys.error(
                    "loftq_config",
                    f"loftq_bits is {bits}; it can be 4 or 8 (--quant.format replaces it)",
                )
            format_ = "nf4" if bits == 4 else "int8"
            return {"quant.format": format_, "quant.rounds": own_values.get("loftq_iter", 1)}
    return {}


def trained_tokens(keys: Keys) -> Options:
    """The tokens that train beside the adapter."""
    return peft.tokens(keys, "trainable_token_indices")


_KIND = peft.kind({"adapter.method": "lora"})
_INIT = given(
    init,
    *("adapter.init", "adapter.svd_iterations", "adapter.freeze", "quant.format", "quant.rounds"),
    remark="true: kaiming; pissa_niter_N: pissa with svd_iterations N; loftq quantizes the base; "
    "of the objects only rho, corda_method, stable_gamma, loftq_bits and loftq_iter",
)

LORA: Mapping[str, Rule] = {
    **peft.ADAPTER,
    "peft_type": _KIND,
    "task_type": _KIND,
    "r": same("adapter.rank", "whole", default=8),
    "lora_alpha": same("adapter.alpha", "number", default=8),
    "lora_dropout": same("adapter.dropout", "number"),
    "rank_pattern": given(peft.ranks, "adapter.rank_pattern"),
    "alpha_pattern": given(peft.alphas, "adapter.alpha_pattern"),
    "use_rslora": choice("adapter.scaling", {True: "rank_stabilized", False: "standard"}),
    "use_dora": same("adapter.dora", "flag"),
    "init_lora_weights": _INIT,
    "eva_config": _INIT,
    "corda_config": _INIT,
    "loftq_config": _INIT,
    "lora_ga_config": _INIT,
    "lora_bias": refused(_ONLY_LORA),
    "target_parameters": refused(
        "name modules in target_modules", harmless=([],), instead="adapter.targets"
    ),
    "layer_replication": refused("the layers are those of the model", harmless=([],)),
    "trainable_token_indices": given(trained_tokens, "adapter.trainable_tokens"),
    "use_qalora": refused(_ONLY_LORA),
    "use_bdlora": refused(_ONLY_LORA),
    "alora_invocation_tokens": refused(
        "their text is needed", harmless=([],), instead="adapter.invocation"
    ),
    "arrow_config": refused(_ONLY_LORA),
    "kasa_config": refused(_ONLY_LORA),
    "velora_config": refused(_ONLY_LORA),
    "monteclora_config": refused(_ONLY_LORA),
    "megatron_config": refused("Megatron's layers are not used"),
    "megatron_core": holds("Megatron's layers are not used"),
    "qalora_group_size": holds("it belongs to use_qalora"),
}
