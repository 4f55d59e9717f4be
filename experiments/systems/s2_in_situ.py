"""S2, in-situ personalisation: masks counted, three cores of which one makes weight gradients, the update unit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from codesign import Workload
from experiments.silicon.peak import measure_preset
from experiments.systems.record import Figure, Samples, System, Values, between, exactly, sweep, swept, widened
from experiments.systems.s5_hnpu import train
from experiments.systems.steps import Variant, bits_without_masks, cost_cores, cost_variant, digits_step, uniform
from hw.chips import PRESETS
from hw.chips.preset import Assumption
from hw.overlap import assign_passes
from hw.schedule import StepCost
from nets.dataset_files import load_dataset

TRAINER = PRESETS["in_situ_trainer"]
CYCLES = 58_230  # of an epoch, derived: 47.4 uJ at 40.7 mW and 50 MHz
NUM_CORES = 3
ARRAY = 256  # of one core where it is compared with itself
SMALL, LARGE = 32, 8  # batches between which the share of updates is told
BASELINE = Assumption(32, 16, 32, "bits of weights and states where updates have no unit of their own; not public")
UPDATES: dict[str, dict[str, Any]] = {
    "with the unit": {"gradient_bits": 8.0, "master_bits": 16.0},
    "without": {"gradient_bits": 16.0, "master_bits": BASELINE.value},
    "narrowest without": {"gradient_bits": 16.0, "master_bits": BASELINE.low},
}


def masks_saved(step: Workload) -> float:
    """Per cent of the 8-bit values before activations that masks save."""
    bits = uniform(step, 8.0)
    with_masks = step.tensor_bits(bits)
    without = bits_without_masks(step, with_masks, 8.0)
    is_mask = np.array([name.endswith(" mask") for name in step.tensor_names])
    kept, whole = (
        float((np.asarray(widths) * np.asarray(step.step.tensor_elements))[is_mask].sum())
        for widths in (with_masks, without)
    )
    return 100.0 * (1.0 - kept / whole)


def weight_grad_utilisation(step: Workload, *, own: bool) -> float:
    """Per cent of MAC cycles with work in the weight gradients of convolutions on one core.

    With its own dataflow every PE holds one of K C R S weight gradients; with that of forward, which spreads outputs,
    only R S of them, as a weight gradient has R x S "outputs" for each pair of channels.
    """
    work = cycles = 0.0
    bounds = np.asarray(step.step.operations.bounds)
    for row, pass_ in enumerate(step.passes):
        groups, batch, features, channels, p, q, r, s = bounds[row]
        if pass_ != "weight_grad" or r * s == 1:
            continue
        positions = batch * p * q
        results, rounds = (groups * features * channels * r * s, 1.0) if own else (r * s, groups * features * channels)
        work += positions * results * rounds
        cycles += positions * rounds * np.ceil(results / ARRAY) * ARRAY
    return 100.0 * work / cycles


def saved_by_update_unit(cost: Callable[[Variant], StepCost], batch: int) -> Figure:
    """Per cent of the energy of a step, over that with updates of the baseline, whose masters are wide or narrow."""
    energy = {}
    for name, widths in UPDATES.items():
        step = digits_step(batch, **widths)
        energy[name] = np.asarray(cost(Variant(TRAINER.make("8 bit"), step, uniform(step, 8.0))).energy)
    saved, least = (100.0 * (1.0 - energy["with the unit"] / energy[name]) for name in list(UPDATES)[1:])
    return widened(between(saved), between(least))


def measure_system(quick: bool) -> System:
    """Headlines and ablations of the processor."""
    samples, evaluations = (2, 64) if quick else (32, 2000)
    step = digits_step(LARGE, **UPDATES["with the unit"])
    core = assign_passes(step.step, input_grad=1, weight_grad=2)

    def measure(values: Values) -> Samples:
        numbers = {"num_macs": TRAINER.assumptions["num_macs"].value, **values}
        chip = TRAINER.make("8 bit", values={**values, "num_macs": numbers["num_macs"] / NUM_CORES})
        found = cost_cores([chip] * NUM_CORES, step, uniform(step, 8.0), core, evaluations, samples)
        power = np.asarray(found.energy - found.dram_energy, float) / np.asarray(found.latency, float)
        return {"power": 1e3 * power, "energy of an epoch": 1e6 * power * CYCLES / 50e6}

    figures = sweep(measure, {} if quick else TRAINER.assumed())
    peak = measure_preset(TRAINER, "8 bit", None, samples)
    busiest = peak.throughput / peak.efficiency  # mW
    figures["power"] = widened(figures["power"], swept(busiest, samples))
    figures["energy of an epoch"] = widened(
        figures["energy of an epoch"], swept(1e3 * busiest * CYCLES / 50e6, samples)
    )
    cost = partial(cost_variant, evaluations=evaluations, samples=samples)
    figures |= {
        f"energy saved by the update unit ({name})": saved_by_update_unit(cost, batch)
        for name, batch in (("small", SMALL), ("large", LARGE))
    }
    shares = sorted((masks_saved(digits_step(LARGE, "mlp")), masks_saved(step), 100.0 * (1.0 - 3 / 32)))
    figures["intermediate data saved by masks"] = Figure(masks_saved(step), shares[0], shares[-1])
    figures["weight_grad utilisation"] = exactly(weight_grad_utilisation(step, own=True))
    figures["weight_grad utilisation with the dataflow of forward"] = exactly(weight_grad_utilisation(step, own=False))
    epochs = 4 if quick else 30
    _, reference = train(load_dataset("digits"), "float32", epochs)
    _, ours = train(load_dataset("digits"), "weights8_residual", epochs)
    return System(
        workload=f"LeNet on digits, 8 bits, momentum, batch {LARGE} ({SMALL} for the smaller saving of updates)",
        figures=figures,
        ablation=_ablation(step, core, cost, evaluations),
        assumptions=TRAINER.assumed() | {"baseline_bits": BASELINE},
        notes=(
            "Masks: between 7/8 (no pooling) and 29/32 (all pooled 2 x 2), exactly; the paper's network, a mixture of the "
            "two, is not public. Cores take forward, input_grad and weight_grad; the paper's two propagation cores share "
            "the first two. Power counts the chip alone, DRAM apart; its interval runs from the numbers of MACs that may "
            "be there, of which layers of 8 x 8 pixels leave most idle, to arrays that a larger network keeps full. The "
            "update unit is compared with updates of 16-bit gradients and masters of 32 bits, the interval with 16 bits."
        ),
        accuracy={"float32": reference, "8-bit weights with residual": ours},
    )


def _ablation(step: Workload, core: np.ndarray, cost: partial, evaluations: int) -> dict[str, dict[str, float]]:
    """Energy and latency of a step with each mechanism off, over those with all."""
    chip = TRAINER.make("8 bit", values={"num_macs": ARRAY})
    bits = uniform(step, 8.0)
    widths = step.tensor_bits(bits)
    full = cost_cores([chip] * NUM_CORES, step, bits, core, evaluations)
    fast = TRAINER.make("8 bit", vdd=1.0, values={"num_macs": ARRAY})
    unit = digits_step(LARGE, **UPDATES["without"])
    without = {
        "masks (values instead)": cost_cores(
            [chip] * NUM_CORES, step, bits, core, evaluations, tensor_bits=bits_without_masks(step, widths, 8.0)
        ),
        "a core for each pass (one core)": cost(Variant(chip, step, bits)),
        "update unit": cost_cores([chip] * NUM_CORES, unit, bits, core, evaluations),
        "engine near threshold (1.0 V)": cost_cores([fast] * NUM_CORES, step, bits, core, evaluations),
    }
    return {
        name: {
            "energy x": float(each.energy[0] / full.energy[0]),
            "latency x": float(each.latency[0] / full.latency[0]),
        }
        for name, each in without.items()
    }
