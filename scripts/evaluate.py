"""Evaluate a model, or an adapter against its base.

    python scripts/evaluate.py --model MODEL --tasks choices=data/cmmlu
    python scripts/evaluate.py --run out/pissa --tasks choices=data/mmlu loss=test.jsonl
    python scripts/evaluate.py --model MODEL --adapter my/adapter --tasks gsm8k=test.jsonl

Tasks are choices=FOLDER (MMLU, C-Eval or CMMLU), loss=DATA, gsm8k=DATA and text=DATA. With an
adapter, the base, the adapter off and the adapter on are compared on the same items.
docs/EVALUATION.md describes them.
"""

from lorax_ft.commands.evaluate import main

if __name__ == "__main__":
    main()
