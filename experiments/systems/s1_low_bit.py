"""S1, low-bit trainable system: what is kept between forward and backward, peak efficiency, accuracy of personalisation."""

import dataclasses

import numpy as np

from codesign import Workload
from experiments.silicon.peak import Peak, measure_preset
from experiments.systems.networks import alexnet
from experiments.systems.record import Figure, System, exactly, swept
from experiments.systems.steps import digits_step, trace_shapes
from experiments.table_arithmetic import SCHEMES, Trainer, halves
from hw.chips import PRESETS
from hw.chips.preset import Mode
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.personalisation import make_personalisation
from nets.training import fit, split_model

CHIP = PRESETS["low_bit_trainer"]
TRAINED = {"fc8": ("fc8",), "fc6 to fc8": ("fc*",), "conv5 to fc8": ("conv5", "fc*"), "all": ("*",)}
CHOSEN = "fc6 to fc8"
FLOAT, SCALE_BITS = 32.0, 8.0
BASELINES = {"float32": ("fp32", 32), "fixed 16-bit": ("fixed", 16)}
SCHEME = "4 bits kept, convolutions frozen"


def kept_bits(step: Workload, width: float, masks: bool) -> float:
    """Bits kept from forward to backward at a width for values; masks are bits of their own, or read from the values."""
    elements = np.asarray(step.step.tensor_elements)
    copies = np.asarray(step.step.is_copy() & step.step.used())
    is_mask = np.array([name.endswith(" mask") for name in step.tensor_names])
    return float(elements[copies].sum() * width + masks * elements[is_mask].sum())


def buffer_saved(trained: str, local_bits: float, region: float) -> float:
    """Per cent of a float32 trainer's kept bits that low-bit values and freezing save on AlexNet."""
    network, shapes = alexnet()
    whole, ours = (
        trace_shapes(network, shapes, (1, 227, 227, 3), trainable=TRAINED[layers]) for layers in ("all", trained)
    )
    return _saved(whole, ours, local_bits, region)


def digits_buffer_saved(local_bits: float, region: float) -> float:
    """As `buffer_saved`, on the network that is personalised: LeNet on digits with its convolutions frozen."""
    return _saved(digits_step(1), digits_step(1, trainable=("dense*",)), local_bits, region)


def _saved(whole: Workload, ours: Workload, local_bits: float, region: float) -> float:
    width = local_bits + SCALE_BITS / region
    return 100.0 * (1.0 - kept_bits(ours, width, masks=True) / kept_bits(whole, FLOAT, masks=False))


def measure_system(quick: bool) -> System:
    """Headlines and ablations of the system."""
    samples = 2 if quick else 32
    local_bits, region = (CHIP.assumptions[name] for name in ("local_bits", "region"))
    saved = {
        (trained, bits): buffer_saved(trained, bits, region.value)
        for trained in ("fc8", CHOSEN, "conv5 to fc8")
        for bits in (local_bits.value, local_bits.high)
    }
    low_bit = measure_preset(CHIP, "4 bit", None, samples).efficiency
    figures = {"buffer saved": Figure(saved[CHOSEN, local_bits.value], min(saved.values()), max(saved.values()))}
    digits = [digits_buffer_saved(bits, region.value) for bits in (local_bits.value, local_bits.high)]
    figures["buffer saved (digits personalisation)"] = Figure(digits[0], min(digits), max(digits))
    peaks = {name: _baseline(style, width, samples).efficiency for name, (style, width) in BASELINES.items()}
    for name, peak in peaks.items():
        figures[f"peak efficiency over {name}"] = swept(low_bit / peak, samples)
    accuracy = personalise(1 if quick else 3, 4 if quick else 30)
    figures["accuracy to float32 (digits personalisation)"] = exactly(accuracy[SCHEME] - accuracy["float32"])
    eight = measure_preset(CHIP, "8 bit", None, samples).efficiency
    return System(
        workload="buffers: AlexNet, batch 1, its fully connected layers trained; peak: a convolution that fills the array",
        figures=figures,
        ablation={
            "freezing (all layers trained)": {"buffer saved %": buffer_saved("all", local_bits.value, region.value)},
            "low-bit values (float32 kept)": {"buffer saved %": buffer_saved(CHOSEN, FLOAT, np.inf)},
            "4 bits (8 bits)": {"efficiency over float32 x": float(eight[0] / peaks["float32"][0])},
        },
        assumptions=CHIP.assumed(),
        notes=(
            "Which layers are frozen is not public: the interval runs from the last layer alone to the last convolution "
            "with all fully connected ones, and from 4 to 8 bits. Baselines are the same array with float32 and with "
            "plain 16-bit MACs."
        ),
        accuracy=accuracy,
    )


def _baseline(style: str, width: int, samples: int) -> Peak:
    mode = Mode(style, None, (width, width), "the same array with plain MACs")
    return measure_preset(dataclasses.replace(CHIP, modes={**CHIP.modes, "plain": mode}), "plain", None, samples)


def personalise(seeds: int, epochs: int) -> dict[str, float]:
    """Accuracy in per cent on a writer's digits of a float32 network that adapts in float32 and by the scheme."""
    dataset = load_dataset("digits")
    frozen = dataclasses.replace(SCHEMES["local_4bit"], frozen=("conv*",))
    found: dict[str, list[float]] = {"float32": [], SCHEME: []}
    for seed in range(seeds):
        model = make_model("lenet", dataset.input_shape, dataset.num_classes, seed)
        forward, params, rest = split_model(model)
        params, rest, _ = fit(forward, params, rest, dataset, epochs=epochs, seed=seed)
        task = make_personalisation(dataset, seed)
        adaptation = [halves(task.adaptation, seed, epoch) for epoch in range(30)]
        for name, scheme in (("float32", SCHEMES["float32"]), (SCHEME, frozen)):
            trainer = Trainer(scheme, forward, 60, 0.002)
            state, _ = trainer.train(params, rest, adaptation, seed)
            found[name].append(100.0 * trainer.accuracy(state, task.evaluation))
    return {name: float(np.mean(values)) for name, values in found.items()}
