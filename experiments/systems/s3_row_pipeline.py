"""S3, row pipeline: line buffers, decomposed products in a real run, and frozen 4-bit layers beside fp16 ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign import Workload
from experiments.systems.networks import resnet18
from experiments.systems.record import Figure, Samples, System, Values, exactly, sweep
from experiments.systems.steps import Variant, cost_cores, cost_variant, digits_step, trace_shapes, uniform
from experiments.table_arithmetic import BATCH, SCHEMES, Trainer
from hw.chip import Chip
from hw.chips import PRESETS
from hw.chips.preset import Mode
from hw.pipeline import line_buffer_bits, map_bits
from nets.data import batches
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.training import fit, split_model

CHIP = PRESETS["row_pipeline_trainer"]
NARROW, WIDE = 4.0, 16.0


def buffers() -> tuple[float, float, float]:
    """Largest pair of maps (in and out, before any pooling) over all line buffers of ResNet-18: with a spare bank of
    rows, two buffers in turn, and a single one that stalls."""
    network, shapes = resnet18()
    traced = trace_shapes(network, shapes, (1, 224, 224, 3)).inference
    layers = [jax.tree.map(lambda x: x[i], traced.operations) for i in range(traced.operations.bounds.shape[0])]  # noqa: B023
    pairs = max(float(map_bits(layer, 1.0) + layer.bounds[jnp.array([2, 4, 5])].prod()) for layer in layers[:-1])
    banked, double = (
        sum(float(line_buffer_bits(layer, 1.0, double=d)) for layer in layers[:-1]) for d in (False, True)
    )
    return pairs / banked, pairs / double, pairs / (double / 2.0)


def workload(trainable: tuple[str, ...]) -> Workload:
    """A training step of LeNet on digits of which some layers are trained."""
    return digits_step(BATCH, optimizer="sgd", trainable=trainable, gradient_bits=WIDE)


def place(step: Workload) -> tuple[jax.Array, np.ndarray]:
    """Widths (P, 4), 4 bits for convolutions and 16 for the rest, and the core of each slot: 0 fixed point, 1 fp16."""
    narrow = np.array(["conv" in name for name in step.names])
    bits = np.full((1 + int(step.product.max()), 4), WIDE)
    bits[np.asarray(step.product)[narrow]] = NARROW
    core = np.ones(step.step.num_slots, int)
    core[np.asarray(step.step.operation_slot)[narrow]] = 0
    return jnp.asarray(bits, jnp.float32), core


def measure_system(quick: bool) -> System:
    """Headlines and ablations of the accelerator."""
    samples, evaluations = (2, 64) if quick else (32, 2000)
    frozen, whole = workload(("dense*",)), workload(("*",))
    bits, core = place(frozen)

    def chips(values: Values) -> tuple[Chip, Chip]:
        numbers = {name: it.value for name, it in CHIP.assumed().items()} | dict(values)
        few = {"num_macs": numbers["num_macs"] / 4.0}  # fp16 units, for what is not convolution
        return CHIP.make("fxp4", values=dict(values)), CHIP.make("fp16", values={**values, **few})

    def measure(values: Values) -> Samples:
        narrow, wide = chips(values)
        ours = cost_cores((narrow, wide), frozen, bits, core, evaluations, samples)
        other = cost_variant(
            Variant(CHIP.make("fp16", values=dict(values)), whole, uniform(whole, WIDE)), evaluations, samples
        )
        operations = 2.0 * float((frozen.step.operations.macs * frozen.step.multiplicity).sum())
        joules, theirs = (np.asarray(cost.energy - cost.dram_energy, float) for cost in (ours, other))
        speed, base = (np.asarray(1.0 / (cost.latency * cost.area), float) for cost in (ours, other))
        return {
            "efficiency": 1e-12 * operations / joules,
            "area efficiency": 1e-9 * operations * speed * 1e-6,
            "area efficiency over an fp16 trainer": speed / base,
            "energy efficiency over an fp16 trainer": theirs / joules,
        }

    figures = sweep(measure, {} if quick else CHIP.assumed())
    banked, double, single = buffers()
    figures["buffer"] = Figure(banked, double, single)
    difference, accuracy = compare_forms(4 if quick else 30)
    figures["decomposed against simulated, largest difference"] = exactly(difference)
    return System(
        workload=f"LeNet on digits, batch {BATCH}, convolutions frozen at 4 bits, the rest fp16; buffers: ResNet-18 at 224",
        figures=figures,
        ablation=_ablation(chips({}), frozen, whole, evaluations),
        assumptions=CHIP.assumed(),
        notes=(
            "Buffers: the largest pair of maps over the line buffers of all layers, with one spare bank of rows per "
            "step; the interval runs from two buffers in turn to a single one. The published efficiencies are of a chip "
            "of unknown clock, supply, sizes and network. Decomposed against simulated: what two runs of transfer "
            "learning end with, all parameters and the logits of the test set. The decomposed form rounds its results to "
            "fp16; no difference means that fp16 holds all sums of 4-bit products that occur. Freezing leaves no "
            "input_grad to the convolutions of this network."
        ),
        accuracy=accuracy,
    )


def compare_forms(epochs: int) -> tuple[float, dict[str, float]]:
    """Two transfer-learning runs, step for step alike but for the form of their products: the largest difference between
    what they end with, trained parameters and logits of the test set, in steps of fp16; accuracies, per cent."""
    dataset = load_dataset("digits")
    forward, params, rest = split_model(make_model("lenet", dataset.input_shape, dataset.num_classes))
    pretrained, pretrained_rest, _ = fit(forward, params, rest, dataset, epochs=epochs, seed=0)
    decomposed = SCHEMES["fxp4_fp16_frozen"]
    simulated = dataclasses.replace(decomposed, rule=dataclasses.replace(decomposed.rule, multiplier=None))
    data = [list(batches(dataset, BATCH, 0, epoch)) for epoch in range(epochs)]
    accuracy, ends = {}, {}
    schemes = {"float32": SCHEMES["float32"], "decomposed": decomposed, "simulated": simulated}
    for name, scheme in schemes.items():
        trainer = Trainer(scheme, forward, epochs * len(data[0]), 0.01)
        state, _ = trainer.train(pretrained, pretrained_rest, data, 0)
        accuracy[name] = 100.0 * trainer.accuracy(state, dataset.test)
        ends[name] = state.params, trainer.logits(state, jnp.asarray(dataset.test.images))
    return fp16_steps(ends["decomposed"], ends["simulated"]), accuracy


def fp16_steps(ours: Any, theirs: Any) -> float:
    """Largest difference between two pytrees of arrays, in steps of fp16 at the second's values."""

    def of_leaf(a: jax.Array, b: jax.Array) -> float:
        wide = np.asarray(a, np.float64), np.asarray(b, np.float64)
        step = np.spacing(np.abs(wide[1]).astype(np.float16)).astype(np.float64)
        return float((np.abs(wide[0] - wide[1]) / step).max())

    return max(jax.tree.leaves(jax.tree.map(of_leaf, ours, theirs)))


def _ablation(
    chips: tuple[Chip, Chip], frozen: Workload, whole: Workload, evaluations: int
) -> dict[str, dict[str, float]]:
    """Core energy and latency of a step with each mechanism off, over those with all."""
    bits, core = place(frozen)
    full = cost_cores(chips, frozen, bits, core, evaluations)
    wide = CHIP.make("fp16")
    eight = dataclasses.replace(CHIP, modes={"8 bit": Mode("fixed", None, (8, 8), "wider")}).make("8 bit")
    all_bits, all_core = place(whole)
    without = {
        "decomposition (fp16 convolutions)": cost_cores(
            (wide, chips[1]), frozen, uniform(frozen, WIDE), core, evaluations
        ),
        "4 bits (8 bits)": cost_cores((eight, chips[1]), frozen, jnp.maximum(bits, 8.0), core, evaluations),
        "freezing (all trained, 4-bit errors)": cost_cores(chips, whole, all_bits, all_core, evaluations),
    }
    core_energy = lambda cost: float(cost.energy[0] - cost.dram_energy[0])  # noqa: E731
    return {
        name: {"energy x": core_energy(cost) / core_energy(full), "latency x": float(cost.latency[0] / full.latency[0])}
        for name, cost in without.items()
    }
