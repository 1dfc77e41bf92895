"""MiSS (2409.15371): slices of each layer's input share one small matrix, initially zero.

    python scripts/train.py --config configs/miss.py

150 steps of 32 rows, 93 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 98 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(method="miss", rank=16),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(output="out/miss", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
