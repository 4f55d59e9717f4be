"""Boxes of chips: what a step costs at least on any chip between two corners, and where to cut a box in two.

Chips of a `DesignSpace` are rows of values in the units of `SEARCHED_VARIABLES`, one column for each free quantity. Every
quantity stands on its grain, so that there are finitely many chips and a branch and bound over them ends.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.design import DesignSpace, with_values
from codesign.uncertainty import QUICKLY_COMPILED
from hw import memory
from hw.bounds import Corners, StepBound, step_bound
from hw.chip import Chip
from hw.memory import MemoryLevel
from hw.schedule import Step

Array = NDArray[np.float64]
_OF_MEMORY = {"local_bandwidth_bits": "local_kib", "local_banks": "local_kib"}
_SUPPLIES = 8  # parts of a box's range of supplies that are bounded apart: least energy and least latency are far apart


class Work(NamedTuple):
    """What chips are searched for: a step, widths (n, 3) of its operands and (m,) of its tensors."""

    step: Step
    operation_bits: jax.Array
    tensor_bits: jax.Array


class Box(NamedTuple):
    """All chips of a space between two corners, both included, (k,) each."""

    low: Array
    high: Array


class BoxBounds(NamedTuple):
    """Least energy, latency, area, power and bits of SRAM, (boxes, parts): of each part of the range of supplies."""

    energy: Array
    latency: Array
    area: Array
    power: Array
    sram: Array


def whole_space(space: DesignSpace) -> list[Box]:
    """Boxes that hold all chips of a space together: one for each hierarchy and width of a slice, which a bound needs to know."""
    intervals = [
        [(width, width) for width in range(int(v.low), int(v.high) + 1)]
        if name == "slice_bits"
        else [(v.low, v.high)] + [(0.0, 0.0)] * v.optional
        for name, v in space.variables.items()
    ]
    chosen = (zip(*box, strict=True) for box in itertools.product(*intervals))
    return [Box(*(settled(space, np.array(end, float)) for end in ends)) for ends in chosen]


def settled(space: DesignSpace, values: Array) -> Array:
    """Values (..., k) in which what belongs to a memory that is left out has its least value: one row for each chip."""
    names, rows = list(space.variables), values.copy()
    for name, size in _OF_MEMORY.items():
        if name in names and size in names:
            is_absent = values[..., names.index(size)] == 0
            rows[..., names.index(name)][is_absent] = space.variables[name].low
    return rows


def hierarchy(space: DesignSpace, values: Array) -> NDArray[np.int32]:
    """Which memories chips (..., k) lack, as a number in binary, a digit for each that may be left out, (...)."""
    is_absent = values[..., space.column("optional")] == 0
    return (is_absent @ (2 ** np.arange(is_absent.shape[-1]))).astype(np.int32)


def every_hierarchy(space: DesignSpace, values: Array) -> Array:
    """A chip (k,) without each set of the memories that may be left out, (hierarchies, k), in the order of `hierarchy`."""
    columns = np.flatnonzero(space.column("optional"))
    chips = np.tile(np.where(values > 0, values, space.column("low")), (2 ** len(columns), 1))
    for digit, column in enumerate(columns):
        chips[(np.arange(len(chips)) >> digit) % 2 == 1, column] = 0.0
    return settled(space, chips)


def halves(space: DesignSpace, box: Box) -> Iterator[tuple[Box, Box]]:
    """Every way to cut a box in two along one quantity, in the middle of its own scale."""
    for column, variable in enumerate(space.variables.values()):
        low, high = box.low[column], box.high[column]
        if high - low < 0.5 * variable.grain:
            continue
        middle = np.sqrt(low * high) if variable.logarithmic else (low + high) / 2
        cut = low + max(0.0, np.floor((middle - low) / variable.grain + 1e-6)) * variable.grain
        below, above = box.high.copy(), box.low.copy()
        below[column], above[column] = cut, min(cut + variable.grain, high)
        yield Box(box.low, below), Box(above, box.high)


def bound_boxes(space: DesignSpace, boxes: list[Box], work: Work) -> BoxBounds:
    """What the work costs at least on any chip of each box, whatever its mappings."""
    low, high = (jnp.asarray(np.stack(ends), jnp.float32) for ends in zip(*boxes, strict=True))
    found, sram = _bound(space.base, tuple(space.variables), low, high, work)
    return BoxBounds(*(np.asarray(x, np.float64) for x in (*found, sram)))


@functools.partial(jax.jit, static_argnames="names", compiler_options=QUICKLY_COMPILED)
def _bound(
    base: Chip, names: tuple[str, ...], low: jax.Array, high: jax.Array, work: Work
) -> tuple[StepBound, jax.Array]:
    def one(low: jax.Array, high: jax.Array) -> tuple[StepBound, jax.Array]:
        small, large = (with_values(base, dict(zip(names, end, strict=True))) for end in (low, high))
        supplies = small.vdd + (large.vdd - small.vdd) * jnp.linspace(0.0, 1.0, _SUPPLIES + 1)

        def at(low_vdd: jax.Array, high_vdd: jax.Array) -> tuple[StepBound, jax.Array]:
            ends = with_values(small, {"vdd": low_vdd}), with_values(large, {"vdd": high_vdd})
            return step_bound(make_corners(*ends), *work), sram_bits(small)

        return jax.vmap(at)(supplies[:-1], supplies[1:])

    return jax.vmap(one)(low, high)


def make_corners(small: Chip, large: Chip) -> Corners:
    """Corners of the box between two chips, each quantity of `large` at least that of `small`.

    Energy per bit and area fall in some quantities and rise in others: a wide port shares its overhead and has more
    periphery, banks are short and many. Each term takes the end of each quantity where it is least.
    """
    energy = small.energy_per_bit()
    for i, level in enumerate(small.levels()):
        if level.kind == "sram":
            energy = energy.at[i].set(_least_sram_energy(small, level, large.levels()[i], i))
    # Area has the squared width of a port per bank: least where few bits per cycle come from many banks.
    bandwidth = small.bandwidth_bits * small.banks / large.banks
    return Corners(dataclasses.replace(small, bandwidth_bits=bandwidth), large, energy)


def _least_sram_energy(chip: Chip, small: MemoryLevel, large: MemoryLevel, index: int) -> jax.Array:
    """At most the energy per bit (2,) of an SRAM between two, at the supply of `chip`.

    The rows of the smallest bank, periphery of the narrowest port included, at the width of the widest port.
    """
    narrowest, widest = small.bandwidth_bits / large.banks, large.bandwidth_bits / small.banks
    rows = chip.technology["sram.energy.rows"]
    bits = small.size_bits / large.banks + rows * (narrowest - widest)
    level = MemoryLevel(bits, widest, jnp.ones_like(widest), small.kind, small.ports)
    return memory.access_energy(level, chip.technology, chip.level_vdd()[index]) / widest


def sram_bits(chip: Chip) -> jax.Array:
    """Bits of all SRAM on a chip, shape ()."""
    is_sram = np.array([kind == "sram" for kind in chip.kinds])
    return jnp.sum(chip.instances() * jnp.where(is_sram, chip.size_bits, 0.0))
