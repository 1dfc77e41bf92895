"""Train many adapters over one base in one program, and find the best settings.

python scripts/sweep.py --config configs/lora.py --sweep optim.learning_rate=1e-4,1e-3 \
    train.seed=0,1,2
python scripts/sweep.py --config configs/lora.py --sweep optim.learning_rate=1e-5..1e-2:16 \
    --budget halve
python scripts/sweep.py --config configs/lora.py --trials 32 \
    --sweep optim.learning_rate=1e-5..1e-2 optim.lora_plus_ratio=1..16
python scripts/train.py --config out/lora-sweep/best.py
"""

from lorax_ft.commands.sweep import main

if __name__ == "__main__":
    main()
