"""The recipe of a widely read comparison: Qwen2.5-7B-Instruct on C-Eval, rank 8, one epoch.

    python scripts/train.py --config configs/qwen2_5_7b_ceval.py
    python scripts/evaluate.py --run out/qwen2_5_7b_ceval --tasks choices=ceval --shots 0 --chat

The folder ceval is the unpacked archive of C-Eval: it trains on dev and is evaluated on val, whose
answers are public. All linear layers, alpha 16, dropout 0.05, learning rate 1e-4 with a cosine
schedule, 4 microbatches of one row. The recipe has one rate for all methods; compare them by

    python scripts/compare.py --config configs/qwen2_5_7b_ceval.py --common_rate 1e-4
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
        model=ModelConfig(path="Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16"),
        adapter=AdapterConfig(rank=8, alpha=16, dropout=0.05),
        data=DataConfig(
            train=("ceval/dev/*.csv",), validation=("ceval/val/*.csv",), max_length=512
        ),
        optim=OptimConfig(learning_rate=1e-4, schedule="cosine"),
        train=TrainConfig(output="out/qwen2_5_7b_ceval", epochs=1, batch_size=4, microbatches=4),
        eval=EvalConfig(rows=0, exact_match_rows=0, samples=0),
    )
