"""Write a config of another trainer, or the config.json of a run, as one of our Python configs.

python scripts/convert_config.py run.yaml --output run.py
python scripts/convert_config.py adapter/adapter_config.json --output adapter.py
"""

from lorax_ft.commands.convert_config import main

if __name__ == "__main__":
    main()
