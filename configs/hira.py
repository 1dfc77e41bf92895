"""HiRA (ICLR 2025): the elementwise product of each weight and A B is added.

    python scripts/train.py --config configs/hira.py

150 steps of 32 rows: validation loss 5.2045 to 0.0051.
Exact match on unseen questions: 0 % before, 97 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(method="hira", rank=16),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=2e-2),
        train=TrainConfig(output="out/hira", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
