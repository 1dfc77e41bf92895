"""What a key of another trainer means here: rules, and the translation of a file by them.

A table has a rule for each key. The rule sets options of ours, or says why the key is not honored,
or refuses it where the run would be another one without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lorax_ft.checks import alternatives, one_line
from lorax_ft.config.document import Document

Kind = Literal["text", "whole", "count", "number", "flag", "names", "object", "any"]
"""The type of a value; count: 1 or more; names: a list, or a text with commas between them."""
Options = dict[str, Any]
"""Values by option, such as "adapter.rank"."""

KINDS: Mapping[Kind, str] = {
    "text": "a text",
    "whole": "a whole number",
    "count": "a whole number above 0",
    "number": "a number",
    "flag": "true or false",
    "names": "names, as a list or with commas between them",
    "object": "keys with values",
}


class Keys:
    """The keys of a file, with the types that they must have; and what is to be said of them.

    Args:
      document: the file.
      overridden: options of ours that are given beside the file, and win.
    """

    def __init__(self, document: Document, overridden: Collection[str] = ()) -> None:
        self.document = document
        # A flag is switched off by --section.no-flag.
        self.overridden = {option.replace(".no_", ".") for option in overridden}
        self.notes: dict[str, str] = {}
        self.unread: dict[str, str] = {}
        """The option that replaces a key, by key."""
        self.batch_per_device = False
        """Whether train.batch_size is that of one device."""
        self.shards_weights = False
        """Whether the weights are split over all devices."""

    def given(self, key: str) -> bool:
        """Whether the file has a value for the key; null is none."""
        return self.document.values.get(key) is not None

    def state(self, key: str) -> str:
        """The value of a key for a message; "absent" where the file does not have it."""
        values = self.document.values
        return shown(values[key]) if key in values else "absent"

    def replaced(self, option: str, *names: str) -> bool:
        """Whether an option that is given beside the file replaces these keys."""
        if option not in self.overridden:
            return False
        self.unread |= {name: option for name in names if self.given(name)}
        return True

    def read(self, key: str, kind: Kind, default: Any = None, *, unless: str = "") -> Any:
        """The value of a key, or the default where it has none.

        Args:
          key: the key.
          kind: the type of its value.
          default: what its absence means.
          unless: the option that replaces the key where it is given beside the file.

        Raises:
          ValueError: it is of another type.
        """
        value = self.document.values.get(key)
        if value is None or self.replaced(unless, key):
            return default
        if kind == "names":
            value = split_names(value)
        if not is_kind(value, kind):
            given = self.document.values[key]
            raise self.error(key, f"{key} is {given!r:.80}; it must be {KINDS[kind]}")
        # A whole number may be written as one with a point, such as 3.0.
        return int(value) if kind in ("whole", "count") else value

    def choose(
        self, key: str, choices: Mapping[Any, Any], default: Any, *, instead: str = ""
    ) -> Any:
        """What the value of a key stands for.

        Args:
          key: the key.
          choices: what each value stands for.
          default: the value that its absence means.
          instead: the option that replaces the key, for the error.

        Raises:
          ValueError: it is none of the choices.
        """
        value = self.read(key, "any", default)
        try:
            return choices[value]
        except (KeyError, TypeError):  # a list is no key of a dict
            known = alternatives(list(dict.fromkeys(map(shown, choices))))
            way = f" (--{instead} replaces it)" if instead else ""
            raise self.error(key, f"{key} is {shown(value)}; it can be {known}{way}") from None

    def note(self, key: str, text: str) -> None:
        """Say what became of a key where that is not obvious."""
        self.notes[key] = one_line(text)

    def error(self, key: str, problem: str) -> ValueError:
        """An error about a key, with its line."""
        return ValueError(one_line(f"{self.document.where(key)}: {problem}"))


class Rule(NamedTuple):
    """What a key means here."""

    apply: Callable[[str, Keys], Options]
    options: tuple[str, ...] = ()
    """The options of ours that it sets, the main one first."""
    remark: str = ""
    """What a reader of the documentation should know of it."""
    absent: bool = False
    """Whether it also sets options where the file does not have the key."""
    refuses: bool = False
    """Whether it only says why the key cannot be used."""
    honored: bool = True
    shared: bool = False
    """Whether it is applied once for all keys that have it."""
    others_hold: bool = False
    """Whether its other options hold where the main one is given beside the file."""


Table = Mapping[str, Rule]


class Translation(NamedTuple):
    """What becomes of a file of another trainer."""

    options: Options
    keys: Mapping[str, Sequence[str]]
    """The keys that each option comes from."""
    notes: Mapping[str, str]
    """What became of keys where it is not obvious, by key."""
    unused: Mapping[str, str]
    """Why keys are not honored, by key."""
    unread: Mapping[str, str]
    """The option beside the file that replaces a key, by key."""


def same(option: str, kind: Kind, *, default: Any = None, remark: str = "") -> Rule:
    """A key that is an option of ours; `default` is what its absence means."""

    def apply(key: str, keys: Keys) -> Options:
        return {option: keys.read(key, kind, default)}

    if default is not None and not remark:
        remark = f"absent: {shown(default)}"
    return Rule(apply, (option,), remark, absent=default is not None)


def choice(
    option: str, choices: Mapping[Any, Any], *, default: Any = None, remark: str = ""
) -> Rule:
    """A key whose values have other names here."""

    def apply(key: str, keys: Keys) -> Options:
        return {option: keys.choose(key, choices, default, instead=option)}

    pairs = [f"{shown(theirs)}: {shown(ours)}" for theirs, ours in choices.items()]
    return Rule(apply, (option,), remark or ", ".join(pairs), absent=default is not None)


def together(
    function: Callable[[Keys], Options],
    *options: str,
    remark: str = "",
    absent: bool = True,
    others_hold: bool = False,
) -> Rule:
    """A key that a function translates, often with others that have the same rule.

    It is called once for all of them, and with `absent` also where the file has none of them.
    """

    def apply(key: str, keys: Keys) -> Options:
        return function(keys)

    return Rule(apply, options, remark, absent=absent, shared=True, others_hold=others_hold)


def holds(remark: str) -> Rule:
    """A key that asks for what is so here anyway."""
    return Rule(lambda key, keys: {}, (), remark)


def unused(reason: str) -> Rule:
    """A key that is not honored; the run is the same without it, up to speed and bookkeeping."""
    return Rule(lambda key, keys: {}, (), reason, honored=False)


def refused(reason: str, *, harmless: Sequence[Any] = (False,), instead: str = "") -> Rule:
    """A key without which the run would be another one: an error, except for harmless values.

    Args:
      reason: why it cannot be honored.
      harmless: values that ask for nothing.
      instead: the option that replaces the key, if there is one.
    """
    way = f"--{instead} replaces it" if instead else "no option replaces it, so remove it"

    def apply(key: str, keys: Keys) -> Options:
        value = keys.read(key, "any")
        if value in harmless or keys.replaced(instead, key):
            return {}
        raise keys.error(key, f"{key} {shown(value)} cannot be honored: {reason}; {way}")

    return Rule(apply, (), reason, refuses=True)


def translate(
    keys: Keys,
    table: Table,
    *,
    families: Mapping[str, Rule],
    trainer: str,
) -> Translation:
    """The options that the keys of a file mean.

    Args:
      keys: of the file.
      table: the rule of each key.
      families: the rules of keys that begin alike, by their beginning.
      trainer: whose keys they are, for errors.

    Raises:
      ValueError: a key is unknown, has a value of another type, or cannot be honored; with its
        line.
    """
    rules = dict(table)
    for key in keys.document.values:
        if key not in rules:
            rules[key] = _rule_of_family(key, keys, table, families, trainer)
    options: Options = {}
    sources: dict[str, Sequence[str]] = {}
    not_used: dict[str, str] = {}
    for key, rule in rules.items():
        with_it = [other for other in rules if rules[other] is rule] if rule.shared else [key]
        given = [other for other in with_it if keys.given(other)]
        if key != with_it[0]:
            continue
        if rule.options and not rule.others_hold and keys.replaced(rule.options[0], *given):
            continue
        if given and not rule.honored and keys.document.values[key] is not False:
            not_used[key] = rule.remark
        if not given and not rule.absent:
            continue
        for option, value in rule.apply(key, keys).items():
            if option in keys.overridden:
                continue
            options[option] = value
            sources[option] = given or [key]
    return Translation(options, sources, keys.notes, not_used, keys.unread)


def _rule_of_family(
    key: str, keys: Keys, table: Table, families: Mapping[str, Rule], trainer: str
) -> Rule:
    """The rule of a key that is not in the table."""
    for beginning, rule in families.items():
        if key.startswith(beginning):
            return rule
    raise keys.error(key, f"{trainer} has no key {key!r:.80}{closest(key, table)}")


def closest(name: str, known: Collection[str]) -> str:
    """What a name that is not known may mean, for the end of an error."""
    # lora_r is r, and dropout lora_dropout.
    ends = [one for one in known if one.endswith(f"_{name}") or name.endswith(f"_{one}")]
    near = difflib.get_close_matches(name, ends, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def split_names(value: Any) -> Any:
    """The names in a text, or of a list; another value as it is."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(name.strip() for name in value if name.strip())
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold, and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def is_kind(value: Any, kind: Kind) -> bool:
    """Whether a value is of a type."""
    match kind:
        case "text":
            return isinstance(value, str)
        case "flag":
            return isinstance(value, bool)
        case "names":
            return isinstance(value, tuple)
        case "number":
            return is_number(value)
        case "whole":
            return is_number(value) and value == int(value)
        case "count":
            return is_number(value) and value == int(value) and value > 0
        case "object":
            return isinstance(value, dict)
    return True


def shown(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value!s:.80}"
