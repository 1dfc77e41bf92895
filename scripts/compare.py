"""Compare methods fairly: same data, order and steps, at one common rate and each at its best.

python scripts/compare.py --config configs/lora.py --rates 3e-4 1e-3 3e-3 1e-2 --common_rate 1e-3
python scripts/compare.py --config configs/lora.py --methods lora dora pissa --seeds 0 1 2 3 4
python scripts/compare.py --config configs/lora.py --methods lora "r64=lora adapter.rank=64"
python scripts/compare.py --config configs/lora.py --benchmark cmmlu
"""

from lorax_ft.commands.compare import main

if __name__ == "__main__":
    main()
