"""LoKr (2212.10650): a Kronecker product of two small matrices is added.

    python scripts/train.py --config configs/lokr.py

300 steps of 32 rows: validation loss 5.2045 to 0.0066.
Exact match on unseen questions: 0 % before, 98 % after (a rate of 5e-3 and 150 steps: 65 %).
"""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        adapter=AdapterConfig(method="lokr", rank=8, alpha=16),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=1e-2),
        train=TrainConfig(output="out/lokr", steps=300, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
