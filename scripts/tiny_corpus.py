"""The pretraining corpus of the embedded model: stories, questions about them, and arithmetic.

A document is plain text, or a conversation of (question, answer) turns. The corpus contains:

  stories          short narratives with quantities; some sentences state the current number
  notes            headings and lists of things
  recall           questions that the story answers ("How many apples does Tom have at first?")
  copying          "Repeat: ..."
  sums             arithmetic in digits, in words and in chains of two, as text and conversation
  comparing        which of two numbers is larger, who has more, which comes next

It never contains questions about a story whose answer must be computed, their worked solutions, or
`####` (see `tiny_questions.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tiny_questions import value
from tiny_world import (
    COLORS,
    DAYS,
    GAIN,
    HOLDERS,
    LARGEST,
    LOSE,
    PEOPLE,
    PLACES,
    THINGS,
    Person,
    count,
    two_people,
    two_things,
)

Chat = list[tuple[str, str]]
Thing = tuple[str, str]


def documents(seed: int) -> Iterator[str | Chat]:
    """An endless stream of documents, reproducible by seed."""
    rng = random.Random(seed)
    makers, weights = zip(*SHARES.items(), strict=True)
    while True:
        yield rng.choices(makers, weights)[0](rng)


def story(rng: random.Random) -> str:
    """A narrative of one or two people and what they own, in the present or the past."""
    past = rng.random() < 0.4
    people, things = two_people(rng), two_things(rng)
    both = people[0].he != people[1].he and rng.random() < 0.4  # else a pronoun would be ambiguous
    owned = {person: rng.randint(1, 60) for person in people[: 1 + both]}
    thing = things[0]
    has = "had" if past else "has"
    told = [_scene(rng, past)] if rng.random() < 0.3 else []
    told += [f"{person.name} {has} {count(number, thing)}." for person, number in owned.items()]
    for _ in range(rng.randint(1, 4)):
        person = rng.choice(list(owned))
        sentence, change = _event(rng, person, thing, owned[person], past)
        owned[person] += change
        told.append(sentence)
        if rng.random() < 0.5:
            told.append(_state(rng, person, thing, owned[person], past))
        if rng.random() < 0.1:
            told.append(_scene(rng, past))
    if rng.random() < 0.15:
        return f"## {people[0].name} and the {thing[1]}\n{' '.join(told)}"
    return " ".join(told)


def _scene(rng: random.Random, past: bool) -> str:
    person, place, thing = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(THINGS)
    is_, goes = ("was", "went") if past else ("is", "goes")
    return rng.choice(
        (
            f"It {is_} {rng.choice(DAYS)}.",
            f"{person.name} {goes} to the {place}.",
            f"The {thing[0]} {is_} {rng.choice(COLORS)}.",
            f"There {is_} a {rng.choice(COLORS)} {rng.choice(HOLDERS)[0]} at the {place}.",
            f"On {rng.choice(DAYS)} {person.name} {goes} to the {place} "
            f"with {person.his} {thing[1]}.",
        )
    )


def _event(
    rng: random.Random, person: Person, thing: Thing, owned: int, past: bool
) -> tuple[str, int]:
    """A sentence that increases or decreases someone's things, and the change."""
    gain = owned < 3 or (owned < LARGEST - 3 and rng.random() < 0.5)
    number = rng.randint(1, min(30, LARGEST - owned if gain else owned - 1))
    who = rng.choice(
        (
            person.name,
            person.He,
            person.He,
            f"Then {person.he}",
            f"On {rng.choice(DAYS)} {person.he}",
        )
    )
    other = rng.choice([p for p in PEOPLE if p != person]).name
    place = rng.choice(("", "", f" at the {rng.choice(PLACES)}"))
    gives = "gave" if past else "gives"
    if rng.random() < 0.25:
        if gain:
            return f"{other} {gives} {person.him} {number} more.", number
        return f"{who} {gives} {number} to {other}.", -number
    verb = rng.choice(GAIN if gain else LOSE)
    form = verb.past if past else verb.now
    if gain:
        return (
            f"{who} {form} {rng.choice((f'{number} more', f'{number} more {thing[1]}'))}{place}.",
            number,
        )
    what = rng.choice((str(number), f"{number} of {person.his} {thing[1]}", count(number, thing)))
    return f"{who} {form} {what}{verb.tail}{place}.", -number


