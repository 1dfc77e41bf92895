"""MiLoRA (2406.09044): A B starts as the smallest singular triples of W, removed from the base.

    python scripts/train.py --config configs/milora.py

150 steps of 32 rows, 122 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 98 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32, init="milora"),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(output="out/milora", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
