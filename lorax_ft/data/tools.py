"""Tool calls and tool schemas, in the form that chat templates of transformers read."""

from __future__ import annotations

import json
from typing import Any

from lorax_ft.data.fields import parse_json, type_name
from lorax_ft.files import read_text

_FIELDS_OF_CALL = ("function", "name", "arguments", "parameters")
_CALL_EXAMPLE = '{"name": "f", "arguments": {"x": 1}}'
_DOCUMENT_EXAMPLE = '{"title": "...", "text": "..."}'
_TOOL_EXAMPLE = '{"type": "function", "function": {"name": "f", "parameters": {...}}}'


def tool_calls_of(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Converts tool calls to objects with a type and a function of a name and arguments.

    Args:
      value: a call or a list of calls, also as JSON text; a call may have its function's name and
        arguments in a field `function`, and arguments may be JSON text.
      name: the field's name, for errors.
      where: the turn's place, for errors.

    Raises:
      ValueError: a call has another form.
    """
    calls = _objects(value, name, where, example=_CALL_EXAMPLE)
    converted = []
    for number, call in enumerate(calls, 1):
        place = where if len(calls) == 1 else f"{where}, call {number}"
        converted.append(_tool_call(call, name, place))
    return converted


def tool_schemas(value: Any, name: str, where: str) -> list[dict[str, Any]] | None:
    """Converts descriptions of tools to objects with a type and a function.

    Args:
      value: a list of tools, also as JSON text; a tool may be the function alone.
      name: the field's name, for errors.
      where: the row's place, for errors.

    Returns:
      The tools; None if there are none.

    Raises:
      ValueError: a tool has another form.
    """
    if value is None or value == "":
        return None
    tools = []
    given = _objects(value, name, where, example=_TOOL_EXAMPLE)
    for number, tool in enumerate(given, 1):
        place = f"{where}, tool {number}"
        tools.append(_tool_schema(tool, name, place))
    return tools or None


def _tool_schema(tool: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    """A tool with its type and its function, whose parameters are an object."""
    nested = "function" in tool
    function = parse_json(tool.get("function", tool), "function", place)
    if not _has_name(function):
        # Servers have tools of their own, such as {"type": "web_search"}.
        raise ValueError(f"{place} of {name}: has no function with a name; give {_TOOL_EXAMPLE}")
    function = dict(function)
    # Arguments of many kinds do not fit into one Arrow column, so people store them as text.
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        function["parameters"] = parse_json(parameters, "parameters", place)
    if nested:
        # Further fields, such as `strict`, stay beside the function.
        return {"type": "function", **tool, "function": function}
    function.pop("type", None)
    return {"type": "function", "function": function}


def document_list(value: Any, name: str, where: str) -> list[dict[str, Any]] | None:
    """Returns the documents of a row, a list of objects or its JSON text; None if there are none.

    Raises:
      ValueError: a document is no object.
    """
    if value is None or value == "":
        return None
    documents = _objects(value, name, where, example=_DOCUMENT_EXAMPLE)
    return documents or None


def _tool_call(call: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    function = call
    if "function" in call:
        function = parse_json(call["function"], "function", where)
    if not _has_name(function):
        raise ValueError(f"{where}: {name} has no function name; give {_CALL_EXAMPLE}")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    arguments = parse_json(arguments, "arguments", where)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where}: the arguments of {function['name']} are {type_name(arguments)}, not an "
            f"object; give {_CALL_EXAMPLE}"
        )
    # An id or further fields of the call stay beside its function.
    others = {}
    for key, value in call.items():
        if key in _FIELDS_OF_CALL or value is None:
            continue
        others[key] = value
    called = {"name": function["name"], "arguments": arguments}
    return {**others, "type": "function", "function": called}


def _has_name(function: Any) -> bool:
    """Whether a value is the object of a function with a name."""
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _objects(value: Any, name: str, where: str, *, example: str) -> list[dict[str, Any]]:
    """A list of objects, from one object or a list of them, each also as JSON text."""
    value = parse_json(value, name, where)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} is {type_name(value)}; give a list of {example}")
    objects = []
    for number, item in enumerate(value, 1):
        parsed = parse_json(item, f"item {number} of {name}", where)
        if not isinstance(parsed, dict):
            raise ValueError(
                f"{where}: item {number} of {name} is {type_name(parsed)}; give {example}"
            )
        objects.append(parsed)
    return objects


def read_tools(file: str, option: str) -> list[dict[str, Any]] | None:
    """The schemas of the tools in a JSON file, None if there are none; `option` is for errors.

    Raises:
      ValueError: the file cannot be read, or a tool has another form.
    """
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{option}: {file} cannot be read as JSON: {error}") from error
    return tool_schemas(value, option, file)
