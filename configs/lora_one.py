"""LoRA-One (2502.01235): A B starts as one step down the full gradient.

So the results "before training" already include that step.

    python scripts/train.py --config configs/lora_one.py

150 steps of 32 rows, 108 s (5 s to measure gradients) on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 97 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32, init="lora_one"),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=5e-3),
        train=TrainConfig(output="out/lora_one", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
