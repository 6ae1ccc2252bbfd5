"""XLA's printed programs as computations of instructions, as far as collectives need them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    """Such as f32[8,64]{1,0}, or several in parentheses."""
    opcode: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """Everything after the operands."""

    @property
    def callees(self) -> tuple[str, ...]:
        """Computations that it runs, a loop's condition first."""
        lists = re.findall(
            r"(?:calls|to_apply|body|condition|branch_computations|true_computation|"
            r"false_computation|called_computations)=(?:\{([^}]*)\}|%?([\w.-]+))",
            self.attributes,
        )
        return tuple(name for pair in lists for name in re.findall(r"[\w.-]+", "".join(pair)))

    @property
    def trip_count(self) -> int | None:
        """Rounds of a loop; None where they depend on data."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(known[1]) if known else None


@dataclass(frozen=True, kw_only=True)
class Computation:
    """A function of the program."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def types(self) -> Mapping[str, str]:
        """Instruction -> its type."""
        return {one.name: one.type for one in self.instructions}


def parse_program(program: str) -> tuple[str, dict[str, Computation]]:
    """The name of the entry, and every computation by its name."""
    entry, computations = "", {}
    for name, is_entry, lines in _split_computations(program):
        parsed = (_parse_instruction(line) for line in lines)
        computations[name] = Computation(instructions=tuple(one for one in parsed if one))
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("The text holds no ENTRY computation: pass what compiled.as_text() gives.")
    return entry, computations


def type_bytes(text: str) -> int:
    """Bytes of an array's type, or of all arrays in a tuple's."""
    total = 0
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text):
        bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or "0")[0])
        total += prod(int(size.strip("<=")) for size in sizes.split(",") if size) * bits // 8
    return total


def _split_computations(program: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Name, whether it is the entry, and the lines between the braces."""
    header = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
    name, is_entry, lines = "", False, []
    for line in program.splitlines():
        if match := header.match(line):
            name, is_entry, lines = match[2], bool(match[1]), []
        elif line == "}" and name:
            yield name, is_entry, lines
            name = ""
        else:
            lines.append(line)


def _parse_instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if not match:
        return None
    type_end = _end_of_type(line, match.end())
    opening = line.index("(", type_end)
    closing = _closing(line, opening)
    return Instruction(
        name=match[1],
        type=line[match.end() : type_end],
        opcode=line[type_end:opening].strip(),
        operands=tuple(re.findall(r"%([\w.-]+)", line[opening:closing])),
        attributes=line[closing + 1 :],
    )


def _end_of_type(line: str, start: int) -> int:
    """A tuple's type holds spaces, an array's does not."""
    return _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)


def _closing(line: str, opening: int) -> int:
    """Place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"A parenthesis is not closed: {line[:200]}")
