"""Plan a run before a chip is rented: whether it fits, and how fast it could be.

python scripts/plan.py --config configs/qwen2_5_7b_ceval.py --topology v5e:4x4 --mesh.fsdp 16
python scripts/plan.py --config C --topology v5p:2x2x1 v5p:4x4x4 v5p:8x8x16 --plot scaling.png
"""

from lorax_ft.commands.plan import main

if __name__ == "__main__":
    main()
