"""Riemannian preconditioned LoRA (2402.02347): scaled AdamW on A and B.

    python scripts/train.py --config configs/riemannian.py

150 steps of 32 rows, 188 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 99 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32),
        data=DataConfig(max_length=80),
        optim=OptimConfig(riemannian=True, learning_rate=3e-3),
        train=TrainConfig(output="out/riemannian", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
