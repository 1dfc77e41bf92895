"""MiCA (2604.01694): B is frozen at the directions that each weight uses least; only A trains.

    python scripts/train.py --config configs/mica.py

150 steps of 32 rows: validation loss 5.2045 to 0.0070.
Exact match on unseen questions: 0 % before, 96 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32, init="mica", freeze=("lora_b",)),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=5e-3),
        train=TrainConfig(output="out/mica", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
