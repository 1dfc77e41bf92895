"""What mkdocs does to the pages of docs/, which are also read without it.

- Links that leave docs/ lead to the repository's source page, or are plain text without `repo_url`.
- `<!-- method: config=pissa source=inits/pissa.py -->` becomes what the code says of a method.
"""

from __future__ import annotations

import ast
import itertools
import os
import posixpath
import re
from pathlib import Path
from typing import Any

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
    """The Markdown that replaces a marker: result, equation and options, from the code.

    Args:
      marker: `key=value` pairs. config: the name of a config; source: a file below lorax_ft/lowrank
        whose docstring has the equation; method or init: its name in the schema.
    """
    given = dict(pair.split("=", 1) for pair in marker.split())
    parts = [_card(given["config"])]
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


def _equation(source: str) -> str:
    text = _docstring(REPOSITORY / "lorax_ft" / "lowrank" / source)
    lines = [_math(line) for line in text.splitlines()]
    return "## Equation\n\n" + "\n".join(lines) + f"\n\nCode: `lorax_ft/lowrank/{source}`."


def _math(line: str) -> str:
    """Equations that stand at the margin of a docstring become code, as indented ones are."""
    is_equation = re.match(r"[A-Z_]\S* ?\S* =|Wᵀ =|Q_t =", line)
    return f"    {line}" if is_equation else line


def _options(given: dict[str, str]) -> str:
    """A table of the options that the schema lists for a method or an init."""
    named = METHODS[given["method"]] if "method" in given else ()
    if "init" in given:
        named = (*named, *INITS[given["init"]].options)
    if not named:
        return ""
    texts = _field_texts(REPOSITORY / "lorax_ft" / "config" / "adapter.py")
    rows = [f"| `--adapter.{name}` | {texts[name]} |" for name in named]
    table = ["| option | |", "|---|---|", *rows]
    # narrow.css shows it otherwise on a phone.
    return "\n".join(["## Options", "", '<div class="options" markdown>', "", *table, "", "</div>"])


def _field_texts(file: Path) -> dict[str, str]:
    """The default and the help text of each field of a file's dataclass."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
    texts = {}
    for field, text in itertools.pairwise(body):
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
