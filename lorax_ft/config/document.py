"""A config file in YAML or JSON, read as a mapping that knows the line of each key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lorax_ft.files import parse_json, read_text

LONGEST = 1_000_000
"""Bytes of a config file."""
MOST_VALUES = 10_000
"""Values of a YAML file, those of repeated anchors counted each time."""


@dataclasses.dataclass(frozen=True)
class Document:
    """The values of a config file, and where they are."""

    path: str
    values: Mapping[str, Any]
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The line of each key, and of each key of a section as "section.key"; JSON has none."""

    def where(self, *keys: str) -> str:
        """The file, with the line of the first of these keys that has one."""
        for key in keys:
            if key in self.lines:
                return f"{self.path}, line {self.lines[key]}"
        return self.path


def read_document(path: str) -> Document:
    """The mapping in a .yaml, .yml or .json file.

    Raises:
      ValueError: the file is missing, malformed, empty or holds something else; it repeats a key,
        makes an object by a tag, or grows without bounds by its anchors. With the line.
    """
    text = read_text(path, longest=LONGEST)
    if path.endswith(".json"):
        return _mapping(path, parse_json(text, path, unique=True), {})
    try:
        return _parse(path, text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_problem(path, error)) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid YAML: nested too deeply") from error


_TAG = "tag:yaml.org,2002:"
_KEY_TAGS = (f"{_TAG}str", f"{_TAG}merge")  # a merge is "<<: *anchor"
_TAGS = (*_KEY_TAGS, *(_TAG + name for name in ("null", "bool", "int", "float", "seq", "map")))


class _Loader(yaml.SafeLoader):
    """YAML that makes plain values only, with the numbers that Python writes."""


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    """PyYAML's, except for numbers and dates.

    PyYAML follows YAML 1.1, where 1e-4 is a text. Trainers read their files by OmegaConf, where it
    is a number.
    """
    number = re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    )
    float_tag, date_tag = f"{_TAG}float", f"{_TAG}timestamp"
    resolvers = {}
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items():
        resolvers[first] = [pair for pair in pairs if pair[0] not in (float_tag, date_tag)]
    for first in "-+.0123456789":
        resolvers.setdefault(first, []).insert(0, (float_tag, number))
    return resolvers


_Loader.yaml_implicit_resolvers = _resolvers()


def _parse(path: str, text: str) -> Document:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ValueError(f"{path} is empty")
        size = _size(root, {}, path)
        if size > MOST_VALUES:
            raise ValueError(f"{path} has {size:,} values with its anchors, above {MOST_VALUES:,}")
        lines = dict(_lines(root, path))
        # A number of thousands of digits, or a text that is marked as a number: !!int a.
        try:
            values = loader.construct_document(root)
        except (ValueError, LookupError, OverflowError) as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return _mapping(path, values, lines)


def _mapping(path: str, values: Any, lines: Mapping[str, int]) -> Document:
    """The document, if its values are a mapping that holds something."""
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else f"{type(values).__name__} {values!r:.40}"
        raise ValueError(f"{path} holds {kind} at the top; a config is keys with values")
    if not values:
        raise ValueError(f"{path} is empty")
    return Document(path, values, lines)


def _size(node: yaml.Node, known: dict[int, int | None], path: str) -> int:
    """The values of a node; those of an alias count each time that it stands for them.

    Raises:
      ValueError: the node contains itself, or one with a tag that makes an object.
    """
    key = id(node)
    if key in known:
        size = known[key]
        if size is None:
            line = node.start_mark.line + 1
            raise ValueError(f"{path}, line {line}: an anchor contains itself")
        return size
    if node.tag not in _TAGS:
        tag, line = node.tag.removeprefix(_TAG), node.start_mark.line + 1
        raise ValueError(f"{path}, line {line}: the tag {tag} makes an object; give plain values")
    known[key] = None
    size = 1 + sum(_size(child, known, path) for child in _children(node))
    known[key] = size
    return size


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _lines(node: yaml.Node, path: str, section: str = "") -> Iterator[tuple[str, int]]:
    """The keys of a mapping, and of the mappings in it, with their lines.

    Raises:
      ValueError: a key is no text, or stands there twice.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{path}, line {line}: a key is a {key.id}; give a name")
        if key.tag not in _KEY_TAGS:
            raise ValueError(
                f"{path}, line {line}: YAML reads the key {key.value} as something else than a "
                f'text; write "{key.value}"'
            )
        if key.value in first:
            raise ValueError(
                f"{path}, line {line}: {key.value} is given twice, first in line "
                f"{first[key.value]}; give it once"
            )
        first[key.value] = line
        yield f"{section}{key.value}", line
        yield from _lines(value, path, f"{section}{key.value}.")


def _problem(path: str, error: yaml.MarkedYAMLError) -> str:
    """What is wrong with a file, in one line."""
    mark = error.problem_mark or error.context_mark
    place = path if mark is None else f"{path}, line {mark.line + 1}"
    problem = error.problem or error.context or "it cannot be read"
    if "\\t" in problem:
        problem = "a tab; YAML is indented by spaces"
    return f"{place}: not valid YAML: {problem}"
