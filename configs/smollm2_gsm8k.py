"""SmolLM2-135M-Instruct learns GSM8K's working and its "#### answer", with LoRA on all linear layers."""

from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        adapter=AdapterConfig(rank=8, alpha=16),
        data=DataConfig(train=("openai/gsm8k:main",), validation=("openai/gsm8k:main",), max_length=256),
        optim=OptimConfig(learning_rate=5e-4),
        train=TrainConfig(output="out/smollm2_gsm8k", steps=100, batch_size=4, eval_every=50),
        eval=EvalConfig(rows=64, exact_match_rows=0, samples=2, answer_pattern=r"#### (-?[\d,.]+)", max_new_tokens=192),
    )
