"""DRAM accesses per multiply-accumulate of the convolutions of AlexNet and VGG-16 on a published chip.

Every layer starts and ends in external memory, under the mapping of least energy that a search finds; words are 16 bits
wide and counted one by one, without the compression of zeros that a chip may have.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from codesign import Workload, trace
from codesign.evaluation import evaluate_chip
from hw.chips import PRESETS

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
EVALUATIONS = 6000
ENERGY_ALONE = jnp.array([1.0, 0.0], jnp.float32)  # prices of a joule and of a second
SIZES = ("local_share", "register_bits", "kib_per_mac")


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
def dram_per_mac(preset: str, mode: str, vdd: float | None, network: str) -> np.ndarray:
    """DRAM accesses per MAC: as the chip is assumed to be, then with each assumed size of memory at either end of its range.

    MACs stand alone: what an adder tree shares never leaves the chip, and it only narrows the search.
    """
    chip, workload = PRESETS[preset], convolutions(network)
    assumed = chip.assumed()
    alone = {"tree": 1.0} if "tree" in assumed else {}
    ends = [{name: end} for name in SIZES if name in assumed for end in (assumed[name].low, assumed[name].high)]
    bits = jnp.full((1 + int(workload.product.max()), 4), chip.bits(mode)[0], jnp.float32)
    step = workload.inference
    widths = workload.operation_bits(bits)[: len(step.operation_slot)], workload.tensor_bits(bits)

    def of(values: dict[str, float]) -> float:
        built = chip.make(mode, vdd, alone | values)
        found = evaluate_chip(
            built, step, *widths, jax.random.key(0), workload.labels,
            evaluations=EVALUATIONS, rounds=1, prices=ENERGY_ALONE,
        )  # fmt: skip
        words = jax.tree.map(lambda x: np.asarray(x[:, 0], float), found.candidates.accesses)
        moved = ((words.reads + words.updates)[:, -1].sum(axis=1) * words.instances[:, -1]).sum()
        return float(moved / words.macs.sum())

    return np.array([of(values) for values in ({}, *ends)])
