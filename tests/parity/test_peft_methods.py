"""All methods but LoRA keep their logits from here to PEFT and back. Needs torch and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import our_logits, qwen2_with_biases, their_logits  # noqa: E402

import lorax_ft as lft  # noqa: E402
from lorax_ft.config.foreign.peft import ADAPTER as LORA_ADAPTER  # noqa: E402
from lorax_ft.config.foreign.peft_types import TABLES  # noqa: E402
from lorax_ft.config.load import read_config  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.lowrank.groups import adapter_leaves_of  # noqa: E402
from lorax_ft.lowrank.terms import active_leaf  # noqa: E402
from lorax_ft.models.model import LoadedModel  # noqa: E402
from lorax_ft.run.module_table import matrix_ranks  # noqa: E402
from lorax_ft.schema import leaf_schema  # noqa: E402
from lorax_ft.tree import Tree, flatten, modules, unflatten  # noqa: E402

# torch, transformers and PEFT warn about one another.
pytestmark = pytest.mark.filterwarnings("ignore")
FFN = ("down_proj",)
OURS: dict[str, dict[str, Any]] = {
    "ia3": {"method": "ia3", "targets": ("k_proj", "v_proj", "down_proj"), "feedforward": FFN},
    "ia3_all": {"method": "ia3", "feedforward": (".*/mlp/.*",), "layers": (0, 2)},
    "ia3_head": {"method": "ia3", "targets": ("q_proj", "lm_head")},
    "miss": {"method": "miss", "rank": 4},
    "miss_uneven": {"method": "miss", "rank": 5, "targets": ("q_proj", "down_proj")},
    "miss_layers": {"method": "miss", "rank": 3, "layers": (1,), "exclude": ("o_proj",)},
    "vera": {"method": "vera", "rank": 40, "targets": ("all-linear", "lm_head")},
    "loha": {"method": "loha", "rank": 3, "scaling": "rank_stabilized"},
    "loha_ranks": {
        "method": "loha",
        "rank": 4,
        "rank_pattern": ("layers/1/.*=2", "up_proj=3"),
        "alpha_pattern": ("q_proj=4",),
        "exclude": ("layers/0/mlp/.*",),
    },
    "lokr": {"method": "lokr", "rank": 2, "alpha": 4.0},
    "lokr_factor": {"method": "lokr", "rank": 3, "lokr_factor": 4, "alpha_pattern": ("q_proj=4",)},
    "shira": {"method": "shira", "rank": 4, "layers": (1,)},
    "hira": {"method": "hira", "rank": 4, "rank_pattern": ("layers/1/.*=2",)},
    "hira_head": {"method": "hira", "rank": 3, "targets": ("q_proj", "lm_head")},
    "oft": {"method": "oft", "oft_block_size": 10},
    "vera_layers": {"method": "vera", "rank": 8, "layers": (0, 2), "exclude": ("down_proj",)},
}
THEIRS = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3_regex": lambda: peft.IA3Config(
        target_modules=r".*(q_proj|up_proj)", feedforward_modules=r".*up_proj"
    ),
    "mica": lambda: peft.LoraConfig(
        r=4, init_lora_weights="mica", target_modules=["q_proj", "down_proj"]
    ),
    "miss": lambda: peft.MissConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"]),
    "miss_uneven": lambda: peft.MissConfig(r=5, target_modules=["v_proj"]),
    "loha": lambda: peft.LoHaConfig(
        r=4,
        alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 3},
    ),
    "lokr": lambda: peft.LoKrConfig(
        r=2, alpha=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 8}
    ),
    "shira": lambda: peft.ShiraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "hira": lambda: peft.HiraConfig(
        r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}
    ),
    "oft": lambda: peft.OFTConfig(
        oft_block_size=16, target_modules=["q_proj", "down_proj"], use_cayley_neumann=True
    ),
    "vera": lambda: peft.VeraConfig(r=40, target_modules=["q_proj", "v_proj", "down_proj"]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen 2, since IA3 scales biases too, and its q, k and v have some."""
    return qwen2_with_biases(tmp_path_factory.mktemp("checkpoint"), layers=3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint)


def randomized(params: Tree) -> Tree:
    """Random values in all trained leaves, but in the padding of smaller ranks."""
    trained, frozen = lft.partition(params)
    layers = modules(params)
    rng = np.random.default_rng(1)
    moved = {}
    for path, leaf in flatten(trained).items():
        module, _, name = path.rpartition("/")
        noise = rng.normal(0, 0.3, leaf.shape) * within_rank(layers[module], name, leaf)
        moved[path] = jnp.asarray(leaf + noise, jnp.float32)
    return lft.combine(unflatten(moved), frozen)


