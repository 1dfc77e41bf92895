"""NNX twins of the zoo's linen models: layers of the same names, so the same parameters."""

from __future__ import annotations

from flax import nnx
from jax import Array


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.LayerNorm_0 = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, 12, decode=False, rngs=rngs)
        self.LayerNorm_1 = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.LayerNorm_0(x))
        return x + self.down(nnx.gelu(self.up(self.LayerNorm_1(x))))


class VisionTransformer(nnx.Module):
    """Its layers are stacked, scanned and rematerialized."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.patches = nnx.Conv(3, 16, (4, 4), strides=4, rngs=rngs)
        self.layers = stacked(rngs)
        self.classes = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x: Array, block: Block) -> Array:
            return block(x)

        x = self.patches(images)
        x = run(x.reshape(x.shape[0], -1, 16), self.layers)
        return self.classes(x.mean(1))


class ConvolutionalNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.second = nnx.Conv(
            8, 6, (3, 2), padding="VALID", kernel_dilation=(1, 2), use_bias=False, rngs=rngs
        )
        self.line = nnx.Conv(6, 7, 3, padding="CIRCULAR", rngs=rngs)
        self.classes = nnx.Linear(7, 5, rngs=rngs)

    @nnx.jit
    def __call__(self, images: Array) -> Array:
        x = nnx.relu(self.depthwise(nnx.relu(self.first(images))))
        x = nnx.relu(self.second(x))
        x = nnx.relu(self.line(x.reshape(x.shape[0], -1, 6)))
        return self.classes(x.mean(1))


class Einsums(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.Einsum("BTD,NDH->BTNH", (2, 12, 8), rngs=rngs)
        self.attention_out = nnx.Einsum("BTNH,NHD->BTD", (2, 8, 12), rngs=rngs)
        self.square = nnx.Einsum("...D,FD->...F", (12, 12), (12,), rngs=rngs)
        self.experts_up = nnx.Einsum("BED,EDF->BEF", (3, 12, 10), (3, 10), rngs=rngs)
        self.experts_down = nnx.Einsum("BEF,EFD->BED", (3, 10, 12), rngs=rngs)
        self.classes = nnx.Einsum("... D, D C -> ... C", (12, 5), (5,), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention_out(nnx.tanh(self.query(x)))
        x = x + self.square(x)
        x = x + self.experts_down(nnx.silu(self.experts_up(x)))
        return self.classes(x)


TWINS: dict[str, type[nnx.Module]] = {
    "vit_rematted": VisionTransformer,
    "convolutions": ConvolutionalNetwork,
    "einsums": Einsums,
}
