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
    "trainable_tokens": "Trainable tokens",
}
"""The names of the adapters' types, by PEFT's, with which the names of their leaves begin."""

USE_IN_PEFT = """
## Use
{notes}
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "."  # this folder, or the name of its repository on the hub
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained("{base}")
{grow}{load}```
"""
GROW = """\
if {rows} > model.get_input_embeddings().num_embeddings:  # tokens are new
    model.resize_token_embeddings({rows})
"""
LOAD = """\
model = PeftModel.from_pretrained(model, adapter)
"""
LOAD_WITH_PROMPT = """\
# PEFT loads one of the two at a time, so the adapter is merged before the soft prompt is loaded.
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model = PeftModel.from_pretrained(model, adapter, subfolder="soft_prompt")
"""
USE_HERE = """
## Use
{notes}
```python
import lorax_ft as lft

adapter = "."  # this folder
model = lft.load_model("{base}")
{grow}params = lft.load_peft(adapter, model)
```
"""
GROW_HERE = """\
model = lft.with_tokens_of(adapter, model)
"""
PROMPT_BESIDE = "A soft prompt, in the folder soft_prompt, was trained together with the adapter."
OWN_TYPE = "PEFT has no such adapter. lorax_ft, which trained it, loads it:"
ONLY_ALONE = (
    "PEFT loads the adapter without the prompt, or the prompt alone. lorax_ft, which trained them, "
    "loads both:"
)
INVOKED = (
    "The adapter acts from the tokens {} on. What stands before them, or a text without them, is "
    "computed by the base alone, so the adapter cannot be merged."
)
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
    table_rows: int | None = None,
    beside_prompt: bool = False,
) -> str:
    """The card of a PEFT folder.

    Args:
      peft_config: the folder's adapter_config.json.
      init: the initialization of A and B, a tag of the card where it has a name of its own.
      training_notes: Markdown about the run that trained the adapter.
      table_rows: how many rows the embedding has, if it was trained in full.
      beside_prompt: whether the folder holds a soft prompt beside the adapter.
    """
    base = str(peft_config["base_model_name_or_path"] or "")
    peft_type = str(peft_config["peft_type"]).lower()
    invocation = peft_config.get("alora_invocation_tokens")
    tags = [peft_type]
    if invocation:
        tags.append("alora")
    for option, tag in {"use_dora": "dora", "use_rslora": "rslora"}.items():
        if peft_config.get(option):
            tags.append(tag)
    if init not in (None, "kaiming", "gaussian"):
        tags.append(str(init))
    base_id = hub_id(base)
    if base_id:
        tags.insert(0, f"base_model:adapter:{base_id}")
    title = "aLoRA" if invocation else TITLES.get(peft_type, peft_type)
    text = f"# {title} adapter of {Path(base).name}\n\nBase model: {_link(base)}\n"
    library = _library(peft_config, beside_prompt=beside_prompt)
    notes = _notes(peft_config, library=library, beside_prompt=beside_prompt)
    text += _use(peft_config, notes, library, table_rows=table_rows, beside_prompt=beside_prompt)
    return _card(text, base_id, library=library, tags=tags, training_notes=training_notes)


def _library(peft_config: Mapping[str, Any], *, beside_prompt: bool) -> str:
    """The library that loads a folder: PEFT wherever it can."""
    if _is_own(peft_config):
        return "lorax_ft"
    # PEFT loads a prompt on a merged adapter alone; it merges tables that are tied wrongly, and an
    # activated LoRA cannot be merged.
    tables = {"embed_tokens", "lm_head"} & {
        name.rpartition(".")[2] for name in peft_config.get("target_modules") or ()
    }
    unmerged = tables or _trains_tokens(peft_config) or peft_config.get("alora_invocation_tokens")
    return "lorax_ft" if beside_prompt and unmerged else "peft"


def _notes(peft_config: Mapping[str, Any], *, library: str, beside_prompt: bool) -> list[str]:
    """What to know before loading a folder."""
    notes = []
    if beside_prompt:
        notes.append(PROMPT_BESIDE)
    if invocation := peft_config.get("alora_invocation_tokens"):
        notes.append(INVOKED.format(invocation))
    if _is_own(peft_config):
        notes.append(OWN_TYPE)
    elif library == "lorax_ft":
        notes.append(ONLY_ALONE)
    return notes


def _use(
    peft_config: Mapping[str, Any],
    notes: Sequence[str],
    library: str,
    *,
    table_rows: int | None,
    beside_prompt: bool,
) -> str:
    """The section that shows how to load a folder."""
    base = str(peft_config["base_model_name_or_path"] or "")
    paragraphs = "".join(f"\n{note}\n" for note in notes)
    grows = _trains_tokens(peft_config) or table_rows is not None
    if library == "lorax_ft":
        return USE_HERE.format(notes=paragraphs, base=base, grow=GROW_HERE if grows else "")
    # A table that was trained in full must have as many rows as in the folder.
    grow = GROW.format(rows=table_rows or "len(tokenizer)") if grows else ""
    load = LOAD_WITH_PROMPT if beside_prompt else LOAD
    return USE_IN_PEFT.format(notes=paragraphs, base=base, grow=grow, load=load)


def _is_own(peft_config: Mapping[str, Any]) -> bool:
    """Whether PEFT has no such type of adapter."""
    return str(peft_config["peft_type"]).lower().startswith("lorax_ft")


def _trains_tokens(peft_config: Mapping[str, Any]) -> bool:
    """Whether single tokens train, which may be new ones."""
    fields = ("trainable_token_indices", "token_indices")
    return any(peft_config.get(field) for field in fields)


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
