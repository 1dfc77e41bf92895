"""Bottleneck adapters (1902.00751): a small network with a ReLU behind o_proj and down_proj.

    python scripts/train.py --config configs/bottleneck.py

RESULT
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(method="bottleneck", rank=16, targets=("o_proj", "down_proj")),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(output="out/bottleneck", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
