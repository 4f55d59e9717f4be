"""Executes a mapped loop nest step by step, with one buffer per level and operand, and counts words.

Nothing here is a formula: loops run, tiles are sets of elements, and words are counted when they enter or leave a
buffer. Where factors divide the bounds, all instances of a level do the same, and `execute` follows the first one.
`entering` follows all of them; tiles are cut off at the bounds, and an iteration whose tile is empty holds nothing.
"""

from collections import deque
from itertools import product
from typing import NamedTuple

from hw.operation import LOOPS

OPERAND_LOOPS = {"weights": "GKCRS", "inputs": "GNCPQRS", "outputs": "GNKPQ"}


class Nest(NamedTuple):
    """What to execute: factors by level (0 innermost), `order` from inner to outer, `keep` by operand and level."""

    bounds: dict[str, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    temporal: list[dict[str, int]]
    spatial: list[dict[str, int]]
    order: list[str]
    keep: dict[str, list[bool]]


class Words(NamedTuple):
    """Words of one instance over the whole nest."""

    reads: int
    fills: int
    updates: int


class Loop(NamedTuple):
    level: int
    name: str
    factor: int
    step: int


class Visit(NamedTuple):
    """One tile in a buffer: its elements, those that entered with it and those that stayed from the tile before."""

    elements: frozenset
    entered: frozenset
    is_first: bool


def execute(nest: Nest, operand: str, accumulated: bool) -> list[Words]:
    """Runs the nest for one operand and returns the words of one instance of each level."""
    levels = [l for l, kept in enumerate(nest.keep[operand]) if kept]
    visits = {l: list(_visits(nest, operand, l)) for l in [-1, *levels]}
    words = [Words(0, 0, 0)] * len(nest.temporal)
    for below, level in zip([-1, *levels], levels, strict=False):
        branches = _merged_branches(nest, operand, below, level)
        accesses = sum(len(visit.entered) for _, visit in visits[below]) * branches
        entered = sum(len(visit.entered) for _, visit in visits[level])
        is_top = level == levels[-1]
        if accumulated:
            new = sum(len(visit.entered) for _, visit in visits[level] if visit.is_first)
            written_blind = _first_touches(nest, operand, visits[level], visits[below], below, level)
            words[level] = Words(accesses - written_blind, 0 if is_top else entered - new, accesses)
        else:
            words[level] = Words(accesses, 0 if is_top else entered, 0)
    return words


def entering(nest: Nest, operand: str) -> list[int]:
    """Words of one operand that enter each level, all its instances together, whatever the factors."""
    words = []
    for level in range(len(nest.temporal)):
        corners = [dict.fromkeys(LOOPS, 0)]
        for l in range(level + 1, len(nest.temporal)):
            corners = [{n: a[n] + b[n] for n in LOOPS} for a in corners for b in _offsets(nest, l)]
        words.append(sum(len(v.entered) for corner in corners for _, v in _visits(nest, operand, level, corner)))
    return words


def _loops(nest: Nest) -> list[Loop]:
    """All temporal loops of more than one iteration, outermost first."""
    steps = dict.fromkeys(LOOPS, 1)
    loops = []
    for level, (temporal, spatial) in enumerate(zip(nest.temporal, nest.spatial, strict=True)):
        for name in LOOPS:
            steps[name] *= spatial.get(name, 1)
        for name in nest.order[level]:
            if temporal.get(name, 1) > 1:
                loops.append(Loop(level, name, temporal[name], steps[name]))
                steps[name] *= temporal[name]
    return loops[::-1]


def _tile_sizes(nest: Nest, level: int) -> dict[str, int]:
    """Iterations of each loop within one tile of a level; level -1 is a MAC."""
    sizes = dict.fromkeys(LOOPS, 1)
    for l in range(level + 1):
        for name in LOOPS:
            sizes[name] *= nest.temporal[l].get(name, 1) * nest.spatial[l].get(name, 1)
    return sizes


def _position(nest: Nest, operand: str, index: dict[str, int]) -> tuple[int, ...]:
    """The element that an iteration touches."""
    if operand == "inputs":
        x = index["P"] * nest.stride[0] + index["R"] * nest.dilation[0]
        y = index["Q"] * nest.stride[1] + index["S"] * nest.dilation[1]
        return (index["G"], index["N"], index["C"], x, y)
    return tuple(index[name] for name in OPERAND_LOOPS[operand])


def _box(nest: Nest, operand: str, origin: dict[str, int], sizes: dict[str, int]) -> frozenset:
    """Elements of a tile: the bounding box of what those of its iterations touch that exist."""
    last = {name: min(origin[name] + sizes[name], nest.bounds.get(name, 1)) - 1 for name in LOOPS}
    if any(last[name] < origin[name] for name in OPERAND_LOOPS[operand]):
        return frozenset()
    corners = zip(_position(nest, operand, origin), _position(nest, operand, last), strict=True)
    return frozenset(product(*(range(low, high + 1) for low, high in corners)))


def _visits(nest: Nest, operand: str, level: int, corner: dict[str, int] | None = None):
    """Runs the loops above an instance of a level and yields (step, visit) when another tile enters; every step at a MAC.

    A buffer keeps what it needs again only when the innermost loop that moves the operand has advanced by one.
    """
    loops = [loop for loop in _loops(nest) if loop.level > level]
    moving = [i for i, loop in enumerate(loops) if loop.name in OPERAND_LOOPS[operand]]
    sizes = _tile_sizes(nest, level)
    seen, before, held = set(), None, frozenset()
    for step, digits in enumerate(product(*(range(loop.factor) for loop in loops))):
        tile = tuple(digits[i] for i in moving)
        if level < 0:
            before = None
        if tile == before:
            continue
        origin = dict(corner or dict.fromkeys(LOOPS, 0))
        for loop, digit in zip(loops, digits, strict=True):
            origin[loop.name] += digit * loop.step
        elements = _box(nest, operand, origin, sizes)
        slid = before is not None and tile[:-1] == before[:-1] and tile[-1] == before[-1] + 1
        stays = held & elements if slid else frozenset()
        yield step, Visit(elements, elements - stays, tile not in seen)
        seen.add(tile)
        before, held = tile, elements


def _offsets(nest: Nest, level: int):
    """Index offsets of the branches below one level."""
    sizes = _tile_sizes(nest, level - 1)
    fan_out = nest.spatial[level]
    for digits in product(*(range(fan_out.get(name, 1)) for name in LOOPS)):
        yield {name: digit * sizes[name] for name, digit in zip(LOOPS, digits, strict=True)}


def _merged_branches(nest: Nest, operand: str, below: int, level: int) -> int:
    """Branches between two kept levels; the network of each level merges those that want the same tile."""
    branches = 1
    for l in range(below + 1, level + 1):
        branches *= len({_position(nest, operand, offset) for offset in _offsets(nest, l)})
    return branches


def _first_touches(nest: Nest, operand: str, visits: list, visits_below: list, below: int, level: int) -> int:
    """Words of one instance that are written from below when they hold no value yet.

    These are words that enter with the first visit of a tile: as many as the visit touches, at most all that enter.
    """
    steps_below = 1
    for l in range(below + 1, level + 1):
        for factor in nest.temporal[l].values():
            steps_below *= factor
    branches = [dict.fromkeys(LOOPS, 0)]
    for l in range(below + 1, level + 1):
        branches = [{n: a[n] + b[n] for n in LOOPS} for a in branches for b in _offsets(nest, l)]
    shifts = [_position(nest, operand, branch) for branch in branches]
    count, remaining = 0, deque(visits_below)
    for i, (_, visit) in enumerate(visits):
        end = visits[i + 1][0] if i + 1 < len(visits) else None
        touched = set()
        while remaining and (end is None or remaining[0][0] // steps_below < end):
            _, child = remaining.popleft()
            touched |= {tuple(e + s for e, s in zip(x, shift, strict=True)) for x in child.elements for shift in shifts}
        if visit.is_first:
            count += min(len(visit.entered), len(touched))
    return count
