"""S5, HNPU: bits and slices of a real training run with SDFXP and LAPS, on a bit-slice chip that skips, and on one without."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codesign import Workload
from codesign.problem import trace_network
from experiments.systems.record import Samples, System, Values, sweep
from experiments.systems.steps import Variant, cost_variant, uniform
from experiments.table_arithmetic import BATCH, KEY, SCHEMES, Trainer
from hw.chip import Chip
from hw.chips import PRESETS
from hw.chips.preset import Fact, Mode
from hw.sparse import stored_share
from nets.data import Dataset, batches
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.skipping import mask_densities, slice_densities
from nets.training import cross_entropy, split_model

HNPU = PRESETS["hnpu"]
SLICE = 4
LANES = (1, 4, 16)
MOMENTS = 2  # of the run, evenly spaced, at which bits and slices are counted
WIDE = 16.0


class Moment(NamedTuple):
    """What a training run shows at one time: widths (P, 4), shares of slices that are not zero by number of lanes, each
    (P, 4), and shares of inputs that a mask lets through, (P,)."""

    bits: np.ndarray
    slices: dict[int, np.ndarray]
    masks: np.ndarray


def train(dataset: Dataset, scheme: str, epochs: int, lanes: tuple[int, ...] = ()) -> tuple[list[Moment], float]:
    """Trains LeNet under a scheme; moments of the run, if lanes are asked for, and its test accuracy in per cent."""
    forward, params, rest = split_model(make_model("lenet", dataset.input_shape, dataset.num_classes))
    steps_per_epoch = len(dataset.train.labels) // BATCH
    trainer = Trainer(SCHEMES[scheme], forward, epochs * steps_per_epoch, 0.01)
    moments: list[Moment] = []
    batch = next(batches(dataset, BATCH, 0, 0))
    state = trainer.start(params, rest, *batch)
    for epoch in range(epochs):
        for index, batch in enumerate(batches(dataset, BATCH, 0, epoch)):
            state = trainer.step(state, *batch, jax.random.fold_in(KEY, epoch * steps_per_epoch + index))
        if lanes and (epoch + 1) % max(epochs // MOMENTS, 1) == 0:
            fn = lambda params, images: forward(params, state.rest, images, KEY, True)  # noqa: B023, E731
            loss = lambda out: cross_entropy(out[0], jnp.asarray(batch.labels))  # noqa: B023, E731
            formats = state.precision, state.quant_state, state.params, batch.images
            counted = {n: np.asarray(slice_densities(fn, loss, *formats, lanes=n)) for n in lanes}
            masks = np.asarray(mask_densities(fn, state.params, batch.images))
            moments.append(Moment(np.asarray(state.precision.bits()), counted, masks))
    return moments, 100.0 * trainer.accuracy(state, dataset.test)


def skipping(workload: Workload, moment: Moment, lanes: int) -> tuple[jax.Array, jax.Array]:
    """Work left (n, 2) and stored share of each operand (n, 3): inputs in forward, errors and masks in input_grad, both
    operands in weight_grad; skipped operands travel as slices and bitmaps."""
    slices, masks = moment.slices[lanes], moment.masks
    density, stored = [], []
    for product, pass_ in zip(np.asarray(workload.product), workload.passes, strict=True):
        inputs, input_error, weight_error = slices[product, 1:]
        pair = {
            "forward": (1.0, inputs), "input_grad": (masks[product], input_error), "weight_grad": (inputs, weight_error)
        }[pass_]  # fmt: skip
        alone = {
            "forward": (1.0, inputs, 1.0), "input_grad": (1.0, 1.0, input_error), "weight_grad": (1.0, inputs, weight_error)
        }[pass_]  # fmt: skip
        density.append(pair)
        stored.append([1.0 if share == 1.0 else float(stored_share(jnp.asarray(share), SLICE)) for share in alone])
    return jnp.array(density), jnp.array(stored)


def chips(values: Values) -> dict[str, Chip]:
    """The chip, the chip without its accumulation network, and a fixed-point one with multipliers of as many bits."""
    values = {name: value for name, value in values.items() if name != "lanes"}
    numbers = {name: it.value for name, it in HNPU.assumed().items()} | values
    slices = numbers["num_macs"]
    wide = Mode("fixed", slices * SLICE**2 / WIDE**2, (WIDE, WIDE), "as many bits of multipliers")
    baseline = dataclasses.replace(
        HNPU, modes={"16 bit": wide}, sram_kib=Fact(slices * numbers["kib_per_mac"], "as much SRAM")
    )
    kept = {name: value for name, value in values.items() if name in baseline.assumed()}
    return {
        "full": HNPU.make("16 bit", values=values),
        "no RAN": HNPU.make("16 bit", values=values | {"tree": 1.0}),
        "baseline": baseline.make("16 bit", values=kept | {"tree": 1.0}),
    }


def measure_system(quick: bool) -> System:
    """Headlines and ablations of HNPU."""
    dataset, epochs = load_dataset("digits"), 4 if quick else 30
    samples, evaluations = (2, 64) if quick else (32, 2000)
    moments, accuracy = train(dataset, "sdfxp_laps", epochs, LANES)
    _, reference = train(dataset, "float32", epochs)
    network = split_model(make_model("lenet", dataset.input_shape, dataset.num_classes))
    workload = trace_network(*network, dataset, BATCH, "adam")

    def cost(
        chip: Chip, moment: Moment, *, laps: bool = True, lanes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        bits = jnp.asarray(moment.bits, jnp.float32) if laps else uniform(workload, WIDE)
        density, stored = (None, None) if lanes is None else skipping(workload, moment, lanes)
        found = cost_variant(Variant(chip, workload, bits, density, stored), evaluations, samples)
        return np.asarray(found.energy - found.dram_energy), np.asarray(found.latency * found.area)

    def measure(values: Values) -> Samples:
        built, lanes = chips(values), int(values.get("lanes", HNPU.assumptions["lanes"].value))
        base = cost(built["baseline"], moments[0], laps=False)
        ours = [cost(built["full"], moment, lanes=lanes) for moment in moments]
        energy, area = (base[i] / np.mean([each[i] for each in ours], axis=0) for i in (0, 1))
        names = ("energy", "area")
        return {f"{n} efficiency over a fixed-point trainer": v for n, v in zip(names, (energy, area), strict=True)}

    built, lanes = chips({}), int(HNPU.assumptions["lanes"].value)
    variants: dict[str, dict[str, Any]] = {
        "all": {"chip": built["full"], "lanes": lanes},
        "LAPS (16 bits everywhere)": {"chip": built["full"], "lanes": lanes, "laps": False},
        "IOSS (nothing skipped)": {"chip": built["full"]},
        "RAN (an accumulator for each slice multiplier)": {"chip": built["no RAN"], "lanes": lanes},
    }
    totals = {
        name: np.mean([[each[0] for each in cost(moment=moment, **options)] for moment in moments], axis=0)
        for name, options in variants.items()
    }
    widths, left = (np.mean([m.bits for m in moments]), np.nanmean([m.slices[lanes] for m in moments]))
    return System(
        workload=f"one step of LeNet on digits, batch {BATCH}, Adam, core energy; {epochs} epochs of SDFXP + LAPS",
        figures=sweep(measure, {} if quick else HNPU.assumed()),
        ablation={
            name: {"energy x": float(each[0] / totals["all"][0]), "latency x area x": float(each[1] / totals["all"][1])}
            for name, each in totals.items()
            if name != "all"
        },
        assumptions=HNPU.assumed(),
        notes=(
            f"Measured over the run: {widths:.1f} bits on average, {100 * left:.0f} % of the slices left in groups of "
            f"{lanes}. Without LAPS the shares of slices are those measured with it. The baseline has "
            "16-bit multipliers of as many bits in all, as much SRAM, and neither LAPS, IOSS nor RAN: the paper's own is "
            "not public."
        ),
        accuracy={"float32": reference, "SDFXP + LAPS": accuracy},
    )
