"""Adapters on Qwen 3.5: gradients and folders of PEFT, long texts. Needs torch and peft."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from test_transformers import assert_same_logits  # noqa: E402

from lorax_ft import adapt  # noqa: E402
from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.interop.peft_tensors import PREFIX  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.models.model import LoadedModel  # noqa: E402
from lorax_ft.tree import Tree, flatten, unflatten  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 150))
CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
LINEAR = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**CONFIG)
    model = transformers.Qwen3_5ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.normal_(0.5, 0.3)
        if name.endswith("A_log"):
            # Decays as of trained models. With random ones, transformers is itself off by 1e-4.
            weight.data.normal_(-2, 0.5)
    folder = tmp_path_factory.mktemp("qwen3_5")
    model.save_pretrained(folder)
    return folder


def their_model(checkpoint: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint)


def their_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.numpy()


def our_logits(model: LoadedModel, params: Tree) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))


def with_random_factors(params: Tree) -> Tree:
    rng = np.random.default_rng(1)
    flat = flatten(params)
    for path, leaf in flat.items():
        if path.endswith(("lora_a", "lora_b")):
            flat[path] = jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
    return unflatten(flat)


def test_long_texts(checkpoint: Path) -> None:
    """Of several chunks."""
    model = load_model(checkpoint)
    expected = their_logits(their_model(checkpoint))
    assert_same_logits(our_logits(model, model.params), expected, "qwen3_5")


def test_peft_loads_ours(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    added = add_adapters(
        model.params, AdapterConfig(rank=3), layout=model.layout, key=jax.random.key(0)
    )
    params = with_random_factors(added)
    save_peft(tmp_path, params, model)
    base = their_model(checkpoint)
    plain = their_logits(base)
    expected = their_logits(peft.PeftModel.from_pretrained(base, tmp_path))
    assert np.abs(expected - plain).max() > 0.1
    assert_same_logits(our_logits(model, params), expected, "qwen3_5")
    again = load_peft(tmp_path, model)
    assert_same_logits(our_logits(model, again), expected, "qwen3_5")


def test_all_linear_is_pefts(checkpoint: Path, tmp_path: Path) -> None:
    """The same modules, and the folder that PEFT writes."""
    lora = peft.LoraConfig(
        r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(their_model(checkpoint), lora)
    theirs.save_pretrained(tmp_path)
    model = load_model(checkpoint)
    params = load_peft(tmp_path, model)
    ours = add_adapters(
        model.params, AdapterConfig(rank=3), layout=model.layout, key=jax.random.key(0)
    )
    assert flatten(params).keys() == flatten(ours).keys()
    assert_same_logits(our_logits(model, params), their_logits(theirs), "qwen3_5")


def test_gradients_are_pefts(checkpoint: Path, tmp_path: Path) -> None:
    """Of adapters on every linear layer, over texts of several chunks."""
    model = load_model(checkpoint)
    added = add_adapters(
        model.params, AdapterConfig(rank=3), layout=model.layout, key=jax.random.key(0)
    )
    params = with_random_factors(added)
    save_peft(tmp_path, params, model)
    theirs = peft.PeftModel.from_pretrained(their_model(checkpoint), tmp_path, is_trainable=True)
    theirs.train()(torch.as_tensor(TOKENS), labels=torch.as_tensor(TOKENS)).loss.backward()

    apply = adapt(model.apply)

    @jax.jit
    @jax.grad
    def gradients(params: Tree) -> jax.Array:
        logits = apply({"params": params}, jnp.asarray(TOKENS))
        log_p = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_p, jnp.asarray(TOKENS)[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    ours = flatten(gradients(params))
    compared = set()
    for key, parameter in theirs.named_parameters():
        if "lora_" not in key:
            continue
        *_, number, kind, module, factor, _, _ = key.removeprefix(PREFIX).split(".")
        path = f"layers/{number}_of_4/{kind}/{module}/{factor.lower()}"
        expected = parameter.grad.numpy().T
        size = np.abs(expected).max()
        assert size > 0
        np.testing.assert_allclose(ours[path][0], expected, atol=1e-4 * size, err_msg=key)
        compared.add(module)
    assert compared == {*LINEAR, *ATTENTION, *MLP}
