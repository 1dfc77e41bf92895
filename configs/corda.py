"""CorDA (2406.05223): A and B start from the directions of W that the data uses most (ipm).

`--adapter.corda_mode kpm` takes those that it uses least instead, to preserve what the data covers.

    python scripts/train.py --config configs/corda.py

150 steps of 32 rows, 125 s (7 s to measure inputs) on two CPU cores shared with other work.
Exact match on unseen questions: 0 % before, 96 % after.
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(rank=16, alpha=16, init="corda", corda_mode="ipm"),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(output="out/corda", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
