"""Other people's names and files: Hugging Face checkpoints, GGUF files, PEFT adapters and tokenizers."""
