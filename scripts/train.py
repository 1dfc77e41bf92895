"""Fine-tune a model.

python scripts/train.py --config configs/pissa.py
python scripts/train.py --config configs/dora.py --model.path MODEL --data.train FILE.jsonl
python scripts/train.py --config configs/lora.py --multihost --mesh.fsdp 16  # on every host
"""

from lorax_ft.commands.train import main

if __name__ == "__main__":
    main()