def _state(rng: random.Random, person: Person, thing: Thing, owned: int, past: bool) -> str:
    if past:
        return rng.choice(
            (
                f"Then {person.he} had {count(owned, thing)}.",
                f"In the end {person.he} had {count(owned, thing)}.",
            )
        )
    return rng.choice(
        (
            f"Now {person.he} has {count(owned, thing)}.",
            f"Now {person.name} has {owned}.",
            f"In the end {person.he} has {count(owned, thing)}.",
        )
    )


def together(rng: random.Random) -> str:
    """A plain text that compares what two people have, or what boxes contain."""
    (one, two), (thing, _), (_, holders) = two_people(rng), two_things(rng), rng.choice(HOLDERS)
    a, b = rng.randint(2, 49), rng.randint(2, 49)
    draw = rng.random()
    if draw < 0.35:
        ending = rng.choice(("Together they have", "In all they have"))
        return f"{one.name} has {a} {thing[1]} and {two.name} has {b}. {ending} {a + b} {thing[1]}."
    if draw < 0.7:
        few, many = rng.randint(2, 10), rng.randint(2, 9)
        ending = rng.choice((f"In all {one.he} has", "In all there are"))
        start = f"{one.name} has {few} {holders} with {many} {thing[1]} in each."
        return f"{start} {ending} {few * many} {thing[1]}."
    if a == b:
        return (
            f"{one.name} has {a} {thing[1]}. {two.name} has {b} {thing[1]} too. They have the same."
        )
    more, less = (one, two) if a > b else (two, one)
    start = f"{one.name} has {a} {thing[1]}. {two.name} has {b} {thing[1]}."
    return f"{start} {more.name} has {abs(a - b)} more than {less.name}."


def notes(rng: random.Random) -> str:
    """A heading and a list."""
    lines = [
        f"- {count(rng.randint(1, LARGEST), rng.choice(THINGS))}" for _ in range(rng.randint(2, 4))
    ]
    marks = rng.choice(("#", "##", "###"))
    return "\n".join([f"{marks} {rng.choice(PEOPLE).name} on {rng.choice(DAYS)}", *lines])


def recall(rng: random.Random) -> Chat:
    """Facts and events, and questions that they answer."""
    (one, two), (thing, other) = two_people(rng), two_things(rng)
    a, b, c = (rng.randint(1, LARGEST) for _ in range(3))
    verb, place = rng.choice((*GAIN, *LOSE)), rng.choice(PLACES)
    second = rng.choice((thing, other))
    facts = [f"{one.name} has {count(a, thing)}.", f"{two.name} has {count(b, second)}."]
    asked = [
        (
            f"How many {thing[1]} does {one.name} have at first?",
            f"{one.name} has {count(a, thing)} at first.",
        ),
        (
            f"How many {second[1]} does {two.name} have at first?",
            f"{two.name} has {count(b, second)} at first.",
        ),
        (f"What does {one.name} have?", f"{one.name} has {count(a, thing)}."),
        (f"Who has {count(b, second)}?", f"{two.name} has {count(b, second)}."),
    ]
    if rng.random() < 0.6:
        actor = rng.choice((one, two))
        facts.append(f"{actor.name} {verb.now} {count(c, thing)}{verb.tail} at the {place}.")
        does = f"{actor.name} {verb.now} {count(c, thing)}{verb.tail}"
        asked = [
            *asked[:2],
            (
                f"How many {thing[1]} does {actor.he} {verb.base}{verb.tail}?",
                f"{actor.He} {does.partition(' ')[2]}.",
            ),
            (f"Who {verb.now} {count(c, thing)}{verb.tail}?", f"{does}."),
            (f"Where is {actor.name}?", f"{actor.name} is at the {place}."),
        ]
    elif rng.random() < 0.5:
        rng.shuffle(facts)
    turns = rng.sample(asked, rng.choice((1, 1, 2)))
    return [(f"{' '.join(facts)} {turns[0][0]}", turns[0][1]), *turns[1:]]


