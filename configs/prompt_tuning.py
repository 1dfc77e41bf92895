"""Prompt tuning (2104.08691): embeddings of virtual tokens before each sample train, nothing else.

    python scripts/train.py --config configs/prompt_tuning.py

600 steps of 32 rows: validation loss 4.3829 (with the prompt that it starts from) to 0.1891.
Exact match on unseen questions: 0 % before, 30 % after, which is as far as a prompt came here.
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
        prompt=PromptConfig(kind="prompt", virtual_tokens=20),
        data=DataConfig(max_length=100),
        optim=OptimConfig(learning_rate=1e-1),
        train=TrainConfig(output="out/prompt_tuning", steps=600, batch_size=32, eval_every=30),
        eval=EvalConfig(answer_pattern=r"#### (-?\d+)", max_new_tokens=32),
    )
