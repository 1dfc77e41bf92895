"""The quantization formats, for the tests of the formats and of methods on quantized bases."""

from __future__ import annotations

from lorax_ft import QuantConfig

FORMATS = {
    "nf4": QuantConfig(format="nf4", double=False),
    "nf4_double": QuantConfig(format="nf4"),
    "int8": QuantConfig(format="int8"),
}
