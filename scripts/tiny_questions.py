"""The fine-tuning task of the embedded model: a miniature of GSM8K.

A row is a word problem of one or two steps and its worked solution, in the format of GSM8K:

    {"question":
       "Tom has 12 apples. He buys 5 more and gives 3 away. How many apples does he have now?",
     "answer": "12 + 5 = 17\\n17 - 3 = 14\\n#### 14"}

There are ten types of problems. The pretrained model knows their words and their arithmetic
(`tiny_corpus.py`), but has never seen such a problem.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tiny_world import GAIN, HOLDERS, LARGEST, LOSE, PEOPLE, PLACES, THINGS, two_people

Step = tuple[int, str, int]
Draw = tuple[str, list[Step]]  # the question, and the steps of its solution


def make_questions(seed: int, *, train: int, test: int) -> dict[str, list[dict[str, str]]]:
    """Rows of "train" and "test", each with `question` and `answer`.

    No two have the same type and the same numbers, so no test question is a rewording of a training
    question.
    """
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, tuple[Step, ...]]] = set()
    while len(rows) < train + test:
        kind = rng.choice(list(KINDS))
        question, steps = KINDS[kind](rng)
        if (kind, tuple(steps)) not in seen and all(1 <= value(*step) <= LARGEST for step in steps):
            seen.add((kind, tuple(steps)))
            rows.append({"question": question, "answer": answer(steps)})
    rng.shuffle(rows)
    return {"train": rows[:train], "test": rows[train:]}


def answer(steps: Sequence[Step]) -> str:
    """The solution, one step per line, and the result after `####`."""
    lines = [f"{a} {sign} {b} = {value(a, sign, b)}" for a, sign, b in steps]
    return "\n".join([*lines, f"#### {value(*steps[-1])}"])


def value(a: int, sign: str, b: int) -> int:
    """The result of a sum, a difference or a product."""
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def _how_many(rng: random.Random, things: str, name: str, he: str) -> str:
    ending = rng.choice(("have now", "have in the end", "have now"))
    return f"How many {things} does {rng.choice((name, he))} {ending}?"


def _place(rng: random.Random) -> str:
    return rng.choice(("", "", f" at the {rng.choice(PLACES)}"))


def _gain(rng: random.Random) -> Draw:
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)[1]
    a, b = rng.randint(3, 40), rng.randint(2, 30)
    event = f"{person.He} {rng.choice(GAIN).now} {b} more{_place(rng)}."
    if rng.random() < 0.3:
        event = f"{_other(rng, person.name)} gives {person.him} {b} more."
    return (
        f"{person.name} has {a} {thing}. {event} {_how_many(rng, thing, person.name, person.he)}",
        [(a, "+", b)],
    )


def _lose(rng: random.Random) -> Draw:
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)[1]
    a, b = rng.randint(6, 60), rng.randint(2, 30)
    verb = rng.choice(LOSE)
    event = f"{person.He} {verb.now} {b}{verb.tail}{_place(rng)}."
    if rng.random() < 0.3:
        event = f"{person.He} gives {b} to {_other(rng, person.name)}."
    return (
        f"{person.name} has {a} {thing}. {event} {_how_many(rng, thing, person.name, person.he)}",
        [(a, "-", b)],
    )


def _total(rng: random.Random) -> Draw:
    one, two = two_people(rng)
    thing = rng.choice(THINGS)[1]
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    question = rng.choice(("do they have together", "do they have in all"))
    return f"{one.name} has {a} {thing} and {two.name} has {b}. How many {thing} {question}?", [
        (a, "+", b)
    ]


def _difference(rng: random.Random) -> Draw:
    one, two = two_people(rng)
    thing = rng.choice(THINGS)[1]
    a, b = rng.randint(4, 60), rng.randint(2, 50)
    facts = [f"{one.name} has {a} {thing}.", f"{two.name} has {b} {thing}."]
    rng.shuffle(facts)
    return (
        f"{' '.join(facts)} How many more {thing} does {one.name} have than {two.name}?",
        [(a, "-", b)],
    )


def _groups(rng: random.Random) -> Draw:
    person, thing, (_, many) = rng.choice(PEOPLE), rng.choice(THINGS)[1], rng.choice(HOLDERS)
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    question = rng.choice((f"does {person.name} have in all", "are there in all"))
    return f"{person.name} has {a} {many} with {b} {thing} in each. How many {thing} {question}?", [
        (a, "*", b)
    ]


def _gain_lose(rng: random.Random) -> Draw:
    person, thing, verb = rng.choice(PEOPLE), rng.choice(THINGS)[1], rng.choice(LOSE)
    a, b, c = rng.randint(3, 40), rng.randint(2, 20), rng.randint(2, 20)
    gain = f"{rng.choice(GAIN).now} {b} more{_place(rng)}"
    lose = f"{verb.now} {c}{verb.tail}"
    events = rng.choice(
        (f"{person.He} {gain} and {lose}.", f"{person.He} {gain}. Then {person.he} {lose}.")
    )
    steps = [(a, "+", b), (a + b, "-", c)]
    return (
        f"{person.name} has {a} {thing}. {events} {_how_many(rng, thing, person.name, person.he)}",
        steps,
    )


def _lose_gain(rng: random.Random) -> Draw:
    person, thing, verb = rng.choice(PEOPLE), rng.choice(THINGS)[1], rng.choice(LOSE)
    a, b, c = rng.randint(6, 40), rng.randint(2, 20), rng.randint(2, 20)
    lose = f"{verb.now} {b}{verb.tail}{_place(rng)}"
    gain = f"{rng.choice(GAIN).now} {c} more"
    events = rng.choice(
        (f"{person.He} {lose} and {gain}.", f"{person.He} {lose}. Then {person.he} {gain}.")
    )
    steps = [(a, "-", b), (a - b, "+", c)]
    return (
        f"{person.name} has {a} {thing}. {events} {_how_many(rng, thing, person.name, person.he)}",
        steps,
    )


def _groups_gain(rng: random.Random) -> Draw:
    person, thing, (_, many) = rng.choice(PEOPLE), rng.choice(THINGS)[1], rng.choice(HOLDERS)
    a, b, c = rng.randint(2, 10), rng.randint(2, 10), rng.randint(2, 20)
    event = f"{person.He} {rng.choice(GAIN).now} {c} more {thing}."
    text = f"{person.name} has {a} {many} with {b} {thing} in each. {event}"
    return f"{text} {_how_many(rng, thing, person.name, person.he)}", [(a, "*", b), (a * b, "+", c)]


def _groups_lose(rng: random.Random) -> Draw:
    person, thing, (_, many) = rng.choice(PEOPLE), rng.choice(THINGS)[1], rng.choice(HOLDERS)
    a, b, c = rng.randint(2, 10), rng.randint(2, 10), rng.randint(2, 20)
    verb = rng.choice(LOSE)
    event = f"{person.He} {verb.now} {c} {thing}{verb.tail}."
    text = f"{person.name} has {a} {many} with {b} {thing} in each. {event}"
    return f"{text} {_how_many(rng, thing, person.name, person.he)}", [(a, "*", b), (a * b, "-", c)]


def _more_than(rng: random.Random) -> Draw:
    one, two = two_people(rng)
    thing = rng.choice(THINGS)[1]
    a, b = rng.randint(3, 40), rng.randint(2, 20)
    text = f"{one.name} has {a} {thing}. {two.name} has {b} more {thing} than {one.name}."
    return f"{text} How many {thing} do they have together?", [(a, "+", b), (a, "+", a + b)]


def _other(rng: random.Random, name: str) -> str:
    return rng.choice([person.name for person in PEOPLE if person.name != name])


KINDS: dict[str, Callable[[random.Random], Draw]] = {
    "gain": _gain,
    "lose": _lose,
    "total": _total,
    "difference": _difference,
    "groups": _groups,
    "gain_lose": _gain_lose,
    "lose_gain": _lose_gain,
    "groups_gain": _groups_gain,
    "groups_lose": _groups_lose,
    "more_than": _more_than,
}
