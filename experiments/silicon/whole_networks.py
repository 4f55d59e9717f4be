"""A published chip on the convolutions of AlexNet and VGG-16: energy, speed and DRAM accesses under mappings that are searched.

Every layer starts and ends in external memory. Energy and power are those of the core; DRAM decides the mappings with
them, as it did for the chip's own, at the price of its kind.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codesign import Workload, trace
from codesign.evaluation import evaluate_chip
from experiments.silicon.peak import sample_chip, supplies
from hw.accesses import Accesses
from hw.chip import Chip
from hw.chips import PRESETS
from hw.cost import price
from hw.operation import OPERANDS, Operation
from hw.sparse import stored_share

# Input channels, output channels, side of the outputs, window, stride, groups; Krizhevsky et al., 2012, in its two towers.
ALEXNET = (
    (3, 96, 55, 11, 4, 1), (96, 256, 27, 5, 1, 2), (256, 384, 13, 3, 1, 1), (384, 384, 13, 3, 1, 2), (384, 256, 13, 3, 1, 2),
)  # fmt: skip
# Simonyan & Zisserman, 2015, configuration D.
VGG16 = tuple(
    (channels, features, side, 3, 1, 1)
    for channels, features, side in (
        (3, 64, 224), (64, 64, 224), (64, 128, 112), (128, 128, 112), (128, 256, 56), (256, 256, 56), (256, 256, 56),
        (256, 512, 28), (512, 512, 28), (512, 512, 28), (512, 512, 14), (512, 512, 14), (512, 512, 14),
    )
)  # fmt: skip
# Batches as the figures are told for (Chen et al., JSSC 52(1) 2017).
NETWORKS = {"AlexNet": (ALEXNET, 4), "VGG-16": (VGG16, 3)}
# With a tenth of them AlexNet's DRAM accesses are 1.7 times as many.
EVALUATIONS, ROUNDS = 100_000, 2
# What of the assumptions a mapping has to fit.
SIZES = ("local_share", "register_bits", "kib_per_mac", "num_macs", "cluster_macs", "aspect", "sum_bits")


class NetworkRun(NamedTuple):
    """A chip on a network; each of shape (n,), in the order of `sample_chip`.

    Efficiency in TOPS/W, throughput in GOPS, frames per second, power in mW, DRAM accesses in words per MAC. `energy` is the
    first entry's alone: joules per product by `PARTS_OF_ENERGY`, shape (6,).
    """

    efficiency: np.ndarray
    energy: np.ndarray
    throughput: np.ndarray
    frames: np.ndarray
    power: np.ndarray
    dram: np.ndarray


def convolutions(name: str) -> Workload:
    """The layers of a network, each on images of its own: padding is part of an image, as products on it are executed."""
    layers, batch = NETWORKS[name]
    params, images = {}, []
    for i, (channels, features, side, window, stride, groups) in enumerate(layers):
        params[f"conv{i + 1}"] = jax.ShapeDtypeStruct((window, window, channels // groups, features), jnp.float32)
        extent = (side - 1) * stride + window
        images.append(jax.ShapeDtypeStruct((batch, extent, extent, channels), jnp.float32))

    def network(params: dict[str, jax.Array], *images: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            jax.lax.conv_general_dilated(
                image, params[f"conv{i + 1}"], (layer[4], layer[4]), "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=layer[5],
            )
            for i, (image, layer) in enumerate(zip(images, layers, strict=True))
        )  # fmt: skip

    return trace(network, params, *images)


@functools.cache
def run_network(name: str, mode: str, vdd: float, network: str, samples: int) -> NetworkRun:
    """A published chip in one mode at one supply on a network; mappings are searched anew where a size of memory moves.

    MACs stand alone: what an adder tree shares never leaves the chip, and it only narrows the search.
    """
    preset, workload = PRESETS[name], convolutions(network)
    draws, technologies = sample_chip(preset, samples)
    numbers = [draw | ({"tree": 1.0} if "tree" in draw else {}) for draw in draws]
    sizes = [tuple(draw[size] for size in SIZES if size in draw) for draw in numbers]
    first = {size: sizes.index(size) for size in sizes}
    mapped = {
        size: _map_layers(preset.make(mode, vdd, numbers[i]), preset.bits(mode)[0], workload)
        for size, i in first.items()
    }
    volts = supplies(vdd, samples, len(draws) - 1 - samples)
    made = [preset.make(mode, *args) for args in zip(volts.tolist(), numbers, technologies, strict=True)]
    chips = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]), *made)
    accesses = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(mapped[size] for size in sizes))
    width = jnp.float32(preset.bits(mode)[0])
    left = jnp.array([draw["density"] if "zero gating" in preset.mechanisms else 1.0 for draw in numbers])
    energy, cycles, macs = (
        np.asarray(it, float) for it in _core(chips, workload.inference.operations, accesses, width, left)
    )
    seconds = cycles / float(made[0].frequency())
    density = jnp.array([draw["density"] for draw in numbers]) if "compressed maps" in preset.mechanisms else None
    joules, products = energy.sum(axis=1), macs[0]
    return NetworkRun(
        efficiency=2e-12 * products / joules,
        energy=energy[0] / products,
        throughput=2e-9 * products / seconds,
        frames=NETWORKS[network][1] / seconds,
        power=1e3 * joules / seconds,
        dram=np.asarray(dram_words(accesses, None if density is None else stored_share(density, width)), float)
        / products,
    )


def dram_words(accesses: Accesses, share: jax.Array | None) -> jax.Array:
    """Words between chip and DRAM, summed over operations, of counts with the axes (samples, operations, ...).

    Args:
      accesses: counts of the layers of a network in order, forward.
      share: what zero compression leaves of a finished map, (samples,), see `hw.sparse.stored_share`; None: nothing is
        compressed. Weights, partial sums and the image that the network starts from are stored dense.
    """
    inputs, outputs = OPERANDS.index("inputs"), OPERANDS.index("outputs")
    moved = (accesses.reads + accesses.updates)[:, :, -1].sum(axis=-1)
    if share is not None:
        maps = accesses.reads[:, :, -1, inputs].at[:, 0].set(0.0) + accesses.finals[:, :, -1, outputs]
        moved = moved - (1.0 - share)[:, None] * maps
    return (moved * accesses.instances[:, :, -1]).sum(axis=1)


def _map_layers(chip: Chip, width: float, workload: Workload) -> Accesses:
    """Counts of the mappings found for each layer, of least energy times delay."""
    bits = jnp.full((1 + int(workload.product.max()), 4), width, jnp.float32)
    step, key = workload.inference, jax.random.key(0)
    widths = workload.operation_bits(bits)[: len(step.operation_slot)], workload.tensor_bits(bits)
    found = evaluate_chip(chip, step, *widths, key, workload.labels, evaluations=EVALUATIONS, rounds=ROUNDS)
    return jax.tree.map(lambda x: jnp.asarray(x[:, 0]), found.candidates.accesses)


@jax.jit
def _core(
    chips: Chip, operations: Operation, accesses: Accesses, width: jax.Array, left: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Energy of the core by `PARTS_OF_ENERGY` (n, 6), cycles (n,) and products (n,) of operations in sequence.

    Cycles are those of the chip's own memories: external memory is taken to keep up. Of the products of all maps but the
    image a share `left` (n,) is computed.
    """

    def of_operation(chip: Chip, operation: Operation, words: Accesses, density: jax.Array) -> tuple[jax.Array, ...]:
        cost = price(chip, operation, words, jnp.full(3, width), density, jnp.zeros(3))
        memories = cost.access_energy[:-1].sum(axis=1)
        cycles = jnp.maximum(cost.compute_cycles, cost.level_cycles[:-1].max())
        return jnp.stack([cost.mac_energy, *memories, cost.control_energy]), cycles, cost.macs

    def of_chip(chip: Chip, words: Accesses, left: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        densities = jnp.ones((len(operations.bounds), 2)).at[1:, 1].set(left)
        energy, cycles, macs = jax.vmap(of_operation, in_axes=(None, 0, 0, 0))(chip, operations, words, densities)
        leakage = chip.leakage_power() * cycles.sum() / chip.frequency()
        return jnp.append(energy.sum(axis=0), leakage), cycles.sum(), macs.sum()

    return jax.vmap(of_chip)(chips, accesses, left)
