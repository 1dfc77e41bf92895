"""LoRA (2106.09685): A random, B zero, scale alpha / r, on all linear layers.

    python scripts/train.py --config configs/lora.py

150 steps of 32 rows, 57 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 98 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(output="out/lora", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
