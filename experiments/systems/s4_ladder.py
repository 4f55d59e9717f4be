"""S4, the survey's ladder: energy of a training step, one scheme more at a time, split into where it goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign import Workload
from experiments.systems.networks import conv, max_pool, resnet18
from experiments.systems.record import Figure, System, between
from experiments.systems.steps import Variant, bits_without_masks, cost_variant, trace_shapes, uniform
from experiments.table_arithmetic import BATCH, SCHEMES, Trainer, plain
from experiments.table_arithmetic import Scheme as Arithmetic
from hw.arithmetic import make_mac
from hw.chip import Chip, make_chip
from hw.chips.preset import Assumption
from hw.schedule import StepCost
from nets import LayerRule
from nets.data import batches
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.training import fit, split_model

# Of inputs behind ReLUs, of errors, and of what a mask lets through: half, unless a network is measured (as S5's is).
DENSITY = Assumption(0.5, 0.3, 0.8, "share of inputs, errors and masks that is not zero")
GROWTH = 20  # bits that a sum may grow by: a weight gradient of ResNet-18 is one of 8 x 112 x 112 products
CNN = {"conv1": (3, 3, 1, 16), "conv2": (3, 3, 16, 32), "dense1": (128, 64), "dense2": (64, 10)}


@dataclass(frozen=True)
class Scheme:
    """What one rung of the ladder adds to those below it; fields as they stand on that rung."""

    style: str = "fp32"
    width: float = 32.0
    masks: bool = False
    update: tuple[float, float] = (32.0, 32.0)  # bits of gradients and of master weights with states
    skips: bool = False
    frozen: bool = False
    direct_feedback: bool = False


RUNGS = {
    "float32": Scheme(),
    "+ fp16 products": Scheme("fp16", 16.0),
    "+ 8-bit fixed point": Scheme("fixed", 8.0),
    "+ masks in place of values": Scheme("fixed", 8.0, True),
    "+ 8-bit update with residual": Scheme("fixed", 8.0, True, (8.0, 16.0)),
    "+ zeros skipped": Scheme("fixed", 8.0, True, (8.0, 16.0), True),
    "+ lower half frozen": Scheme("fixed", 8.0, True, (8.0, 16.0), True, True),
    "+ direct feedback": Scheme("fixed", 8.0, True, (8.0, 16.0), True, True, True),
}


# How each rung trains; skipping zeros changes no result.
TRAINED = {
    "float32": SCHEMES["float32"],
    "+ fp16 products": Arithmetic(LayerRule("fp16", "fp16", "fp16", "fp16", learn=False)),
    "+ 8-bit fixed point": SCHEMES["w8a8g8_stochastic"],
    "+ masks in place of values": SCHEMES["masks"],
    "+ 8-bit update with residual": Arithmetic(plain(masks=True), low_bit_weights=True),
    "+ lower half frozen": Arithmetic(plain(masks=True), frozen=("conv*",), low_bit_weights=True),
    "+ direct feedback": Arithmetic(plain(masks=True, direct_feedback=True), frozen=("conv*",), low_bit_weights=True),
}


@dataclass(frozen=True)
class Net:
    """A network by shapes: the function, its parameters, a batch of images, and the parameters left when half is frozen."""

    network: Callable
    shapes: dict[str, Any]
    images: tuple[int, ...]
    upper: tuple[str, ...]


def digits_cnn() -> tuple[Callable, dict[str, Any]]:
    """The LeNet of the digits as a plain function."""

    def network(params: Any, images: Any) -> Any:
        x = max_pool(jax.nn.relu(conv(images, params["conv1"])), 2, "VALID")
        x = max_pool(jax.nn.relu(conv(x, params["conv2"])), 2, "VALID")
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["dense1"]) @ params["dense2"]

    return network, CNN


def nets(quick: bool) -> dict[str, Net]:
    """The digits CNN at batch 32, and ResNet-18 at batch 8."""
    side = 32 if quick else 224
    return {
        "digits CNN": Net(*digits_cnn(), (32, 8, 8, 1), ("dense*",)),
        "ResNet-18": Net(*resnet18(), (1 if quick else 8, side, side, 3), ("block3*", "block4*", "fc")),
    }


def chip_for(scheme: Scheme) -> Chip:
    """256 MACs at 28 nm with 288 KiB, register ports as wide as the style needs."""
    integer = scheme.style == "fixed"
    widths = (scheme.width, scheme.width) if integer else None
    mac = make_mac(scheme.style, widths, accumulator_bits=2 * scheme.width + GROWTH if integer else None)
    return make_chip(rows=16, columns=16, mac=mac, register_bandwidth_bits=64 if integer else 128, node_nm=28)


def variant(net: Net, scheme: Scheme, density: float) -> Variant:
    """The step of a network with the schemes of a rung."""
    gradient, master = scheme.update
    workload = trace_shapes(
        net.network, net.shapes, net.images, optimizer="momentum", gradient_bits=gradient, master_bits=master,
        trainable=net.upper if scheme.frozen else ("*",),
    )  # fmt: skip
    bits = uniform(workload, scheme.width)
    widths = workload.tensor_bits(bits)
    return Variant(
        chip_for(scheme),
        workload,
        bits,
        density=jnp.full((len(workload.names), 2), density) if scheme.skips else None,
        tensor_bits=widths if scheme.masks else bits_without_masks(workload, widths, scheme.width),
        runs=direct_feedback_runs(workload) if scheme.direct_feedback else None,
    )


def direct_feedback_runs(workload: Workload) -> jnp.ndarray:
    """How often each operation runs, (n,), when the error of every layer is a projection of that of the output.

    No layer's input_grad runs; the top one stands for the projections, as its product has the shape of one: output
    error by inputs of the layer, as many times as all layers' inputs are larger than its own.
    """
    propagates = np.array([pass_ == "input_grad" for pass_ in workload.passes])
    inputs = np.asarray(workload.step.tensor_elements)[np.asarray(workload.step.operand_tensor)[:, 1]]
    runs = np.where(propagates, 0.0, 1.0)
    if propagates.any():
        top = int(np.argmax(propagates))
        runs[top] = inputs[propagates].sum() / inputs[top]
    return jnp.asarray(runs)


def split(cost: StepCost) -> dict[str, float]:
    """Microjoules of a step: all, memories on the chip, external memory, computation."""
    parts = dict(zip(cost.components, 1e6 * np.asarray(cost.breakdown[0], float), strict=True))
    memories = parts["register"] + parts["local"] + parts["shared"]
    rest = sum(parts.values()) - memories - parts["dram"]
    return {"energy": sum(parts.values()), "dataflow": memories, "external memory": parts["dram"], "computation": rest}


def accuracies(epochs: int) -> dict[str, float]:
    """Test accuracy in per cent of the digits CNN trained as each rung says; a frozen half comes from a float32 network."""
    dataset = load_dataset("digits")
    forward, params, rest = split_model(make_model("lenet", dataset.input_shape, dataset.num_classes))
    pretrained, pretrained_rest, _ = fit(forward, params, rest, dataset, epochs=epochs, seed=0)
    data = [list(batches(dataset, BATCH, 0, epoch)) for epoch in range(epochs)]
    found = {}
    for rung, scheme in TRAINED.items():
        trainer = Trainer(scheme, forward, epochs * len(data[0]), 0.01)
        start = (pretrained, pretrained_rest) if scheme.frozen else (params, rest)
        state, _ = trainer.train(*start, data, 0)
        found[rung] = 100.0 * trainer.accuracy(state, dataset.test)
    return found


def measure_system(quick: bool) -> System:
    """The ladder of both networks."""
    samples, evaluations = (2, 64) if quick else (32, 2000)
    ladder: dict[str, dict[str, float]] = {}
    figures: dict[str, Figure] = {}
    for name, net in nets(quick).items():
        energies = []
        for rung, scheme in RUNGS.items():
            cost = cost_variant(variant(net, scheme, DENSITY.value), evaluations, samples)
            energies.append(np.asarray(cost.energy, float))
            told = {f"{name}, {part} (uJ)": value for part, value in split(cost).items()}
            ladder.setdefault(rung, {}).update(told)
        figures[f"energy of a step over that with all schemes ({name})"] = between(energies[0] / energies[-1])
    return System(
        workload="one training step, momentum: the digits CNN at batch 32, ResNet-18 at batch 8, images of 224 x 224",
        figures=figures,
        ablation=ladder,
        assumptions={"density": DENSITY},
        notes=(
            "The survey has no figure of its own. Each row adds one of its schemes to those above; computation holds "
            "MACs, vector unit, clock, control and leakage. Batch normalisation is merged. Direct feedback takes the random "
            "weights of its projections from external memory: from ten outputs they are few, from ResNet-18's thousand to "
            "all activations of its upper half hundreds of millions, so that there it costs more than it saves; a chip "
            "would have to generate them. Accuracies are of the digits CNN, one seed; skipping zeros changes no result. "
            "Direct feedback is the last rung because convolutions hardly learn under it."
        ),
        accuracy=accuracies(4 if quick else 30),
    )
