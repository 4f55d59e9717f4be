"""S8 as a budget: a chip for two stereo CNNs within 10 mW and 33.3 ms, found by descent over its sizes and supply."""

import jax
import jax.numpy as jnp
import numpy as np

from codesign.design import DEFAULT_VARIABLES, DesignSpace, physical_values
from codesign.evaluation import Evaluated, evaluate
from codesign.legalize import polish
from codesign.uncertainty import interval, sample_step
from experiments.systems.networks import stereo_pair
from experiments.systems.record import Figure, System, Values
from experiments.systems.steps import trace_shapes
from hw.arithmetic import make_mac
from hw.chip import make_chip
from hw.chips.preset import Assumption
from hw.pipeline import row_pipelined

FRAME = 33.3e-3
BUDGETS = {"energy": 10e-3 * FRAME, "latency": FRAME}
FREE = ("rows", "columns", "local_kib", "shared_kib", "vdd")
ASSUMED = {
    "width": Assumption(160, 80, 320, "columns of an image, 3/4 as many rows; not public"),
    "channels": Assumption(8, 4, 16, "of every layer; not public"),
    "bits": Assumption(8, 4, 16, "of weights and activations; not public"),
}


def design(sizes: Values, rounds: int, evaluations: int, *, rows: bool = True) -> tuple[Evaluated, Evaluated, tuple]:
    """The start, what descent ends with, and the step with its widths."""
    width, channels, bits = (sizes[name] for name in ASSUMED)
    network, shapes = stereo_pair(int(channels))
    workload = trace_shapes(network, shapes, (2, int(width * 0.75), int(width), 1))
    step, table = workload.inference, jnp.full((6, 4), float(bits))
    widths = workload.operation_bits(table)[: step.operation_slot.shape[0]], workload.tensor_bits(table)
    step = row_pipelined(step) if rows else step
    chip = make_chip(rows=16, columns=16, node_nm=65, mac=make_mac("fixed", (bits, bits)), vdd=0.7)
    space = DesignSpace(chip, {name: DEFAULT_VARIABLES[name] for name in FREE})
    start = evaluate(chip, step, *widths, jax.random.key(0), evaluations=evaluations)
    found = polish(space, start, step, *widths, BUDGETS, jax.random.key(1), max_rounds=rounds, evaluations=evaluations)
    return start, found, (step, *widths)


def measure_system(quick: bool) -> System:
    """The budget, and how much of the workload still fits it."""
    rounds, evaluations = (1, 64) if quick else (8, 2000)
    nominal = {name: it.value for name, it in ASSUMED.items()}
    start, found, step = design(nominal, rounds=rounds, evaluations=evaluations)
    accesses = jax.tree.map(lambda x: x[:, 0], found.candidates.accesses)
    _, drawn = sample_step(found.chip, step[0], accesses, *step[1:])
    power, latency = 1e3 * np.asarray(drawn.energy) / FRAME, 1e3 * np.asarray(drawn.latency)
    chosen = physical_values(found.chip)
    rows = {"start": start, "found": found}
    if not quick:
        rows["found, without the row pipeline"] = design(nominal, rounds=rounds, evaluations=evaluations, rows=False)[1]
        for name, it in ASSUMED.items():
            larger = {**nominal, name: it.high}
            rows[f"found, {name} {it.high:g}"] = design(larger, rounds=rounds, evaluations=evaluations)[1]
    described = ", ".join(f"{name} {chosen[name]:g}" for name in FREE)
    return System(
        workload="two networks of six 3 x 3 layers without pooling, 160 x 120 pixels, 8 channels, 8 bits, 30 frames/s",
        figures={
            "power": Figure(1e3 * float(found.cost.energy) / FRAME, *interval(power)),
            "latency": Figure(1e3 * float(found.cost.latency), *interval(latency)),
        },
        ablation={name: _row(each) for name, each in rows.items()},
        assumptions=ASSUMED,
        notes=(
            f"Found: {described} (KiB, V). Power is the energy of a frame, DRAM included, over 33.3 ms. Layers hand rows to "
            "each other, as the chip's pipelined matching does. Descent moves one quantity at a time, searching all "
            "mappings anew; the rows below say which larger workloads still fit."
        ),
    )


def _row(found: Evaluated) -> dict[str, float]:
    return {
        "power (mW)": 1e3 * float(found.cost.energy) / FRAME,
        "latency (ms)": 1e3 * float(found.cost.latency),
        "area (mm2)": 1e6 * float(found.chip.area().total),
    }
