"""Merge an adapter into its base model, or several adapters with weights.

    python scripts/merge.py --run out/pissa --output out/merged
    python scripts/merge.py --model MODEL --adapter my/adapter --output out/merged
    python scripts/merge.py --run out/pissa --also other/adapter --weights 0.7 0.3 --output out/both

The output is a Hugging Face checkpoint, which transformers loads.
"""

from lorax_ft.commands.merge import main

if __name__ == "__main__":
    main()
