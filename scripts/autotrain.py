"""Fine-tune a model with the options of AutoTrain.

python scripts/autotrain.py llm --train --peft --model MODEL --data-path DATA --project-name out/a
"""

from lorax_ft.commands.autotrain import main

if __name__ == "__main__":
    main()
