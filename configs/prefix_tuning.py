"""Prefix tuning (2101.00190): keys and values of virtual tokens train in every layer, by an MLP.

    python scripts/train.py --config configs/prefix_tuning.py

600 steps of 32 rows: validation loss 5.2256 (with the prefix that it starts from) to 0.0151.
Exact match on unseen questions: 0 % before, 92 % after (69 % after 300 steps).
"""

from lorax_ft.config import (
    AdapterConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    PromptConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(targets=()),
        prompt=PromptConfig(kind="prefix", virtual_tokens=20, encoder="mlp"),
        data=DataConfig(max_length=100),
        optim=OptimConfig(learning_rate=1e-2),
        train=TrainConfig(output="out/prefix_tuning", steps=600, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
