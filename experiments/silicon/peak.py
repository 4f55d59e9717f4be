"""What a chip does at full use of its array: energy of a product by part, throughput, area, and the doubt about each."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hw.accesses import count
from hw.arithmetic import make_mac, partial_sum_bits, product_cycles, product_energy
from hw.chip import Chip
from hw.chips import PRESETS, Preset
from hw.cost import price
from hw.mapping import Mapping
from hw.operation import LOOPS, Operation
from hw.technology import sample_technologies
from hw.units import MM2

CHANNELS, OUTPUTS, TAPS = 4.0, 32.0, 3.0
PARTS_OF_ENERGY = ("MACs", "registers", "local", "shared", "clock and control", "leakage")
# Supplies are told in hundredths of a volt: half of one, either way, is not told.
SUPPLY_DIGIT = 5e-3


class Peak(NamedTuple):
    """What a chip does at full use of its array; each of shape (n,), in the order of `sample_chip`.

    Efficiency in TOPS/W, throughput in GOPS, area in mm2; `table` is the energy of a look-up MAC over a plain one. `energy`
    is the first entry's alone: joules per product by `PARTS_OF_ENERGY`, shape (6,).
    """

    efficiency: np.ndarray
    energy: np.ndarray
    throughput: np.ndarray
    area: np.ndarray
    table: np.ndarray

    @property
    def power(self) -> np.ndarray:
        """Power of the core in mW, shape (n,)."""
        return self.throughput / self.efficiency


def make_tilings() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tilings of the workload over register, local, shared memory and DRAM: factors (m, 4, 8), order, keep (m, 4, 3).

    Which operands rest in the registers, how much of each loop is done there, in the local and in the shared memory, and
    whether weights or outputs rest while the loops run.
    """
    index = {loop: i for i, loop in enumerate(LOOPS)}
    orders = [[index[loop] for loop in order] for order in ("PQRSCKNG", "CRSPQKNG")]
    factors, ranks, keeps = [], [], []
    choices = itertools.product(
        ((1, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)),  # operands in the registers
        (1, 4, 16), (1, 4),  # outputs and channels there
        (1, 4, 32), (1, 3), (1, 4), (1, 4),  # rows of outputs, of taps, channels in and out in the local memory
        (2, 3), (2, 3), orders,  # where the rest of the rows and of the channels runs
    )  # fmt: skip
    for registers, p0, c0, q1, taps1, c1, k1, rows_at, channels_at, order in choices:
        nothing_left = (rows_at > 2 and q1 == OUTPUTS) or (channels_at > 2 and c0 * c1 == k1 == CHANNELS)
        if c0 * c1 > CHANNELS or nothing_left:
            continue
        temporal = np.ones((4, len(LOOPS)))
        temporal[0, [index["P"], index["C"]]] = p0, c0
        temporal[1, [index[loop] for loop in "PQRSCK"]] = OUTPUTS / p0, q1, taps1, taps1, c1, k1
        temporal[rows_at, index["Q"]] = OUTPUTS / q1
        temporal[2, [index["R"], index["S"]]] = TAPS / taps1
        temporal[channels_at, [index["C"], index["K"]]] = CHANNELS / (c0 * c1), CHANNELS / k1
        factors.append(temporal)
        ranks.append(np.tile(np.argsort(order), (4, 1)))
        keeps.append([registers, (1, 1, 1), (1, 1, 1), (1, 1, 1)])
    return np.array(factors), np.array(ranks, np.int32), np.array(keeps, float)


@jax.jit
def evaluate_peak(chips: Chip, bits: jax.Array) -> jax.Array:
    """Joules per product of chips (n,) at widths (n, 3), split into `PARTS_OF_ENERGY`, shape (n, 6).

    At the cheapest mapping that fits; infinite where none does.
    """
    factors, ranks, keeps = (jnp.asarray(array) for array in make_tilings())

    def of_chip(args: tuple[Chip, jax.Array]) -> jax.Array:
        chip, bits = args
        leakage, frequency = chip.leakage_power(), chip.frequency()
        # Output channels lie along the columns of an array and over its clusters, input channels along the rows.
        above = chip.array_level + 1
        rows = chip.fanout[:above, 1].prod()
        columns = chip.fanout[:, 0].prod() * chip.fanout[above:, 1].prod()
        one = jnp.ones((), bits.dtype)
        bounds = jnp.stack([one, one, CHANNELS * columns, CHANNELS * rows, *(one * OUTPUTS,) * 2, *(one * TAPS,) * 2])
        taps = jnp.full(2, OUTPUTS * TAPS, bits.dtype)
        operation = Operation(bounds, jnp.ones(2), jnp.ones(2), taps, jnp.array([0.0, 0.0, 1.0]))
        spatial = jnp.ones((len(chip.kinds), 2, len(LOOPS)))
        spatial = spatial.at[:, 0, LOOPS.index("K")].set(chip.fanout[:, 0])
        spatial = spatial.at[above:, 1, LOOPS.index("K")].set(chip.fanout[above:, 1])
        spatial = spatial.at[:above, 1, LOOPS.index("C")].set(chip.fanout[:above, 1])

        def of_tiling(temporal: jax.Array, order: jax.Array, keep: jax.Array) -> jax.Array:
            accesses = count(operation, Mapping(temporal, spatial, order, keep))
            cost = price(chip, operation, accesses, bits, jnp.ones(2), jnp.zeros(3))
            # Core power is measured with data on the chip: neither joules nor cycles of DRAM.
            seconds = jnp.maximum(cost.compute_cycles, cost.level_cycles[:-1].max()) / frequency
            memories = cost.access_energy[:-1].sum(axis=1)
            joules = jnp.stack([cost.mac_energy, *memories, cost.control_energy, leakage * seconds])
            # The array is filled exactly, up to rounding of its side.
            fits = cost.violation.sum() < 1e-3
            return jnp.where(fits, joules / cost.macs, jnp.inf)

        joules = jax.vmap(of_tiling)(factors, ranks, keeps)
        return joules[jnp.argmin(joules.sum(axis=1))]

    return jax.lax.map(of_chip, (chips, bits))


