"""Generate answers with a fine-tuned model.

    python scripts/generate.py --run out/pissa "What is 12 + 30?"
    python scripts/generate.py --run out/pissa --file questions.txt > answers.jsonl
    python scripts/generate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter

    python scripts/generate.py --run out/pissa "Why?" --template_args enable_thinking=false

Without a question or a file, it reads questions from standard input, one per line.
"""

from lorax_ft.commands.generate import main

if __name__ == "__main__":
    main()