def copying(rng: random.Random) -> Chat:
    """A text to repeat."""
    numbers = " ".join(str(rng.randint(0, LARGEST)) for _ in range(rng.randint(2, 6)))
    what = rng.choice((numbers, numbers, story(rng).split(". ")[0].rstrip(".") + "."))
    return [(rng.choice((f"Repeat: {what}", f"Say this again: {what}")), what)]


def draw_sum(rng: random.Random) -> tuple[int, str, int]:
    """Two numbers and an operator, with a result between 0 and 99."""
    sign = rng.choice("++---*" if rng.random() < 0.9 else "+-*")
    if sign == "*":
        return rng.randint(0, 10), sign, rng.randint(0, 10)
    if sign == "+":
        a = rng.randint(0, LARGEST)
        return (
            (a, sign, rng.randint(0, LARGEST - a))
            if rng.random() < 0.5
            else (LARGEST - a, sign, rng.randint(0, a))
        )
    a = rng.randint(1, LARGEST)
    return a, sign, rng.randint(0, a)


def sums(rng: random.Random) -> str:
    """Lines of arithmetic."""
    return "\n".join(_line(*draw_sum(rng)) for _ in range(rng.randint(2, 5)))


def asked_sums(rng: random.Random) -> Chat:
    """One or two sums, in digits or in words."""
    return [_asked(rng) for _ in range(rng.choice((1, 2)))]


def chains(rng: random.Random) -> str | Chat:
    """Two sums; the second starts from the result of the first."""
    a, sign, b = draw_sum(rng)
    middle = value(a, sign, b)
    gain = middle < 2 or (middle < LARGEST - 1 and rng.random() < 0.5)
    c = rng.randint(1, LARGEST - middle) if gain else rng.randint(1, middle)
    then = "+" if gain else "-"
    lines = f"{_line(a, sign, b)}\n{_line(middle, then, c)}"
    return lines if rng.random() < 0.4 else [(f"What is {a} {sign} {b} {then} {c}?", lines)]


def comparing(rng: random.Random) -> Chat:
    """Which of two numbers is larger, and what comes next."""
    a, b = rng.sample(range(LARGEST), 2)
    (one, two), (thing, _) = two_people(rng), two_things(rng)
    draw = rng.random()
    if draw < 0.4:
        return [(f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.")]
    if draw < 0.55:
        return [(f"What comes after {a}?", f"{a + 1} comes after {a}.")]
    facts = f"{one.name} has {count(a, thing)}. {two.name} has {count(b, thing)}."
    more, less = (one, two) if a > b else (two, one)
    return [
        (f"{facts} Who has more {thing[1]}?", f"{more.name} has more {thing[1]} than {less.name}.")
    ]


def _line(a: int, sign: str, b: int) -> str:
    return f"{a} {sign} {b} = {value(a, sign, b)}"


def _asked(rng: random.Random) -> tuple[str, str]:
    a, sign, b = draw_sum(rng)
    words = {
        "+": (f"What is {a} plus {b}?", f"Add {b} to {a}.", f"How much is {b} more than {a}?"),
        "-": (f"What is {a} minus {b}?", f"Take {b} from {a}.", f"How much is {b} less than {a}?"),
        "*": (f"What is {a} times {b}?", f"Multiply {a} by {b}.", f"How much is {a} times {b}?"),
    }[sign]
    return rng.choice((f"What is {a} {sign} {b}?", f"{a} {sign} {b} = ?", *words)), _line(
        a, sign, b
    )


SHARES: dict[Callable[[random.Random], str | Chat], float] = {
    story: 0.22,
    together: 0.12,
    notes: 0.03,
    recall: 0.17,
    copying: 0.03,
    sums: 0.13,
    asked_sums: 0.15,
    chains: 0.1,
    comparing: 0.05,
}
"""The types of documents and their shares."""
