"""Model cards: the README.md beside a saved adapter or model, with the metadata that the hub reads.

A card that a person wrote, or changed, is kept. The last line of ours holds a checksum of the rest,
by which it is recognized.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_ft.interop.bucket import is_hub, output_path
from lorax_ft.models.model import Model

CARD = "README.md"
TRAINING = "## Training\n"
"""The heading of the section with the facts of a run, which is the last one."""
MARK = "<!-- Written by lorax_ft, which replaces this card unless you change it. {} -->\n"

TITLES = {
    "lora": "LoRA",
    "ia3": "IA3",
    "miss": "MiSS",
    "vera": "VeRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "shira": "SHiRA",
    "hira": "HiRA",
    "oft": "OFT",
    "lorax_ft_bottleneck": "Bottleneck",
    "prompt_tuning": "Prompt tuning",
    "p_tuning": "P-tuning",
    "prefix_tuning": "Prefix tuning",
}
"""The names of the adapters' types, by PEFT's, with which the names of their leaves begin."""

USE_ADAPTER = """
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "."  # this folder, or the name of its repository on the hub
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained("{base}")
{grow}model = PeftModel.from_pretrained(model, adapter)
```
"""
GROW = """\
if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens are new
    model.resize_token_embeddings(len(tokenizer))
"""
USE_OWN_ADAPTER = """
## Use

PEFT has no such adapter. lorax_ft, which trained it, loads it:

```python
import lorax_ft as lft

adapter = "."  # this folder
model = lft.load_model("{base}")
params = lft.load_peft(adapter, model)
```
"""
USE_MODEL = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or the name of its repository on the hub
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
```
"""


def adapter_card(
    peft_config: Mapping[str, Any],
    *,
    init: str | None = None,
    training_notes: str = "",
) -> str:
    """The card of a PEFT folder.

    Args:
      peft_config: the folder's adapter_config.json.
      init: the initialization of A and B, a tag of the card where it has a name of its own.
      training_notes: Markdown about the run that trained the adapter.
    """
    base = str(peft_config["base_model_name_or_path"] or "")
    method = str(peft_config["peft_type"]).lower()
    tags = [method]
    for option, tag in {"use_dora": "dora", "use_rslora": "rslora"}.items():
        if peft_config.get(option):
            tags.append(tag)
    if init not in (None, "kaiming", "gaussian"):
        tags.append(str(init))
    base_id = hub_id(base)
    if base_id:
        tags.insert(0, f"base_model:adapter:{base_id}")
    title = f"{TITLES.get(method, method)} adapter of {Path(base).name}"
    text = f"# {title}\n\nBase model: {_link(base)}\n"
    is_own = method.startswith("lorax_ft")
    grow = GROW if peft_config.get("trainable_token_indices") else ""
    text += (USE_OWN_ADAPTER if is_own else USE_ADAPTER).format(base=base, grow=grow)
    library = "lorax_ft" if is_own else "peft"
    return _card(text, base_id, library=library, tags=tags, training_notes=training_notes)


def model_card(model: Model, *, training_notes: str = "") -> str:
    """The card of a model's folder: `model` fine-tuned, its adapters merged."""
    base = model.source
    text = f"# {Path(base).name}, fine-tuned\n\nBase model: {_link(base)}\n{USE_MODEL}"
    base_id = hub_id(base)
    return _card(text, base_id, library="transformers", tags=[], training_notes=training_notes)


def write_card(new: Path, card: str, *, target: str | Path) -> None:
    """Write a card into the folder `new`, which is to replace `target`.

    If the target holds a card that a person wrote or changed, that one is written instead.
    """
    old = output_path(target) / CARD
    # A repository on the hub is looked at when the folder is pushed.
    if not is_hub(target) and old.is_file() and not is_generated(old.read_bytes()):
        (new / CARD).write_bytes(old.read_bytes())
        return
    (new / CARD).write_text(card, encoding="utf-8")


def is_generated(card: bytes) -> bool:
    """Whether a card is as `write_card` wrote it."""
    body, separator, mark = card.rpartition(b"<!--")
    return separator + mark == MARK.format(_checksum(body)).encode()


def training_notes_of(folder: str | Path | None) -> str:
    """What the card of an adapter's or a model's folder says about its training.

    Empty if there is no folder, no card, or the card is not ours.
    """
    card = Path(folder or "") / CARD
    if folder is None or not card.is_file() or not is_generated(card.read_bytes()):
        return ""
    text = card.read_text(encoding="utf-8").rpartition("<!--")[0]
    return text.partition(TRAINING)[2].strip()


def hub_id(source: str) -> str | None:
    """The hub id that a model was loaded from; None for a folder or a file on this machine."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None
    if not is_id or source.endswith(".gguf") or Path(source).exists():
        return None
    return source


def _card(
    text: str,
    base_id: str | None,
    *,
    library: str,
    tags: Sequence[str],
    training_notes: str,
) -> str:
    """The metadata, the text, the training and the mark."""
    from huggingface_hub import ModelCard, ModelCardData

    # The hub refuses a base_model that is no id on it, so a local base stands in the text only.
    data = ModelCardData(
        base_model=base_id,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[*tags, "lorax_ft"],
    )
    if training_notes:
        text += f"\n{TRAINING}\n{training_notes.strip()}\n"
    body = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
    return body + MARK.format(_checksum(body.encode()))


def _link(base: str) -> str:
    """The base as Markdown, with a link where it lies on the hub."""
    base_id = hub_id(base)
    return f"[{base_id}](https://huggingface.co/{base_id})" if base_id else f"`{base}`"


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]
