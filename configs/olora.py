"""OLoRA (2406.01775): A and B start from a QR decomposition of W, removed from the base.

    python scripts/train.py --config configs/olora.py

150 steps of 32 rows, 50 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 97 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=16, init="olora"),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(output="out/olora", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
