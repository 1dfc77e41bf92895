"""What mkdocs does to the pages of docs/, which are also read without it.

- Links that leave docs/ lead to the repository's source page, or are plain text without `repo_url`.
- `<!-- method: config=pissa source=inits/pissa.py -->` becomes what the code says of a method.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import os
import posixpath
import re
import shlex
from pathlib import Path
from typing import Any

from lorax_ft.config import AdapterConfig, Config
from lorax_ft.schema import INITS, METHODS

REPOSITORY = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s]*)\)")
METHOD = re.compile(r"<!-- method: (.*?) -->")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """mkdocs' event: the Markdown of a page before it is rendered."""
    markdown = METHOD.sub(lambda match: facts(match[1]), markdown)
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    return LINK.sub(lambda match: _link(match, folder, config.repo_url), markdown)


def facts(marker: str) -> str:
    """The Markdown that replaces a marker: result, step, equation and options, from the code.

    Args:
      marker: `key=value` pairs. config: the name of a config; step: the method's name in the table
        of docs/PERFORMANCE.md; source: a file below lorax_ft/lowrank whose docstring has the
        equation; options: names such as prompt.kind, with commas between; method or init: its name
        in the schema, whose options follow.
    """
    given = dict(pair.split("=", 1) for pair in shlex.split(marker))
    parts = [_card(given["config"])]
    if "step" in given:
        parts.append(_step(given["step"]))
    if "source" in given:
        parts.append(_equation(given["source"]))
    if options := _options(given):
        parts.append(options)
    return "\n\n".join(parts)


def _docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _card(name: str) -> str:
    """A config's docstring: command, time and measured result."""
    text = _docstring(REPOSITORY / "configs" / f"{name}.py")
    body = text.partition("\n\n")[2]
    return f"## Config and result\n\n{body}"


def _step(method: str) -> str:
    """The measured cost of a training step: the method's row in the table of every method."""
    text = (REPOSITORY / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    section = text.partition("\n### Every method\n")[2].partition("\n#")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    names = rows[0]
    (found,) = [row for row in rows if row[0] == method]
    trained, times, memory = (
        found[names.index(name)] for name in ("trained, million", "against LoRA", "peak GB")
    )
    return (
        f"A training step of {method} on SmolLM2-135M takes {times} × LoRA's time and {memory} GB "
        f"at its peak; {trained} million parameters train "
        "([every method](../PERFORMANCE.md#every-method))."
    )


def _equation(source: str) -> str:
    text = _docstring(REPOSITORY / "lorax_ft" / "lowrank" / source)
    lines = [_math(line) for line in text.splitlines()]
    return "## Equation\n\n" + "\n".join(lines) + f"\n\nCode: `lorax_ft/lowrank/{source}`."


def _math(line: str) -> str:
    """Equations that stand at the margin of a docstring become code, as indented ones are."""
    is_equation = re.match(r"[A-Z_]\S* ?\S* =|Wᵀ =|Q_t =", line)
    return f"    {line}" if is_equation else line


def _options(given: dict[str, str]) -> str:
    """A table of the page's own options, and the schema's for its method and its init."""
    named = given["options"].split(",") if "options" in given else []
    chosen = []
    if (method := given.get("method")) is not None:
        named += [f"adapter.{name}" for name in METHODS[method]]
        if method != AdapterConfig.method:
            chosen.append(f"`--adapter.method {method}`")
    if (init := given.get("init")) is not None:
        named += [f"adapter.{name}" for name in INITS[init].options]
        chosen.append(f"`--adapter.init {init}`")
    if not named:
        return ""
    rows = [f"| `--{name}` | {_text(name)} |" for name in dict.fromkeys(named)]
    table = ["| option | |", "|---|---|", *rows]
    intro = [f"{' '.join(chosen)}, and:", ""] if chosen else []
    # narrow.css shows it otherwise on a phone.
    start = ["## Options", "", *intro, '<div class="options" markdown>', ""]
    return "\n".join([*start, *table, "", "</div>"])


def _text(option: str) -> str:
    """The help text and the default of an option such as "prompt.kind"."""
    section, name = option.split(".")
    return _texts(section)[name]


@functools.cache
def _texts(section: str) -> dict[str, str]:
    """The help text and the default of each field of a section of `Config`."""
    (tree,) = ast.parse(inspect.getsource(type(getattr(Config(), section)))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, text in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            default = ast.unparse(field.value) if field.value else ""
            words = " ".join(ast.literal_eval(text.value).split()).replace("|", "\\|")
            texts[ast.unparse(field.target)] = f"{words} Default: `{default}`."
    return texts


def _link(match: re.Match[str], folder: str, repo_url: str | None) -> str:
    text, target = match.groups()
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(folder, path))
    if path == "docs" or path.startswith("docs/"):
        return match[0]
    if not repo_url:
        return text if "`" in text or os.path.basename(path) in text else f"{text} (`{path}`)"
    anchor = f"#{anchor}" if anchor else ""
    return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{anchor})"
