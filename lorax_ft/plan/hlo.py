"""Collectives of a compiled program: what chips send to one another, read from its text (HLO).

The text lists computations, each a list of instructions. Loops name the computations of their body
and of their condition, which holds the number of iterations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8},
}
HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z-]*)\(")
CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|true_computation|false_computation)=\{?%?([\w.-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
# A collective that runs beside computations is spread over several of them, with one number.
CHAIN = re.compile(r'chain_id="(\d+)"')
CONSTANT = re.compile(r"[su]32\[\][^=]* constant\((\d+)\)")
COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one chip receives in a step."""

    count: Mapping[str, int]
    """How many collectives of each kind it takes part in."""
    received: Mapping[str, float]
    """Bytes by kind."""

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.received.values())


def traffic(text: str) -> Traffic:
    """The collectives of a compiled program.

    In a ring of n chips, each receives (n − 1) / n of a gathered array, as much of an array before
    it is scattered, and twice that of one that is reduced.
    """
    computations, entry = _computations(text)
    count: Counter[str] = Counter()
    received: defaultdict[str, float] = defaultdict(float)
    seen: set[str] = set()

    def add(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            kind, size = _collective(line)
            if kind and not _is_repeated(line, seen):
                count[kind] += times
                received[kind] += times * size
            loop = LOOP.search(line)
            if loop:
                condition, body = loop.groups()
                add(body, times * _iterations(line, computations.get(condition, ())))
                continue
            for called in CALLED.findall(line):
                add(called, times)
            # Only one branch runs, and the others have no collectives: chunks without labels.
            for branches in BRANCHES.findall(line):
                for called in branches.replace("%", "").split(", "):
                    add(called, times)

    add(entry, 1)
    return Traffic(count=dict(count), received=dict(received))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that starts."""
    found: dict[str, list[str]] = {}
    entry = ""
    current: list[str] = []
    for line in text.splitlines():
        head = HEAD.match(line)
        if head is None:
            current.append(line)
            continue
        is_entry, name = head.groups()
        current = found.setdefault(name, [])
        if is_entry:
            entry = name
    return found, entry


def _collective(line: str) -> tuple[str, float]:
    """The kind of an instruction and the bytes that a chip receives; "" if it is another one."""
    found = INSTRUCTION.match(line)
    if found is None:
        return "", 0.0
    shape, opcode = found.groups()
    # An asynchronous one is two instructions, of which the first one has the operands.
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return "", 0.0
    size: float = _bytes(shape)
    # The result of a start is the operand beside the result, and two counters of a permutation.
    if opcode != kind and shape.startswith("("):
        size = _largest(shape)
    n = _group_size(line)
    share = (n - 1) / n
    if kind == "all-reduce":
        return kind, 2 * share * size
    if kind == "reduce-scatter":
        # Its result is a part of what is scattered.
        return kind, share * n * size
    if kind == "collective-permute":
        return kind, size
    return kind, share * size


def _is_repeated(line: str, seen: set[str]) -> bool:
    """Whether a collective is another part of one that was counted."""
    chain = CHAIN.search(line)
    if chain is None:
        return False
    repeated = chain[1] in seen
    seen.add(chain[1])
    return repeated


def _iterations(line: str, condition: list[str] | tuple[str, ...]) -> int:
    """How often a loop runs: up to the number that its condition compares with."""
    known = COUNT.search(line)
    if known:
        return int(known[1])
    numbers = [int(number) for text in condition for number in CONSTANT.findall(text)]
    return max(numbers, default=1)


def _group_size(line: str) -> int:
    """The chips that exchange: the length of a group of `replica_groups`."""
    # mesh['axis_0'=16] {'axis_0'}: named axes of a mesh.
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    # [2,8]<=[16]: groups, and the size of each.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return listed[1].count(",") + 1
    # A permutation has pairs instead.
    return 2


def _bytes(shape: str) -> int:
    """The size of an array, or of all arrays of a tuple."""
    return sum(_sizes(shape))


def _largest(shape: str) -> int:
    return max(_sizes(shape), default=0)


def _sizes(shape: str) -> list[int]:
    sizes = []
    for dtype, numbers in ARRAY.findall(shape):
        if dtype in BYTES:
            sizes.append(BYTES[dtype] * math.prod(map(int, filter(None, numbers.split(",")))))
    return sizes
