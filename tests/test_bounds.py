"""Lower bounds: never above the cheapest of all mappings, and how near they come."""

import dataclasses
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hw import LOOPS, OPERANDS, PASSES, Mapping, count, make_operation, stack_operations
from hw.arithmetic import make_mac
from hw.bounds import capacity_product, compulsory_words, lower_bound
from hw.chip import make_chip
from hw.cost import evaluate
from tests.test_accesses import splits

NUM_MAPPINGS = 40_000
BITS = jnp.array([8.0, 8.0, 8.0])
OPERATIONS = {
    "matrix product": ({"N": 4, "K": 4, "C": 4}, {}),
    "vector": ({"K": 8, "C": 8}, {}),
    "convolution": ({"K": 4, "P": 4, "R": 3}, {}),
    "strided": ({"C": 2, "K": 2, "P": 4, "R": 2}, {"stride": (2, 1)}),
    "depthwise": ({"G": 4, "P": 4, "R": 3}, {}),
    "reduction": ({"C": 64}, {}),
}


def small_chip(sizes, dram_bits=64.0):
    """Two by two MACs; capacities of registers, local and shared memory in words of eight bits."""
    chip = make_chip(rows=2, columns=2, resident_fraction=0.0, dram_bandwidth_bits=dram_bits)
    size_bits = jnp.array([*(8.0 * size for size in sizes), jnp.inf])
    return dataclasses.replace(chip, size_bits=size_bits)


CHIPS = {
    "tiny": small_chip((1, 4, 8)),
    "registers": small_chip((8, 8, 16)),
    "roomy": small_chip((4, 64, 512)),
    "narrow": small_chip((2, 16, 32), dram_bits=1.0),
}


@cache
def mappings(name):
    """All temporal splits over four levels and the array's two axes, with random orders and keep sets for each."""
    rng, bounds = np.random.default_rng(len(name)), OPERATIONS[name][0]
    rows = list(product(*(list(splits(bound, 6)) for bound in bounds.values())))
    factors = np.ones((len(rows), 6, len(LOOPS)))
    for i, row in enumerate(rows):
        for name, split in zip(bounds, row, strict=True):
            factors[i, :, LOOPS.index(name)] = split
    factors = factors[(factors[:, 4:].prod(axis=2) <= 2).all(axis=1)]
    assert len(factors) < NUM_MAPPINGS
    factors = factors[np.arange(NUM_MAPPINGS) % len(factors)].astype(np.float32)
    spatial = np.ones((len(factors), 4, 2, len(LOOPS)), np.float32)
    spatial[:, 1] = factors[:, 4:]
    order = rng.permuted(np.tile(np.arange(8, dtype=np.int32), (len(factors), 4, 1)), axis=-1)
    keep = (rng.random((len(factors), 4, len(OPERANDS))) < 0.6).astype(np.float32)
    keep[:, -1] = 1.0
    return Mapping(factors[:, :4], spatial, order, keep)


@jax.jit
def costs_on_all_chips(chips, operation, candidates, resident):
    """Costs, and words that DRAM reads for the chip or receives, of each mapping on each chip: (chips, mappings)."""

    def one(chip, mapping):
        return evaluate(chip, operation, mapping, BITS, resident=resident)

    accesses = jax.vmap(count, in_axes=(None, 0))(operation, candidates)
    dram = jnp.where(operation.accumulated[None] > 0.5, accesses.updates[:, -1], accesses.reads[:, -1]).sum(axis=1)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(chips, candidates), dram


@jax.jit
def bounds_on_all_chips(chips, operation, resident):
    return jax.vmap(lambda chip: lower_bound(chip, operation, BITS, None, resident))(chips)


