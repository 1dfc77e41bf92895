"""SmolLM2-135M-Instruct learns to solve GSM8K step by step, with LoRA on all linear layers.

    python scripts/train.py --config configs/smollm2_gsm8k.py

For local copies, add
`--model.path MODEL.gguf --data.train gsm8k/train.jsonl --data.validation gsm8k/test.jsonl`.
A step of 4 × 256 tokens takes 5.0 s on two CPU cores. With one row of 160 tokens instead, the
validation loss fell from 1.85 to 1.06 in 100 steps (docs/LOG.md).
"""

from lorax_ft.config import (
    AdapterConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        adapter=AdapterConfig(rank=8, alpha=16),
        data=DataConfig(
            train=("openai/gsm8k:main",), validation=("openai/gsm8k:main",), max_length=256
        ),
        optim=OptimConfig(learning_rate=5e-4),
        train=TrainConfig(output="out/smollm2_gsm8k", steps=100, batch_size=4, eval_every=50),
        eval=EvalConfig(
            rows=64,
            exact_match_rows=0,
            samples=2,
            answer_pattern=r"#### (-?[\d,.]+)",
            max_new_tokens=192,
        ),
    )
