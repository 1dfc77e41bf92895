"""LoRA+ (2402.12354): LoRA with a 16 times higher learning rate for B than for A.

    python scripts/train.py --config configs/lora_plus.py

150 steps of 32 rows, 57 s on two CPU cores shared with other work.
Learning rates: 1e-3 for A, 1.6e-2 for B.
Exact match on unseen questions: 0 % before, 97 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=1e-3, lora_plus_ratio=16),
        train=TrainConfig(output="out/lora_plus", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
