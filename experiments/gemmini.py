"""The accelerator of DOSA's experiments, its constants and layer tables: what other tools' figures are compared on.

A square array of 8-bit MACs with one weight register each (level 0), an accumulator per column that holds outputs in
32-bit words (level 1), a scratchpad of weights and inputs (level 2) and DRAM (level 3). Input channels fan out along the
rows, output channels along the columns. Energies are constants per access of a word and level, whether read, filled or
updated; latency is that of the slowest level at its bandwidth in words per cycle, everything else overlapped.

Source: Hong et al., "DOSA: differentiable model-based one-loop search for DNN accelerators", MICRO 2023, and its
repository (energy_model.py, latency_model.py, arch.yaml), there fitted to Accelergy and CACTI at 40 nm. The area proxy
and the layer tables are those of the project's reference data, copied to gemmini_workloads.json.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.flat import FlatPrices
from codesign.mapspace import Array, Counts, Limits, Nest, Price, Space
from codesign.rundir import read_json
from hw.operation import LOOPS

WORKLOADS = Path(__file__).with_name("gemmini_workloads.json")

MAC_PJ, REGISTER_PJ, DRAM_PJ = 0.5608, 0.48746172, 100.0
ACCUMULATOR_PJ = (1.94, 0.1005)  # at no capacity, and per KiB and column
SCRATCHPAD_PJ = (0.49, 0.02513)  # at no capacity, and per KiB
REGISTER_BANDWIDTH, DRAM_BANDWIDTH = 10_000.0, 8.0  # words per cycle, all registers together
ACCUMULATOR_BANDWIDTH, SCRATCHPAD_BANDWIDTH = 2.0, 2.0  # words per cycle for each column in use, and for each column
AREA_MM2 = (4.34e-4, 2.68e-3, 5.68e-3)  # per MAC, KiB of scratchpad, KiB of accumulator
WORD_BYTES = 4  # of the accumulator
PE, SCRATCHPAD, ACCUMULATOR = range(3)
DEFAULT = (16, 128, 32)
"""MACs per side, KiB of scratchpad, KiB of accumulator."""


def accumulator_pj(kib: float, columns: float) -> float:
    """Picojoules of one access of a word."""
    return ACCUMULATOR_PJ[0] + ACCUMULATOR_PJ[1] * kib / columns


def scratchpad_pj(kib: float) -> float:
    """Picojoules of one access of a word."""
    return SCRATCHPAD_PJ[0] + SCRATCHPAD_PJ[1] * kib


@dataclass(frozen=True)
class Gemmini:
    """The family of `codesign.family_search.Family`: side of the array, scratchpad and accumulator in KiB, whole numbers.

    Its ranges are those that DOSA draws starting points from (there powers of two).
    """

    parameters: tuple[str, ...] = ("pe_dim", "sp_kib", "acc_kib")
    low: tuple[int, ...] = (2, 1, 1)
    high: tuple[int, ...] = (128, 2048, 2048)
    is_capacity: tuple[bool, ...] = (False, True, True)

    @property
    def space(self) -> Space:
        """Mappings of the largest chip. A register holds one weight, so no loop runs in time below it that would not as
        well run innermost above: N, P and Q there let the same weight rest."""
        levels = 4
        spatial = np.zeros((levels, 2, len(LOOPS)), bool)
        spatial[1, 1, LOOPS.index("C")] = spatial[2, 0, LOOPS.index("K")] = True
        temporal = np.ones((levels, len(LOOPS)), bool)
        temporal[0] = False
        limits = self.limits(self.low, self.high)
        return Space(
            keep=np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]], bool),
            temporal=temporal,
            spatial=spatial,
            fanout=limits.fanout,
            capacity=limits.capacity,
            width=np.ones((levels, 3)),
        )

    def limits(self, low: tuple[int, ...], high: tuple[int, ...]) -> Limits:
        """The widest of a box: an accumulator of a column is largest with the fewest columns."""
        column_words = high[ACCUMULATOR] * 1024 / WORD_BYTES / low[PE]
        fanout = np.ones((4, 2))
        fanout[1, 1] = fanout[2, 0] = high[PE]
        return Limits(np.array([1, column_words, high[SCRATCHPAD] * 1024, np.inf]), fanout)

    def price(self, low: tuple[int, ...], high: tuple[int, ...], nest: Nest) -> Price:
        """Energy in microjoules and latency in cycles, at the lowest of a box."""
        per_access = (
            REGISTER_PJ,
            accumulator_pj(low[ACCUMULATOR], high[PE]),
            scratchpad_pj(low[SCRATCHPAD]),
            DRAM_PJ,
        )
        mac_energy = MAC_PJ * nest.macs

        def cost(counts: Counts) -> Array:
            register, accumulator, scratchpad, dram = accesses = [counts.accesses(l) for l in range(4)]
            energy = mac_energy + sum(pj * words for pj, words in zip(per_access, accesses, strict=True))
            cycles = (
                counts.cycles,
                register / REGISTER_BANDWIDTH,
                accumulator * counts.share(1) / ACCUMULATOR_BANDWIDTH,
                scratchpad / (SCRATCHPAD_BANDWIDTH * high[PE]),
                dram / DRAM_BANDWIDTH,
            )
            return np.stack([1e-6 * energy, np.maximum.reduce(cycles)])

        return cost

    def flat(self, chip: tuple[int, ...]) -> tuple[Space, FlatPrices]:
        """Space and prices of one chip for local search, energies in microjoules."""
        limits, (pe, scratchpad, accumulator) = self.limits(chip, chip), chip
        space = dataclasses.replace(self.space, capacity=limits.capacity, fanout=limits.fanout)
        access = np.array([REGISTER_PJ, accumulator_pj(accumulator, pe), scratchpad_pj(scratchpad), DRAM_PJ])
        bandwidth = np.array([REGISTER_BANDWIDTH, ACCUMULATOR_BANDWIDTH, SCRATCHPAD_BANDWIDTH * pe, DRAM_BANDWIDTH])
        numbers = (1e-6 * access, 1e-6 * MAC_PJ, bandwidth, [1.0, 0.0, 0.0, 0.0])
        return space, FlatPrices(*(jnp.asarray(x, float) for x in numbers))

    def needed(self, counts: Counts, low: tuple[int, ...], high: tuple[int, ...]) -> NDArray[np.int64]:
        """The largest array of a box, with memories that hold the tiles."""
        scratchpad = np.ceil((counts.tile(2, 0) + counts.tile(2, 1)) / 1024)
        accumulator = np.ceil(counts.tile(1, 2) * high[PE] * WORD_BYTES / 1024)
        return np.stack([np.full_like(scratchpad, high[PE]), scratchpad, accumulator], axis=1).astype(np.int64)

    def area(self, chip: tuple[int, ...]) -> float:
        """Square millimetres."""
        return AREA_MM2[0] * chip[PE] ** 2 + AREA_MM2[1] * chip[SCRATCHPAD] + AREA_MM2[2] * chip[ACCUMULATOR]


class Workload(NamedTuple):
    """The distinct layers of a network, and how often each occurs."""

    nests: tuple[Nest, ...]
    counts: tuple[int, ...]


def read_workload(path: Path, name: str) -> Workload:
    """One network of a file of layer tables.

    Raises:
      ValueError: no such file or network, or a layer without one of its numbers.
    """
    try:
        networks = read_json(path)["workloads"]
        layers = networks[name]["layers"]
        nests = [
            Nest(tuple(layer.get(d, 1) for d in LOOPS), (layer["Wstride"], layer["Hstride"]), (1, 1))
            for layer in layers
        ]
        return Workload(tuple(nests), tuple(layer["count"] for layer in layers))
    except OSError as error:
        raise ValueError(f"expected a file of layer tables, got {path}: {error.strerror}; give --workloads") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected layers of {name} in {path}, got none that can be read: {error!r}") from error
