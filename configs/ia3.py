"""IA3 (2205.05638): trained vectors scale keys, values and the input of down_proj.

    python scripts/train.py --config configs/ia3.py

150 steps of 32 rows.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(
            method="ia3",
            targets=("k_proj", "v_proj", "down_proj"),
            feedforward=("down_proj",),
        ),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=5e-2),
        train=TrainConfig(output="out/ia3", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
