"""Config files: Python with `get_config()`, or the config.json of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lorax_ft.checks import check
from lorax_ft.config.run import Config
from lorax_ft.files import read_text

PACKAGE = Path(__file__).parents[1]


def load_config(path: str | Path) -> Config:
    """The config of a file.

    Args:
      path: a .py file with `get_config()`, the config.json of a run, or the name of a config that
        comes with the library, such as "pissa".

    Raises:
      ValueError: the file is missing, raises an exception, or holds no valid config.
    """
    path = _locate(Path(path))
    if path.suffix == ".json":
        return _from_json(path)
    # importlib returns no loader for other suffixes.
    check(path.suffix == ".py", f"{path} is neither a .py file with get_config() nor a config.json")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    # The file is user code: it may raise anything.
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    check(
        isinstance(config, Config),
        f"{path}: get_config() returned {type(config).__name__}, not a Config",
    )
    return config


def packaged_configs() -> dict[str, Path]:
    """The config files that come with the library, by name."""
    # In a wheel they are in the package, in a checkout beside it.
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        files = sorted(folder.glob("*.py"))
        if files:
            return {file.stem: file for file in files}
    return {}


def _locate(path: Path) -> Path:
    """The file itself, or the packaged one of this name.

    configs/pissa.py is found where there is no checkout, too.
    """
    if path.is_file():
        return path
    packaged = packaged_configs()
    is_name = path.suffix in ("", ".py") and path.parent in (Path(), Path("configs"))
    if is_name and path.stem in packaged:
        return packaged[path.stem]
    siblings = sorted(file.name for file in path.parent.glob("*.py"))
    message = f"there is no config file {path}"
    if path.parent != Path() and siblings:
        message += f"; files in {path.parent}: {', '.join(siblings)}"
    elif packaged:
        message += f"; configs of the library: {', '.join(packaged)}"
    raise ValueError(message)


def _from_json(path: Path) -> Config:
    try:
        return Config.from_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not the config of a run: {error}") from error
