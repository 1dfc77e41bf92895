"""A quantized base is dequantized one layer at a time, forward and backward, for any remat."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from lorax_ft import AdapterConfig, add_adapters, combine, partition
from lorax_ft.config import MeshConfig
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.models.model import LoadedModel, abstract_params
from lorax_ft.quant.kernels import quantize
from lorax_ft.sharding import DECODER_RULES, batch_sharding, make_mesh, param_shardings
from lorax_ft.tree import Tree, flatten, unflatten

LAYERS = 8
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("remat", ["none", "products", "mlp", "full"])
def test_a_layer_at_a_time(remat: Any, format: Any) -> None:
    whole, quantized = (
        _gradient(remat, f).memory_analysis().temp_size_in_bytes for f in ("none", format)
    )
    layer = 4 * (4 * 256 * 256 + 3 * 256 * 1024)  # bytes of its kernels in float32
    assert quantized < whole + 1.5 * layer  # the whole model would be LAYERS * layer


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_codes_travel_and_not_what_they_stand_for(format: Any) -> None:
    """FSDP gathers a layer's codes and dequantizes them after that; tensor axes stay sharded."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        text = _gradient("full", format, mesh).as_text()
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    gathered = {(dtype, math.prod(map(int, shape.split(",")))) for dtype, shape in found}
    kernel = 256 * 1024 // 2  # of the MLP, on one device of the tensor axis
    assert {"nf4": ("u8", kernel // 2), "int8": ("s8", kernel)}[format] in gathered
    # Smaller than any kernel.
    assert max(size for dtype, size in gathered if dtype == "f32") < 256 * 256 // 2


def _gradient(remat: Any, format: Any, mesh: Mesh | None = None) -> Any:
    """The compiled gradient of the adapters."""
    config = decoder_config(HF_CONFIG, source="these tests", remat=remat)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, "float32")
        for path, leaf in flatten(abstract_params(config)).items()
    }
    kernels = [
        math.prod(leaf.shape)
        for path, leaf in shapes.items()
        if re.fullmatch(r"layers/.*_proj/kernel", path)
    ]
    assert sum(kernels) == LAYERS * (4 * 256 * 256 + 3 * 256 * 1024)

    def base(path: str, leaf: Any) -> Any:
        if format == "none" or not re.fullmatch(r"layers/.*_proj/kernel", path):
            return leaf
        return jax.eval_shape(
            lambda w: quantize(w, format=format, double_quant=True, n_stack=1, n_in=1), leaf
        )

    model = LoadedModel(
        config=config, params=unflatten({path: base(path, leaf) for path, leaf in shapes.items()})
    )
    plain = unflatten(shapes)
    adapters = AdapterConfig(rank=2)
    adapted = jax.eval_shape(
        lambda p: add_adapters(p, adapters, layout=model.layout, key=jax.random.key(0)), plain
    )
    trained, _ = partition(adapted)
    owned, _ = partition(adapted, by="ownership")
    scales = unflatten(
        {path: leaf for path, leaf in flatten(owned).items() if path.endswith("lora_scale")}
    )
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def loss(trained: Tree, frozen: Tree, tokens: jax.Array) -> jax.Array:
        return jnp.sum(model.apply({"params": combine(trained, frozen)}, tokens) ** 2)

    frozen = combine(model.params, scales)
    if mesh is not None:
        places = flatten(
            param_shardings(combine(trained, frozen), DECODER_RULES, layout=model.layout, mesh=mesh)
        )
        trained, frozen = (_placed(tree, places) for tree in (trained, frozen))
        tokens = jax.ShapeDtypeStruct(
            (4, 8), jnp.int32, sharding=batch_sharding(mesh, microbatched=False)
        )
    return jax.jit(jax.grad(loss)).lower(trained, frozen, tokens).compile()


def _placed(tree: Tree, places: dict[str, Any]) -> Tree:
    def at(leaf: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return unflatten(
        {path: jax.tree.map(at, leaf, places[path]) for path, leaf in flatten(tree).items()}
    )
