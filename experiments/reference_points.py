"""What reference points of any tool have in common: cases to count, entries to compare, and checked JSON fields."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hw import LOOPS, Mapping, Operation


class FormatError(ValueError):
    """A reference file that cannot be read: carries the line and the field."""


class Case(NamedTuple):
    operation: Operation
    mapping: Mapping


class Entry(NamedTuple):
    """One number to compare; `tolerance` is absolute, `relative` a share of the expected value."""

    name: str
    expected: float
    counted: float
    tolerance: float = 0.0
    relative: float = 0.0

    @property
    def excess(self) -> float:
        """Relative error beyond the absolute tolerance."""
        error = max(0.0, abs(self.counted - self.expected) - self.tolerance)
        return error / abs(self.expected) if self.expected else float(error > 0)

    @property
    def matches(self) -> bool:
        return self.excess <= self.relative


class Record:
    """A JSON object whose fields are checked when they are read."""

    def __init__(self, value: object, line: int, path: str = ""):
        if not isinstance(value, dict):
            raise FormatError(f"line {line}, field {path or '(all)'}: expected an object, got {type(value).__name__}")
        self.value, self.line, self.path = value, line, path

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.value:
            raise self.error("missing", key)
        value = self.value[key]
        is_huge = isinstance(value, int) and abs(value) > sys.float_info.max  # JSON has integers of any size
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or is_huge:
            raise self.error(f"unexpected value {str(value)[:40]!r}", key)
        return value

    def number(self, key: str, positive: bool = False) -> float:
        value = self.get(key, (int, float))
        if not math.isfinite(value) or (positive and value <= 0):
            raise self.error(f"expected a {'positive' if positive else 'finite'} number, got {value}", key)
        return value

    def record(self, key: str) -> "Record":
        return Record(self.get(key, dict), self.line, f"{self.path}.{key}".lstrip("."))

    def records(self, key: str) -> list["Record"]:
        path = f"{self.path}.{key}".lstrip(".")
        return [Record(value, self.line, f"{path}[{i}]") for i, value in enumerate(self.get(key, list))]

    def factors(self, rename: dict[str, str]) -> dict[str, float]:
        """The fields as tiling factors by loop name."""
        return {self.loop(name, rename): self.number(name) for name in self.value}

    def pairs(self, key: str, rename: dict[str, str]) -> list[tuple[str, float]]:
        """A list of [loop, factor]."""
        return self.as_pairs(self.get(key, list), key, rename)

    def as_pairs(self, value: object, key: str, rename: dict[str, str]) -> list[tuple[str, float]]:
        pairs: list = value if isinstance(value, list) else [value]
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int | float)):
                raise self.error(f"expected [loop, factor], got {str(pair)[:40]}", key)
        return [(self.loop(name, rename), factor) for name, factor in pairs]

    def loop(self, name: object, rename: dict[str, str]) -> str:
        loop = rename.get(str(name), str(name))
        if loop not in LOOPS:
            raise self.error(f"unknown loop {str(name)[:20]!r}")
        return loop

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """What goes wrong within with what the file holds is told of this object, unless of a field in it."""
        try:
            yield
        except FormatError:
            raise
        except ValueError as error:
            raise self.error(str(error)) from error
        except (KeyError, TypeError) as error:
            raise self.error(f"expected a reference point, got one that cannot be read: {error!r}") from error

    def error(self, message: str, key: str = "") -> FormatError:
        path = ".".join(part for part in (self.path, key) if part)
        return FormatError(f"line {self.line}, field {path or '(all)'}: {message}")


def ranks(inner_to_outer: list[str]) -> np.ndarray:
    """Ranks of all loops; those that are absent go outside."""
    names = [*inner_to_outer, *(loop for loop in LOOPS if loop not in inner_to_outer)]
    return np.array([names.index(loop) for loop in LOOPS])


def parse(text: str, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"line {line + error.lineno - 1}, field (all): no valid JSON, {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; too many brackets
        raise FormatError(f"line {line}, field (all): no valid JSON, {error}") from error
