"""The documentation: its examples run, and nothing is missing. Needs no mkdocs."""

import importlib
import importlib.util
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorax_ft
from lorax_ft.config import load_config
from lorax_ft.data.batches import Batches
from lorax_ft.options import flag_with_value, given_options, options

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
RECIPES = {"own", "qwen2_5_7b_ceval", "smollm2_gsm8k"}


def run_example(page: str, *, place: int = 0) -> dict[str, Any]:
    """The names that a tested block of a page defines."""
    text = (DOCS / page).read_text()
    code = re.findall(r"<!-- tested -->\n```python\n(.*?)```", text, re.DOTALL)[place]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, page, "exec"), names)
    return names


def test_the_loop_learns_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = run_example("loop.md")["losses"]
    assert losses[-1] < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("place", "name"), enumerate(["linen", "nnx"]))
def test_a_flax_model_starts_as_its_base_learns_and_merges(place: int, name: str) -> None:
    names = run_example("own_model.md", place=place)
    apply = names["model"].apply if name == "linen" else names["model"]
    arguments = ({"params": names["base"]}, names["x"]) if name == "linen" else (names["x"],)
    base_logits = apply(*arguments)
    np.testing.assert_allclose(names["start"], base_logits, atol=1e-6)
    assert names["losses"][-1] < names["losses"][0]
    np.testing.assert_allclose(names["merged_logits"], names["adapted_logits"], atol=1e-5)


def test_a_soft_prompt_is_all_that_trains_and_stands_before_each_sample() -> None:
    names = run_example("methods/prompt_tuning.md")
    virtual = names["virtual"]
    (prompt,) = names["trained"]["soft_prompt"].values()
    assert list(names["trained"]) == ["soft_prompt"]
    assert len(prompt) == len(virtual)
    data = names["data"]
    batches = Batches(rows=data.train.rows, batch_size=8, max_length=data.max_length, seed=0)
    tokens = batches.batch(0)["tokens"]
    assert tokens.shape[1] <= 100
    np.testing.assert_array_equal(tokens[:, : len(virtual)], np.tile(virtual, (8, 1)))


def test_each_config_has_its_page() -> None:
    configs = {file.stem for file in (ROOT / "configs").glob("*.py")} - RECIPES
    pages = {file.stem for file in (DOCS / "methods").glob("*.md")} - {"index"}
    assert pages == configs
    for name in pages:
        text = (DOCS / "methods" / f"{name}.md").read_text()
        assert re.search(rf"<!-- method: config={name}\b", text)


def test_each_method_page_says_all() -> None:
    hooks = load_hooks()
    for name, text in method_pages().items():
        shown = hooks.METHOD.sub(lambda match: hooks.facts(match[1]), text)
        assert re.search(r"^    .*[=←]|^## Equation$", shown, re.MULTILINE), f"{name}: equation"
        for part in ("**When:**", "**Cost:**", "Exact match on unseen questions", "| `--"):
            assert part in shown, f"{name}: {part}"
        # Most were never compared with others, so that page has nothing on them.
        assert "../COMPARISON.md)" not in text, f"{name}: point to a section or to the log"
        for option in own_options(name):
            assert f"`--{option}" in shown, f"{name}: --{option}"


def method_pages() -> dict[str, str]:
    """The text of each method's page."""
    files = sorted((DOCS / "methods").glob("*.md"))
    return {file.stem: file.read_text() for file in files if file.stem != "index"}


