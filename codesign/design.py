"""The chip as something to optimise: unconstrained numbers on one side, a buildable chip on the other.

Every free quantity moves on a logarithmic (or linear) scale between its bounds through a logistic, and is rounded to its grain
in the forward pass, straight through. So every iterate that is costed is already buildable, and legalising has nothing to round.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hw.chip import Chip
from hw.units import BYTE, KIB

Design = dict[str, jax.Array]  # variable name -> unconstrained (), or (c,) for a stack of chips


@dataclass(frozen=True)
class Variable:
    """One free quantity: bounds in its own unit, the grain it is built in, and whether it moves on a log scale.

    An `optional` one may also be 0, which leaves the memory out that it is the size of: a search looks that up, too.
    """

    low: float
    high: float
    grain: float
    unit: str = ""
    logarithmic: bool = True
    optional: bool = False

    def value(self, raw: jax.Array) -> jax.Array:
        """Physical value of an unconstrained number, on the grain, straight-through."""
        share = jax.nn.sigmoid(raw)
        if self.logarithmic:
            smooth = self.low * jnp.exp(share * float(np.log(self.high / self.low)))
        else:
            smooth = self.low + share * (self.high - self.low)
        built = jnp.round(smooth / self.grain) * self.grain
        return smooth + jax.lax.stop_gradient(jnp.clip(built, self.low, self.high) - smooth)

    def holding(self, value: float) -> Variable:
        """The same with a range that is widened, where need be, to hold a value of a grain or more; its ends stay on grains."""
        grains = value / self.grain  # of a float32, hence the tolerances
        low = min(self.low, max(math.floor(grains + 1e-4), 1) * self.grain)
        high = max(self.high, math.ceil(grains - 1e-4) * self.grain)
        return dataclasses.replace(self, low=low, high=high)

    def raw(self, value: float) -> jax.Array:
        """Unconstrained number of a physical value; values at a bound are moved a hundredth of the range inside."""
        if not self.low * (1 - 1e-6) <= value <= self.high * (1 + 1e-6):  # a float32 of an end may lie beside it
            raise ValueError(f"expected a value in [{self.low}, {self.high}] {self.unit}, got {value}; widen the range")
        span = np.log(self.high / self.low) if self.logarithmic else self.high - self.low
        share = (np.log(value / self.low) if self.logarithmic else value - self.low) / span
        share = np.clip(share, 0.01, 0.99)
        return jnp.asarray(np.log(share / (1 - share)), jnp.float32)


DEFAULT_VARIABLES: dict[str, Variable] = {
    "rows": Variable(2, 64, 1),
    "columns": Variable(2, 64, 1),
    "register_bytes": Variable(8, 256, 4, "bytes"),
    "local_kib": Variable(1, 256, 1, "KiB"),
    "shared_kib": Variable(8, 2048, 8, "KiB"),
    "local_bandwidth_bits": Variable(32, 4096, 32, "bits/cycle"),
    "shared_bandwidth_bits": Variable(32, 2048, 32, "bits/cycle"),
    "vdd": Variable(0.5, 1.0, 0.01, "V", logarithmic=False),
    "resident_fraction": Variable(1 / 16, 15 / 16, 1 / 16, logarithmic=False),
}

LEVELS = ("register_bytes", "local_kib")
"""Sizes of the memories that a chip can do without; 0 where it does."""

# What jumps from grain to grain: a search looks it up, no slope steers it.
SEARCHED_VARIABLES: dict[str, Variable] = DEFAULT_VARIABLES | {
    "local_banks": Variable(1, 16, 1),
    "shared_banks": Variable(1, 16, 1),
    "slice_bits": Variable(1, 8, 1, "bits"),
}


@dataclass(frozen=True)
class DesignSpace:
    """Which quantities of a base chip are free, and between what bounds.

    Attributes:
      base: the chip whose other numbers stay as they are; 4 levels (register, local SRAM, shared SRAM, DRAM).
      variables: the free quantities; static.
    """

    base: Chip
    variables: MappingABC[str, Variable]

    def column(self, name: str) -> np.ndarray:
        """One attribute of every free quantity, such as "low", "high" or "grain", in their order, (k,)."""
        return np.array([getattr(variable, name) for variable in self.variables.values()])

    def initial(self) -> Design:
        """The unconstrained design of the base chip itself.

        Raises:
          ValueError: one of its quantities is outside the range in which it is free; names it.
        """
        values, design = physical_values(self.base), {}
        for name, variable in self.variables.items():
            try:
                design[name] = variable.raw(values[name])
            except ValueError as error:
                raise ValueError(f"{name} of the chip: {error}, or do not free it") from None
        return design

    def chip(self, design: Design) -> Chip:
        """The buildable chip of a design, differentiable straight through its grains."""
        return with_values(self.base, {name: self.variables[name].value(raw) for name, raw in design.items()})

    def neighbours(self, design: Design, step: float = 0.25) -> list[Chip]:
        """The chip itself, and behind it the chips one step larger in each quantity that bounds a mapping.

        A step is at least one grain: `step` is the relative growth. What limits mappings are array size and capacities.
        """
        values = {name: self.variables[name].value(raw) for name, raw in design.items()}
        chips = [with_values(self.base, values)]
        for name in ("rows", "columns", "register_bytes", "local_kib", "shared_kib"):
            if name in values:
                variable = self.variables[name]
                larger = jnp.ceil(values[name] * (1 + step) / variable.grain) * variable.grain
                chips.append(with_values(self.base, values | {name: jnp.minimum(larger, variable.high)}))
        return chips

    def _repr_html_(self) -> str:
        values = physical_values(self.base)
        rows = "".join(
            f"<tr><td>{name.replace('_', ' ')}</td><td>{values[name]:.6g}</td><td>{variable.low:.4g} to "
            f"{variable.high:.4g}</td><td>{variable.grain:.4g}</td><td>{variable.unit}</td></tr>"
            for name, variable in self.variables.items()
        )
        head = "<tr><th>free quantity</th><th>base chip</th><th>range</th><th>grain</th><th>unit</th></tr>"
        return f"<p>{len(self.variables)} free quantities</p><table>{head}{rows}</table>{self.base._repr_html_()}"

    def random(self, key: jax.Array) -> Design:
        """A design drawn uniformly on each quantity's own scale."""
        shares = jax.random.uniform(key, (len(self.variables),), minval=0.02, maxval=0.98)
        return {name: jax.scipy.special.logit(share) for name, share in zip(self.variables, shares, strict=True)}