@pytest.mark.parametrize("resident", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_mapping_is_cheaper(name, pass_, resident):
    bounds, window = OPERATIONS[name]
    operation = make_operation(**bounds, **window, pass_=pass_)
    chips = stack_operations(list(CHIPS.values()))
    resident = jnp.full(3, resident)
    found, dram = costs_on_all_chips(chips, operation, mappings(name), resident)
    fits = np.asarray(found.violation).max(axis=-1) == 0.0
    assert fits.any(axis=1).all()
    bound = bounds_on_all_chips(chips, operation, resident)
    best = {
        "energy": np.where(fits, found.energy, np.inf).min(axis=1),
        "cycles": np.where(fits, found.cycles, np.inf).min(axis=1),
        "dram_words": np.where(fits, dram[None], np.inf).min(axis=1),
    }
    for quantity, least in best.items():
        ratio = least / np.asarray(getattr(bound, quantity))
        assert np.all(ratio > 1.0 - 1e-5), (quantity, ratio)
    if resident[0] == 0.0:
        assert np.all(best["energy"] < 2.1 * bound.energy), "not as tight as stated"
        np.testing.assert_allclose(best["cycles"], bound.cycles, rtol=1e-5)


@pytest.mark.parametrize("name", ["matrix product", "convolution", "reduction"])
def test_no_mapping_is_cheaper_where_levels_are_missing(name):
    operation, sizes = make_operation(**OPERATIONS[name][0]), ((8, 0, 16), (0, 8, 16), (0, 0, 16), (1, 0, 8))
    chips = stack_operations([small_chip(size) for size in sizes])
    found, _ = costs_on_all_chips(chips, operation, mappings(name), jnp.zeros(3))
    least = np.where(np.asarray(found.violation).max(axis=-1) == 0.0, found.energy, np.inf).min(axis=1)
    ratio = least / np.asarray(bounds_on_all_chips(chips, operation, jnp.zeros(3)).energy)
    assert np.all((ratio > 1.0 - 1e-5) & (ratio < 2.5)), ratio


@pytest.mark.slow
@pytest.mark.parametrize(
    "mac",
    [
        make_mac("fusion"),
        make_mac("lut"),
        make_mac("fixed", tree=4),
        make_mac("subwords"),
        make_mac("fixed", accumulator_bits=18.0, rounds=True),
    ],
    ids=["bricks", "table", "tree", "subwords", "rounded"],
)
@pytest.mark.parametrize("name", ["matrix product", "reduction", "convolution"])
def test_no_mapping_is_cheaper_on_other_macs(mac, name):
    operation = make_operation(**OPERATIONS[name][0], **OPERATIONS[name][1])
    chips = stack_operations([dataclasses.replace(chip, mac=mac) for chip in CHIPS.values()])
    found, _ = costs_on_all_chips(chips, operation, mappings(name), jnp.zeros(3))
    least = np.where(np.asarray(found.violation).max(axis=-1) == 0.0, found.energy, np.inf).min(axis=1)
    ratio = least / np.asarray(bounds_on_all_chips(chips, operation, jnp.zeros(3)).energy)
    assert np.all((ratio > 1.0 - 1e-5) & (ratio < 4.0)), ratio


def test_compulsory_words_by_hand():
    # 3 taps on 4 outputs at stride 2 touch inputs 0..8; one tap touches every second of 7.
    operation = make_operation(N=2, K=5, C=7, P=4, R=3, stride=(2, 1))
    np.testing.assert_array_equal(compulsory_words(operation), [5 * 7 * 3, 2 * 7 * 9, 2 * 5 * 4])
    assert compulsory_words(make_operation(P=4, stride=(2, 1)))[1] == 4


def test_capacity_bound_by_hand():
    # N = K = C = 64, 256 words: a 16 x 16 tile of one operand, of the others 64^3 / 16 words each.
    assert capacity_product(make_operation(N=64, K=64, C=64), jnp.array(256.0)) == (64**3 / 16) ** 2
    # A window of 9 taps uses every input 9 times as often.
    assert capacity_product(make_operation(N=64, K=64, C=64, R=3, S=3), jnp.array(256.0)) == 9 * (64**3 / 16) ** 2


def test_a_matrix_product_beyond_the_buffers_moves_more_than_its_operands():
    operation = make_operation(N=1024, K=1024, C=1024)
    bound = lower_bound(CHIPS["roomy"], operation, BITS)
    assert bound.dram_words == pytest.approx(1024**2 + 2 * 1024**3 / 512**0.5, rel=1e-5)


def test_a_larger_chip_lowers_the_bound_and_gradients_say_so():
    operation = make_operation(N=64, K=64, C=64)

    def energy(size):
        chip = dataclasses.replace(CHIPS["roomy"], size_bits=CHIPS["roomy"].size_bits.at[2].set(size))
        return lower_bound(chip, operation, BITS).dram_words

    assert jax.grad(energy)(8.0 * 512) < 0.0
