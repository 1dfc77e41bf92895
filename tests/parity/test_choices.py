"""Choices have the log-probabilities of transformers' full forward. Needs torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from benchmark_cases import CMMLU, MMLU, write  # noqa: E402

from lorax_ft.config import EMBEDDED_MODEL  # noqa: E402
from lorax_ft.data.chat import Sample  # noqa: E402
from lorax_ft.data.shapes import LETTERS  # noqa: E402
from lorax_ft.evaluation.benchmark import read_benchmark  # noqa: E402
from lorax_ft.evaluation.likelihood import row_losses  # noqa: E402
from lorax_ft.evaluation.multiple_choice import encode_benchmark, evaluate_choices  # noqa: E402
from lorax_ft.evaluation.prompts import PROMPTS, prompts_of  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402


def random_checkpoint(folder: Path) -> torch.nn.Module:
    """A random Llama with the embedded model's tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=768,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(EMBEDDED_MODEL) / name, folder / name)
    return theirs


@pytest.mark.parametrize("files", [CMMLU, MMLU])
@pytest.mark.parametrize("style", ["standard", "lm-eval"])
def test_choices_are_transformers(tmp_path: Path, files: dict[str, str], style: str) -> None:
    theirs = random_checkpoint(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    benchmark = read_benchmark(write(tmp_path / "data", files), shots=2)
    encoded = encode_benchmark(benchmark, ours, shots=2, style=style)
    shared = evaluate_choices(ours, ours.params, encoded)
    single = evaluate_choices(ours, ours.params, encoded, share=False)

    prompt_format = PROMPTS[benchmark.format, style]
    texts = []
    for subject in benchmark.subjects:
        texts += prompts_of(subject, prompt_format, shots=2)
    expected = []
    for text in texts:
        row = []
        for letter in LETTERS:
            # The whole text at once, so that the tokenizer decides where the letter begins.
            tokens = tokenizer(f"{text}{prompt_format.space}{letter}")["input_ids"]
            with torch.no_grad():
                logits = theirs(torch.tensor([tokens])).logits[0, -2]
            row.append(torch.log_softmax(logits, -1)[tokens[-1]].item())
        expected.append(row)
    np.testing.assert_allclose(shared.log_probs, expected, atol=1e-4)
    np.testing.assert_allclose(single.log_probs, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


def test_losses_are_transformers(tmp_path: Path) -> None:
    theirs = random_checkpoint(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    rng = np.random.default_rng(0)
    samples = []
    for length in (9, 40, 17):
        tokens = rng.integers(3, 768, length).astype(np.int32)
        samples.append(Sample(tokens, rng.random(length) < 0.5))
    losses = row_losses(ours, ours.params, samples)
    for sample, total in zip(samples, losses.sums, strict=True):
        tokens = torch.tensor(sample.tokens[None].astype(np.int64))
        labels = torch.where(torch.tensor(sample.mask[None]), tokens, -100)
        with torch.no_grad():
            mean = theirs(tokens, labels=labels).loss.item()
        assert total / sample.mask[1:].sum() == pytest.approx(mean, abs=1e-5)
