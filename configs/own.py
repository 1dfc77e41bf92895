"""A starting point for your own model and data: LoRA on all linear layers, one epoch.

    python scripts/train.py --config configs/own.py --model.path MODEL --data.train FILE.jsonl

MODEL is a Hugging Face folder, a Hub id or a .gguf file. With --dry-run the command only shows what
would train, and the first batch.
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
        model=ModelConfig(path="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="bfloat16"),
        adapter=AdapterConfig(rank=16, alpha=32),
        data=DataConfig(max_length=1024, pack=True),
        optim=OptimConfig(learning_rate=2e-4),
        train=TrainConfig(
            output="out/own", epochs=1, batch_size=8, microbatches=4, eval_every=100, save_every=100
        ),
        eval=EvalConfig(exact_match_rows=0, max_new_tokens=128),
    )
