"""The configuration of a run: frozen dataclasses that validate their values. Imports no JAX.

A config file is a Python file that defines `get_config() -> Config`, or YAML or JSON, also that of
another trainer (`foreign`). It is loaded by `lorax-ft train --config FILE`, which accepts overrides
such as `--adapter.rank 32`. The docstring under each field is its `--help` text; tyro keeps its
line breaks, so they stand between clauses.
"""

from lorax_ft.config.adapter import AdapterConfig
from lorax_ft.config.data import EMBEDDED_DATA, DataConfig
from lorax_ft.config.load import load_config
from lorax_ft.config.model import ASSETS, EMBEDDED_MODEL, MeshConfig, ModelConfig, QuantConfig
from lorax_ft.config.prompt import PromptConfig
from lorax_ft.config.run import Config
from lorax_ft.config.training import EvalConfig, OptimConfig, TrainConfig

__all__ = [
    "ASSETS",
    "EMBEDDED_DATA",
    "EMBEDDED_MODEL",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PromptConfig",
    "QuantConfig",
    "TrainConfig",
    "load_config",
]
