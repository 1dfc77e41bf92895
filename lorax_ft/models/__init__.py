"""Plain linen decoders. They know nothing of adapters.

`FAMILIES` maps the `model_type` of a Hugging Face config.json to the module that computes it.
"""

from __future__ import annotations

from lorax_ft.models.llama import Decoder

FAMILIES = {"llama": Decoder}