def within_rank(layer: Tree, name: str, leaf: jax.Array) -> np.ndarray:
    """1 within each matrix's own rank and 0 beyond it, to multiply the leaf with."""
    axes = leaf_schema(name).axes
    if "rank" not in axes:
        return np.ones(())
    stack = layer[active_leaf(layer)].shape
    place = axes.index("rank") - len(axes)
    size = leaf.shape[place]
    used = np.arange(size) < matrix_ranks(layer).reshape(*stack, 1)
    behind = (1,) * (-1 - place)
    between = (1,) * (leaf.ndim - used.ndim - len(behind))
    return used.reshape(*stack, *between, size, *behind)


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_our_folder_and_we_read_it_back(
    checkpoint: Path, model: LoadedModel, tmp_path: Path, case: str
) -> None:
    config = lft.AdapterConfig(**OURS[case])
    fresh = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    params = randomized(fresh)
    save_peft(tmp_path / "adapter", params, model)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    plain = their_logits(base)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = their_logits(wrapped)
    np.testing.assert_allclose(our_logits(model, params), expected, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(our_logits(model, model.params), plain, atol=1e-4)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(our_logits(model, again), expected, atol=1e-4)
    merged = lft.merge_adapters(params, layout=model.layout)
    np.testing.assert_allclose(our_logits(model, merged), expected, atol=1e-4)
    np.testing.assert_allclose(their_logits(wrapped.merge_and_unload()), expected, atol=1e-4)


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_what_peft_saved(
    checkpoint: Path, model: LoadedModel, tmp_path: Path, case: str
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    wrapped = peft.get_peft_model(base, THEIRS[case]())
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float("ia3" in name), std=0.3)
    expected = their_logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    params = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(our_logits(model, params), expected, atol=1e-4)
    assert np.abs(expected - our_logits(model, model.params)).max() > 0.1
    save_peft(tmp_path / "again", params, model)
    again = load_peft(tmp_path / "again", model)
    mine, other = (flatten(adapter_leaves_of(tree)) for tree in (params, again))
    assert mine.keys() == other.keys()
    for path, leaf in mine.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def test_mica_starts_as_in_peft(checkpoint: Path, model: LoadedModel) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    names = ["q_proj", "down_proj", "embed_tokens"]
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, init_lora_weights="mica", target_modules=names)
    )
    config = lft.AdapterConfig(rank=4, init="mica", freeze=("lora_b",), targets=tuple(names))
    ours = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    layer = theirs.base_model.model.model.layers[1]
    pairs = {
        "q": (layer.self_attn.q_proj.lora_B, ours["layers"]["self_attn"]["q_proj"]),
        "down": (layer.mlp.down_proj.lora_B, ours["layers"]["mlp"]["down_proj"]),
    }
    table = theirs.base_model.model.model.embed_tokens.lora_embedding_B["default"]
    found = {
        name: (b["default"].weight, leaves["lora_b"][1]) for name, (b, leaves) in pairs.items()
    }
    found["table"] = (table, ours["embed_tokens"]["lora_b"])
    for name, (their_b, our_b) in found.items():
        # Both span the same directions, in an order and with signs of their own.
        their_b = their_b.detach().numpy()
        overlap = np.abs(np.asarray(our_b) @ their_b)
        np.testing.assert_allclose(overlap, np.eye(4)[::-1], atol=1e-3, err_msg=name)


def test_variants_whose_blocks_mean_something_else_are_refused(
    model: LoadedModel, tmp_path: Path
) -> None:
    config = lft.AdapterConfig(method="miss", rank=4)
    params = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    file = tmp_path / "adapter/adapter_config.json"
    for value in ("bat", "mini"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init_weights": value}))
        with pytest.raises(ValueError, match=f"init_weights '{value}'.*not supported"):
            load_peft(tmp_path / "adapter", model)


SOFT_PROMPT = {"num_virtual_tokens": 4, "encoder_hidden_size": 8}
THEIR_DEFAULTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": SOFT_PROMPT,
    "PREFIX_TUNING": SOFT_PROMPT,
    "TRAINABLE_TOKENS": {"token_indices": [1]},
}


@pytest.mark.parametrize("kind", sorted(set(TABLES) - {"BONE"}))
def test_a_config_that_peft_writes_is_one_of_a_run(kind: str, tmp_path: Path) -> None:
    """All of its fields are known, and its defaults ask for nothing that there is not."""
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        task_type="CAUSAL_LM", **THEIR_DEFAULTS.get(kind, {})
    )
    config.save_pretrained(tmp_path)
    read = read_config(tmp_path / "adapter_config.json")
    assert read.source is not None
    assert not read.config.adapter.train_whole
    fields = set(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert fields <= set(TABLES[kind])
    assert set(TABLES[kind]) - fields <= {*LORA_ADAPTER, "r", "bias"}, "not PEFT's"
