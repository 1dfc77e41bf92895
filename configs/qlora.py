"""QLoRA (2305.14314): the frozen base in 4-bit NF4, its block scales in 8 bits, and LoRA in float32 on top.

    python scripts/train.py --config configs/qlora.py

150 steps of 32 rows, 74 s in all on two CPU cores, beside other work. The base's linear layers take 4.13 bits a
parameter. Exact match on unseen questions: 0 % before, 100 % after.
"""

from lorax_ft.config import (
    AdapterConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    QuantConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        quant=QuantConfig(format="nf4"),
        adapter=AdapterConfig(rank=16, alpha=32),
        data=DataConfig(max_length=80),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(output="out/qlora", steps=150, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
