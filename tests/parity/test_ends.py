"""Where answers end: in chat templates of real models, and in transformers' generation."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import make_tokenizer
from tokenizers import AddedToken

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lorax_ft.data.chat import encode_prompt  # noqa: E402
from lorax_ft.inference.generate import default_stop_ids, generate  # noqa: E402
from lorax_ft.interop.end_tokens import end_of_turn  # noqa: E402
from lorax_ft.interop.save import save_model  # noqa: E402
from lorax_ft.models.model import Model  # noqa: E402

ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": None,  # answers end with the next <|user|>, which the template does not write
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}
CHATML = ("lfm2", "nemotron", "qwen")
"""Families whose turns end with <|im_end|>."""


def templates() -> dict[str, str]:
    """The chat templates in TRL's wheel; none if it is not installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    files = Path(spec.origin).parent.glob("chat_templates/*.jinja")
    found = {}
    for file in sorted(files):
        if not file.stem.endswith("_training"):
            found[file.stem] = file.read_text(encoding="utf-8")
    return found


TEMPLATES = templates()


@pytest.mark.parametrize("name", TEMPLATES)
def test_ends_of_real_templates(name: str) -> None:
    assert end_of_turn(tokenizer_of(TEMPLATES[name])) == expected(name)


def expected(name: str) -> Any:
    """The end of a template's turns: of the longest name in the tables that fits."""
    if name.startswith(CHATML):
        return "<|im_end|>"
    return ENDS[max((key for key in ENDS if name.startswith(key)), key=len)]


def tokenizer_of(template: str) -> Any:
    """A tokenizer that knows all the special tokens in a template."""
    tokenizer = make_tokenizer(template)
    written = re.findall(r"<[|｜/a-zA-Z_][^<>\s'\"]*>", template)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in sorted({*written})])
    tokenizer.add_special_tokens({"eos_token": "</s>", "bos_token": "<s>"})
    return tokenizer


def test_transformers_stops_where_we_stop(speaker: Model, tmp_path: Path) -> None:
    """With the saved folder's generation_config.json, at an end that only the template has."""
    asked = [{"role": "user", "content": "w7 w8"}]
    prompt = encode_prompt(asked, speaker.tokenizer)
    (free,) = generate(speaker, speaker.params, [prompt], max_new_tokens=12, stop_ids=())
    end = next(i for i in free if i not in default_stop_ids(speaker) and i not in free[:3])
    word = speaker.tokenizer.convert_ids_to_tokens(end)
    speaker.tokenizer.add_tokens([AddedToken(word, special=True)])
    template = speaker.tokenizer.chat_template.replace("<|im_end|>", word)
    speaker.tokenizer.chat_template = template
    base = dataclasses.replace(speaker, source="")
    save_model(tmp_path / "model", base.params, base)
    prompt = encode_prompt(asked, speaker.tokenizer)
    (ours,) = generate(base, base.params, [prompt], max_new_tokens=12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert end in theirs.generation_config.eos_token_id
    ids = torch.tensor(np.asarray(prompt)[None].astype(np.int64))
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=0
    )
    new = out[0, ids.shape[1] :].tolist()
    assert new[:-1] == ours
    assert new[-1] in default_stop_ids(base)
