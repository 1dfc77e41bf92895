"""The vocabulary of the embedded model's texts: people, their things, and what they do.

`tiny_corpus.py` (pretraining) and `tiny_questions.py` (fine-tuning) share these words.
"""

from __future__ import annotations

import dataclasses
import random

LARGEST = 99
"""The largest number in any text."""


@dataclasses.dataclass(frozen=True)
class Person:
    """A name with its pronouns."""

    name: str
    he: str
    him: str
    his: str

    @property
    def He(self) -> str:  # noqa: N802 (the word as it starts a sentence)
        """The pronoun at the start of a sentence."""
        return self.he.capitalize()


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb in its three forms, with what follows the object: "gives", "gave", "give", "away"."""

    now: str
    past: str
    base: str
    tail: str = ""


PEOPLE = tuple(
    Person(name, *pronouns)
    for pronouns, names in (
        (
            ("he", "him", "his"),
            (
                "Tom",
                "Ben",
                "Max",
                "Sam",
                "Leo",
                "Jack",
                "Finn",
                "Hugo",
                "Omar",
                "Luke",
                "Paul",
                "Carl",
            ),
        ),
        (
            ("she", "her", "her"),
            (
                "Anna",
                "Lily",
                "Mia",
                "Zoe",
                "Emma",
                "Nora",
                "Ruby",
                "Ella",
                "Ivy",
                "Rosa",
                "Jane",
                "Kate",
            ),
        ),
    )
    for name in names
)
THINGS = tuple(
    (word, word + "s")
    for word in (
        "apple",
        "pear",
        "plum",
        "orange",
        "lemon",
        "cookie",
        "egg",
        "nut",
        "book",
        "pencil",
        "coin",
        "stamp",
        "marble",
        "card",
        "shell",
        "stone",
        "flower",
        "toy",
        "balloon",
        "button",
        "sticker",
        "bead",
        "candle",
        "ticket",
    )
)
HOLDERS = (
    ("box", "boxes"),
    ("bag", "bags"),
    ("basket", "baskets"),
    ("jar", "jars"),
    ("tray", "trays"),
)
PLACES = (
    "market",
    "park",
    "school",
    "garden",
    "beach",
    "shop",
    "farm",
    "kitchen",
    "library",
    "station",
)
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "small", "big", "old", "new")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
GAIN = (
    Verb("buys", "bought", "buy"),
    Verb("finds", "found", "find"),
    Verb("gets", "got", "get"),
    Verb("picks up", "picked up", "pick up"),
    Verb("wins", "won", "win"),
    Verb("collects", "collected", "collect"),
)
LOSE = (
    Verb("gives", "gave", "give", " away"),
    Verb("loses", "lost", "lose"),
    Verb("sells", "sold", "sell"),
    Verb("uses", "used", "use"),
    Verb("drops", "dropped", "drop"),
    Verb("throws", "threw", "throw", " away"),
)


def two_people(rng: random.Random) -> tuple[Person, Person]:
    """Two different people."""
    first, second = rng.sample(PEOPLE, 2)
    return first, second


def two_things(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two different things, each as (one, many)."""
    first, second = rng.sample(THINGS, 2)
    return first, second


def count(number: int, thing: tuple[str, str]) -> str:
    """ "1 apple" or "5 apples"."""
    return f"{number} {thing[number != 1]}"
