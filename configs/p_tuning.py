"""P-tuning (2103.10385): prompt tuning, with the prompt the output of an MLP while it trains.

    python scripts/train.py --config configs/p_tuning.py

300 steps of 32 rows: validation loss 4.5328 (with the prompt that it starts from) to 0.2885.
Exact match on unseen questions: 0 % before, 18 % after; a prompt alone says too little here.
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
        prompt=PromptConfig(kind="prompt", virtual_tokens=20, encoder="mlp"),
        data=DataConfig(max_length=100),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(output="out/p_tuning", steps=300, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
