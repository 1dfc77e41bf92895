"""LoRA-GA (2407.05000): initialized so that the first step follows full fine-tuning's gradient.

    python scripts/train.py --config configs/lora_ga.py

150 steps of 32 rows, 127 s (7 s to measure gradients) on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 98 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=16, init="lora_ga"),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(output="out/lora_ga", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
