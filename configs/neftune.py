"""NEFTune (2310.05914): LoRA with uniform noise on the embeddings during training.

    python scripts/train.py --config configs/neftune.py

150 steps of 32 rows, 72 s on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 97 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=32),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(
            output="out/neftune", steps=150, batch_size=32, eval_every=30, neftune_alpha=5.0
        ),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
