"""Orthogonal initialization: random A and B with A B = 0; both train from the first step.

    python scripts/train.py --config configs/orthogonal.py

150 steps of 32 rows, 90 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 96 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32, init="orthogonal"),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(output="out/orthogonal", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
