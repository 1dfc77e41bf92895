"""Files of other libraries: Hugging Face checkpoints and tokenizers, GGUF files, PEFT adapters."""
