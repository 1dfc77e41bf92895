"""Export a fine-tuned model for another program.

    python scripts/export.py --run out/pissa --target vllm --output out/served
    python scripts/export.py --run out/pissa --target gguf --output out/tuned.gguf

Targets:
  peft: the adapter as a PEFT folder.
  vllm: the adapter for vLLM, or the merged model if vLLM does not support the adapter (DoRA).
  hf: the merged model as a folder for transformers.
  gguf: the merged model as a file for llama.cpp.
"""

from lorax_ft.commands.export import main

if __name__ == "__main__":
    main()