def load_hooks() -> Any:
    """docs/hooks.py, which mkdocs loads by its path."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_options(name: str) -> list[str]:
    """The options by which a config differs from configs/lora.py, but for sizes and rates."""
    sizes = ("adapter.rank", "adapter.alpha", "data.max_length", "optim.learning_rate")
    course = ("train.output", "train.steps", "train.eval_every")
    own, lora = (load_config(ROOT / "configs" / f"{config}.py") for config in (name, "lora"))
    found = []
    for option in options(type(own)):
        section, field = option.split(".")
        differs = getattr(getattr(own, section), field) != getattr(getattr(lora, section), field)
        if differs and option not in (*sizes, *course):
            found.append(option)
    return found


def test_the_page_on_bfloat16_names_the_configs_that_ask_for_it() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    section = text.partition("### bfloat16 is slow on a CPU\n")[2].partition("\n#")[0]
    for file in (ROOT / "configs").glob("*.py"):
        asks = load_config(file).model.dtype == "bfloat16"
        assert (f"`{file.stem}`" in section) == asks, file.stem


def test_the_navigation_lists_each_page_once() -> None:
    pages = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    listed = re.findall(r"[\w/]+\.md", NAV)
    assert sorted(listed) == sorted(pages)


def test_the_api_page_has_each_public_name() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    for path in listed:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    names = {path.rpartition(".")[2] for path in listed}
    # It is deprecated.
    assert names == set(lorax_ft.__all__) - {"switched_off"}


def our_side() -> list[str]:
    """The code in the right column of the tables of migration.md."""
    rows = re.findall(r"^\| .* \| (.*) \|$", (DOCS / "migration.md").read_text(), re.MULTILINE)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row)]


def test_our_side_of_the_migration_tables_exists() -> None:
    sides = our_side()
    options = {name for side in sides for name in re.findall(r"--([a-z]+\.[a-z_]+)", side)}
    functions = {name for side in sides for name in re.findall(r"lft\.(\w+)", side)}
    assert options
    assert functions
    assert functions <= set(lorax_ft.__all__)
    config = load_config(ROOT / "configs" / "lora.py")
    for option in options:
        section, field = option.split(".")
        assert hasattr(getattr(config, section), field), option
    for name in {name for side in sides for name in re.findall(r"lorax-ft (\w+)", side)}:
        assert (ROOT / "lorax_ft" / "commands" / f"{name}.py").is_file(), name


# The log is history.
PAGES = (ROOT / "README.md", *sorted({*DOCS.rglob("*.md")} - {DOCS / "LOG.md"}))
COMMAND = re.compile(
    r"(?:python scripts/(\w+)\.py|lorax-ft ([a-z-]+))\s+"
    r"((?:--|\$\w+ --|[^\s`|]+\.\w+ --)[^`\n|;#]*)"
)


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page with their arguments, in blocks and in lines of text."""
    text = page.read_text().replace("\\\n", " ")
    found = []
    for script, command, arguments in COMMAND.findall(text):
        # One of the commands is the last argument of another, in quotes.
        argv = shlex.split(arguments if arguments.count("'") % 2 == 0 else arguments.rstrip("'"))
        found.append(((script or command).replace("-", "_"), argv))
    return found


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def slug(heading: str) -> str:
    """The anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def test_the_pages_have_commands() -> None:
    assert sum(len(commands_of(page)) for page in PAGES) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_take_their_options(page: Path) -> None:
    for name, argv in commands_of(page):
        if not (ROOT / "lorax_ft" / "commands" / f"{name}.py").is_file():
            assert (ROOT / "scripts" / f"{name}.py").is_file(), name
            continue
        if name == "autotrain":
            continue
        args_type = importlib.import_module(f"lorax_ft.commands.{name}").Args
        known = options(args_type)
        given = {re.sub(r"(^|\.)no_", r"\1", option) for option in given_options(argv)}
        assert given <= {*known, "help", "multihost"}, (name, argv)
        assert flag_with_value(argv, args_type) is None, argv
        config = argv[argv.index("--config") + 1] if "--config" in argv else ""
        if config.startswith("configs/"):
            assert (ROOT / config).is_file(), config


def test_the_command_of_lm_eval_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"^python -m ([\w.]+) ", (DOCS / "EVALUATION.md").read_text(), re.M)
    # As if it were not installed; both, as another test may have imported it.
    for name in ("lm_eval", "lm_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, command, raising=False)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(command, run_name="__main__")
    said = 'error: lm_eval is not installed; run pip install "lorax_ft[lm-eval]"\n'
    assert capsys.readouterr().err == said
    with pytest.raises(ModuleNotFoundError, match="lm_eval is not installed"):
        importlib.import_module(command)


def test_the_rows_of_a_command_divide_over_its_mesh() -> None:
    found = [(name, argv) for page in PAGES for name, argv in commands_of(page)]
    on_meshes = [argv for name, argv in found if name == "train" and "--mesh.fsdp" in argv]
    on_meshes = [argv for argv in on_meshes if "--config" in argv]
    assert on_meshes
    for argv in on_meshes:
        given = dict(itertools.pairwise(argv))
        config = load_config(ROOT / given["--config"])
        rows = int(given.get("--train.batch_size", config.train.batch_size))
        microbatches = int(given.get("--train.microbatches", config.train.microbatches))
        devices = int(given["--mesh.data"]) * int(given["--mesh.fsdp"])
        assert rows // microbatches % devices == 0, argv