def sample_chip(preset: Preset, samples: int) -> tuple[list[dict[str, float]], list[Any]]:
    """Assumed numbers and technologies of a preset: as chosen, `samples` other technologies, each assumption at either end.

    Both of length 1 + samples + 2 per assumption: what `experiments.systems.record.swept` makes a figure of.
    """
    assumed, own = preset.assumed(), preset.technology()
    chosen = {key: it.value for key, it in assumed.items()}
    ends = [chosen | {key: end} for key, it in assumed.items() for end in (it.low, it.high)]
    drawn = sample_technologies(jax.random.key(0), samples, own)
    technologies = [own, *(jax.tree.map(lambda x: x[i], drawn) for i in range(samples))]  # noqa: B023
    return [chosen] * (1 + samples) + ends, technologies + [own] * len(ends)


def supplies(vdd: float, samples: int, ends: int) -> np.ndarray:
    """A supply as it is told, `samples` that would be told alike, independent for each told supply, and as told again.

    Shape (1 + samples + ends,).
    """
    untold = np.random.default_rng(round(1000 * vdd)).uniform(-SUPPLY_DIGIT, SUPPLY_DIGIT, samples)
    return vdd + np.concatenate([[0.0], untold, np.zeros(ends)])


@functools.cache
def measure(name: str, mode: str, vdd: float | None, samples: int) -> Peak:
    """A published chip in one mode at one supply, as `measure_preset` finds it."""
    return measure_preset(PRESETS[name], mode, vdd, samples)


def measure_preset(preset: Preset, mode: str, vdd: float | None, samples: int) -> Peak:
    """A preset in one mode at one supply.

    Raises:
      ValueError: no mapping fits the chip as it is assumed to be.
    """
    draws, technologies = sample_chip(preset, samples)
    volts = [None] * len(draws) if vdd is None else supplies(vdd, samples, len(draws) - 1 - samples).tolist()
    chips = [preset.make(mode, *args) for args in zip(volts, draws, technologies, strict=True)]
    widths = [(*preset.bits(mode, values), preset.bits(mode, values)[1]) for values in draws]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]), *chips)
    joules = np.asarray(evaluate_peak(stacked, jnp.array(widths, jnp.float32)), float)
    if not np.isfinite(joules[0]).all():
        raise ValueError(f"{preset.title}, {mode}: no mapping of the workload fits; enlarge its registers or SRAM")
    clock = float(chips[0].frequency())
    speed = [
        clock * float(chip.num_macs() / product_cycles(chip.mac, jnp.array(width[:2], jnp.float32)))
        for chip, width in zip(chips, widths, strict=True)
    ]
    return Peak(
        # A sample whose memories are too small for every mapping says nothing about the chip.
        efficiency=np.where(np.isfinite(joules).all(axis=1), 2e-12 / joules.sum(axis=1), np.nan),
        energy=joules[0],
        throughput=2e-9 * np.array(speed),
        area=np.array([float(chip.area().total) for chip in chips]) / MM2,
        table=np.array([look_up_energy(chip, width) for chip, width in zip(chips, widths, strict=True)]),
    )


def look_up_energy(chip: Chip, bits: Sequence[float]) -> float:
    """Energy of a product on the chip's MACs over that on plain ones of just these widths, an accumulator each."""
    if chip.mac.style != "lut":
        return np.nan
    widths = jnp.array(bits[:2], jnp.float32)
    sum_bits = partial_sum_bits(chip.mac, widths, jnp.float32(512))
    plain = make_mac("fixed", (float(bits[0]), float(bits[1])))
    ours, theirs = (product_energy(mac, chip.technology, chip.vdd, widths, sum_bits) for mac in (chip.mac, plain))
    return float(ours / theirs)
