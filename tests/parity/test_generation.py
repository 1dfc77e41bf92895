"""Greedy continuations equal transformers', token for token. Needs torch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from test_transformers import checkpoint  # noqa: E402

from lorax_ft.data.chat import encode_prompt  # noqa: E402
from lorax_ft.inference.generate import generate  # noqa: E402
from lorax_ft.inference.sampling import Sampling  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402

NEW = 40
PROMPTS = [[5, 17, 3], list(range(10, 40)), [96, 4], [7] * 12]
FAMILIES = [
    "llama_tied",
    "mistral",
    "qwen3",
    "qwen3_moe",
    "qwen3_5",
    "qwen3_5_grouped_values",
    "gemma2",
    "gemma3",
    "gemma4",
    "gpt_oss",
    "phi4_mini",
    "smollm3",
    "olmo2",
]


def continued(model: torch.nn.Module, prompt: list[int], new: int, **options: float) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers(tmp_path: Path, family: str) -> None:
    """Prompts of several lengths in one batch, beyond sliding windows and scaled positions."""
    theirs = checkpoint(tmp_path / "model", family)
    ours = load_model(tmp_path / "model")
    # transformers changes longrope's factors once a text passes the original length; ours chooses
    # them at the start, by prompt plus max_new_tokens.
    prompts = PROMPTS[1:2] if family == "phi4_mini" else PROMPTS
    rows = generate(ours, ours.params, prompts, max_new_tokens=NEW, stop_ids=())
    assert rows == [continued(theirs, prompt, NEW) for prompt in prompts]
    assert len({token for row in rows for token in row}) > 5


def test_longrope_goes_by_what_a_text_may_grow_to(tmp_path: Path) -> None:
    """Not by the size of the cache, nor by the other rows."""
    theirs = checkpoint(tmp_path / "model", "phi4_mini", original=64)
    ours = load_model(tmp_path / "model")
    prompts = [list(range(20, 60)), [5, 6, 7], list(range(9, 89))]
    rows = generate(ours, ours.params, prompts, max_new_tokens=10, stop_ids=())
    assert rows == [continued(theirs, prompt, 10) for prompt in prompts]


def test_repetition_penalty_is_transformers(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "model", "llama_tied")
    ours = load_model(tmp_path / "model")
    penalty = Sampling(repetition_penalty=1.7)
    rows = generate(ours, ours.params, PROMPTS, max_new_tokens=NEW, stop_ids=(), sampling=penalty)
    assert rows == [continued(theirs, prompt, NEW, repetition_penalty=1.7) for prompt in PROMPTS]
    assert rows != generate(ours, ours.params, PROMPTS, max_new_tokens=NEW, stop_ids=())


QUESTIONS = [
    *(
        "What is the capital of France?",
        "Name three prime numbers.",
        "Why is the sky blue?",
        "Write a haiku on rain.",
    ),
    *(
        "What is 17 + 25?",
        "Translate 'good morning' into Spanish.",
        "Who wrote Hamlet?",
        "How do bees make honey?",
    ),
    *(
        "Explain gravity to a child.",
        "List the planets.",
        "What does HTTP stand for?",
        "Give me a pancake recipe.",
    ),
    *(
        "Summarize the plot of Romeo and Juliet.",
        "What is a binary search?",
        "When did the first world war begin?",
    ),
    *(
        "Suggest a name for a cat.",
        "What is photosynthesis?",
        "Say hello in five languages.",
        "How far is the moon?",
    ),
    "Write a Python function that reverses a list.",
]


@pytest.mark.skipif(
    "LORAX_FT_SMOLLM2_FOLDER" not in os.environ, reason="set LORAX_FT_SMOLLM2_FOLDER to a folder"
)
def test_smollm2_is_transformers() -> None:
    """20 prompts of 64 tokens in float32."""
    folder = os.environ["LORAX_FT_SMOLLM2_FOLDER"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder)
    prompts = [
        list(encode_prompt([{"role": "user", "content": question}], ours.tokenizer))
        for question in QUESTIONS
    ]
    prompts = [(prompt * 4)[:64] for prompt in prompts]
    rows = generate(ours, ours.params, prompts, max_new_tokens=64, stop_ids=())
    assert np.shape(rows) == (20, 64)
    assert rows == [continued(theirs, prompt, 64) for prompt in prompts]
