"""LoRA-FA (2308.03303): LoRA with a frozen A, so that only B has gradients and moments.

    python scripts/train.py --config configs/lora_fa.py

150 steps of 32 rows, 98 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 98 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32, freeze=("lora_a",)),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=5e-3),
        train=TrainConfig(output="out/lora_fa", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
