"""S7, UNPU: throughput exactly, efficiency and the saving of look-up tables from the cost model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.silicon.peak import PARTS_OF_ENERGY, evaluate_peak, measure
from experiments.systems.record import Figure, System, exactly, swept
from hw.chip import Chip
from hw.chips import PRESETS
from hw.chips.preset import Mode

WIDTHS = (16, 8, 4, 1)
UNPU = PRESETS["unpu"]


def measure_system(quick: bool) -> System:
    """Headlines and ablations of UNPU."""
    samples = 4 if quick else 32
    peaks = {bits: measure("unpu", f"{bits} bit", None, samples) for bits in WIDTHS}
    figures: dict[str, Figure] = {}
    for bits in WIDTHS:
        fast = measure("unpu", f"{bits} bit", 1.1, samples)
        figures[f"throughput, {bits} bit"] = exactly(round(float(fast.throughput[0]), 4))
        figures[f"efficiency, {bits} bit"] = swept(peaks[bits].efficiency, samples)
        table = swept(peaks[bits].table, samples)
        saved = Figure(*(100.0 * (1.0 - share) for share in (table.ours, table.high, table.low)))
        figures[f"saved by look-up tables, {bits} bit"] = saved
    figures["efficiency from 16 to 1 bit"] = swept(peaks[1].efficiency / peaks[16].efficiency, samples)
    del figures["efficiency, 8 bit"]
    return System(
        workload="a 3 x 3 convolution that fills the array, core power",
        figures=figures,
        ablation=_ablation(),
        assumptions=UNPU.assumed(),
        notes=(
            "Throughputs follow from 4608 look-ups a cycle, which the 16-bit figure gave; the others are predictions. Of "
            "the efficiencies, MACs alone take nearly what the whole core reports, and inputs on their way over a core more "
            "than that at 1 bit; its units have feature loaders of their own, and its supply is not public."
        ),
    )


def _ablation() -> dict[str, dict[str, float]]:
    """Energy of a product with each mechanism off, over that with all, at 16, 4 and 1 bit."""
    without = {
        "look-up tables (plain serial MACs)": dataclasses.replace(UNPU, modes=_restyled("serial")),
        "bits that cost cycles (16-bit multipliers)": dataclasses.replace(UNPU, modes=_restyled("fixed")),
    }
    values = {
        "adder tree": {"tree": 1.0},
        "sharing of tables": {"table_sharing": 1.0},
        "low supply (1.1 V)": {"vdd": 1.1},
    }
    full = _joules([UNPU.make(f"{bits} bit") for bits in WIDTHS])
    rows = {name: _joules([preset.make(f"{bits} bit") for bits in WIDTHS]) for name, preset in without.items()}
    rows |= {name: _joules([UNPU.make(f"{bits} bit", values=v) for bits in WIDTHS]) for name, v in values.items()}
    labels = [f"energy x, {bits} bit" for bits in WIDTHS]
    return {name: dict(zip(labels, (row / full).tolist(), strict=True)) for name, row in rows.items()}


def _restyled(style: str) -> dict[str, Mode]:
    return {name: dataclasses.replace(mode, style=style) for name, mode in UNPU.modes.items()}


def _joules(chips: list[Chip]) -> np.ndarray:
    """Energy of a product of each chip at `WIDTHS`."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]), *chips)
    widths = jnp.array([[bits, 16.0, 16.0] for bits in WIDTHS], jnp.float32)
    return np.asarray(evaluate_peak(stacked, widths), float)[:, : len(PARTS_OF_ENERGY)].sum(axis=1)
