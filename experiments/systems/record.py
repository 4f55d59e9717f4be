"""What a system's module hands to the table: figures with intervals, ablations, workload and assumptions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hw.chips.preset import Assumption

PERCENTILES = (5, 95)
Values = Mapping[str, float]
Samples = dict[str, np.ndarray]


class Figure(NamedTuple):
    """A number of ours and its interval."""

    ours: float
    low: float
    high: float


@dataclass(frozen=True)
class System:
    """What was measured of one system.

    Attributes:
      workload: on which network, data and batch.
      figures: by the name of the headline in hw/chips/systems.yaml.
      ablation: by mechanism, or the state it is compared with: named numbers, one of them the factor it costs.
      assumptions: what the figures were swept over.
      notes: why a headline misses, and what else has to be known to read it.
      accuracy: test accuracy of the training scheme beside float32, per cent.
    """

    workload: str
    figures: Mapping[str, Figure]
    ablation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    assumptions: Mapping[str, Assumption] = field(default_factory=dict)
    notes: str = ""
    accuracy: Mapping[str, float] = field(default_factory=dict)


def exactly(value: float) -> Figure:
    """A figure without any doubt."""
    return Figure(float(value), float(value), float(value))


def between(values: np.ndarray) -> Figure:
    """The first entry, and the central 90 % of the others, widened to hold it."""
    low, high = np.nanpercentile(values[1:] if len(values) > 1 else values, PERCENTILES)
    return Figure(float(values[0]), float(min(low, values[0])), float(max(high, values[0])))


def swept(values: np.ndarray, samples: int) -> Figure:
    """The first entry; the interval of the `samples` after it times the range of the rest, assumptions moved one at a time.

    An end of an assumption at which the chip cannot run the workload (NaN) says nothing about the chip.
    """
    ours, low, high = between(values[: 1 + samples])
    ends = np.append(values[1 + samples :], ours)
    return Figure(ours, low * float(np.nanmin(ends)) / ours, high * float(np.nanmax(ends)) / ours)


def widened(figure: Figure, *others: Figure) -> Figure:
    """A figure whose interval holds those of others."""
    lows, highs = zip(*((it.low, it.high) for it in (figure, *others)), strict=True)
    return Figure(figure.ours, min(lows), max(highs))


def sweep(measure: Callable[[Values], Samples], assumptions: Mapping[str, Assumption]) -> dict[str, Figure]:
    """Figures whose interval is that of the technology times the range over the assumptions, one moved at a time.

    Args:
      measure: assumed numbers, by name, to figures: the value and then the same under drawn technologies.
      assumptions: to move to their low and high ends.
    """
    nominal = measure({})
    moved = [measure({name: end}) for name, it in assumptions.items() for end in (it.low, it.high)]
    ends = {name: [float(other[name][0]) for other in moved] for name in nominal}
    return {name: swept(np.append(values, ends[name]), len(values) - 1) for name, values in nominal.items()}