def physical_values(chip: Chip) -> dict[str, float]:
    """The quantities that a design can free, as a concrete chip has them, in the units of `SEARCHED_VARIABLES`."""
    size = np.asarray(chip.size_bits, np.float64)
    bandwidth = np.asarray(chip.bandwidth_bits, np.float64)
    columns, rows = np.asarray(chip.fanout, np.float64)[chip.array_level]
    return {
        "rows": float(rows),
        "columns": float(columns),
        "register_bytes": float(size[0] / BYTE),
        "local_kib": float(size[1] / KIB),
        "shared_kib": float(size[2] / KIB),
        "local_bandwidth_bits": float(bandwidth[1]),
        "shared_bandwidth_bits": float(bandwidth[2]),
        "vdd": float(chip.vdd),
        "resident_fraction": float(chip.resident_fraction),
        "local_banks": float(chip.banks[1]),
        "shared_banks": float(chip.banks[2]),
        "slice_bits": float(chip.mac.slice_bits),
    }


def with_values(chip: Chip, values: MappingABC[str, jax.Array]) -> Chip:
    """The chip with some of its quantities replaced; values in the units of `SEARCHED_VARIABLES`, traced or concrete."""
    size, bandwidth, fanout, banks, mac = chip.size_bits, chip.bandwidth_bits, chip.fanout, chip.banks, chip.mac
    scale = {"register_bytes": (0, BYTE), "local_kib": (1, KIB), "shared_kib": (2, KIB)}
    for name, (level, bits) in scale.items():
        if name in values:
            size = size.at[level].set(values[name] * bits)
    for name, level in {"local_bandwidth_bits": 1, "shared_bandwidth_bits": 2}.items():
        if name in values:
            bandwidth = bandwidth.at[level].set(values[name])
    for name, level in {"local_banks": 1, "shared_banks": 2}.items():
        if name in values:
            banks = banks.at[level].set(values[name])
    for name, axis in {"columns": 0, "rows": 1}.items():
        if name in values:
            fanout = fanout.at[chip.array_level, axis].set(values[name])
    if "slice_bits" in values:
        mac = dataclasses.replace(mac, slice_bits=jnp.asarray(values["slice_bits"], chip.vdd.dtype))
    # A Python float would be weakly typed, and every function that takes the chip compiled once more for it.
    direct: dict[str, Any] = {
        name: jnp.asarray(values[name], chip.vdd.dtype) for name in ("vdd", "resident_fraction") if name in values
    }
    return dataclasses.replace(
        chip, size_bits=size, bandwidth_bits=bandwidth, fanout=fanout, banks=banks, mac=mac, **direct
    )
