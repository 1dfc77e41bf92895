"""Chat with a fine-tuned model.

    python scripts/chat.py --run out/pissa
    python scripts/chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter

The answers are streamed. /help lists the commands.
"""

from lorax_ft.commands.chat import main

if __name__ == "__main__":
    main()
