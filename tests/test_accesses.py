"""Closed-form counts against the executed loop nest, on all mappings of small nests, and by hand."""

from collections.abc import Iterator
from itertools import combinations_with_replacement, permutations, product

import jax
import numpy as np
import pytest

from hw import LOOPS, OPERANDS, PASSES, Mapping, count, make_operation
from tests.oracle.loop_nest import Nest, execute

LEVELS = 3

# Small enough to run all their mappings: bounds, and stride or dilation along (width, height).
NESTS = {
    "matrix product": ({"N": 2, "K": 2, "C": 2}, {}),
    "convolution": ({"K": 2, "P": 2, "R": 2}, {}),
    "long row": ({"P": 4, "R": 4}, {}),
    "stride 2": ({"P": 4, "R": 3}, {"stride": (2, 1)}),
    "stride 3, four taps": ({"P": 4, "R": 4}, {"stride": (3, 1)}),
    "stride beyond the window": ({"K": 2, "P": 4}, {"stride": (3, 1)}),
    "dilation 3": ({"P": 4, "R": 4}, {"dilation": (3, 1)}),
    "height": ({"Q": 4, "S": 3}, {"stride": (1, 2)}),
    "depthwise": ({"G": 2, "P": 2, "R": 3}, {}),
}
LARGER_NESTS = {
    "matrix product": ({"N": 2, "K": 4, "C": 2}, {}),
    "convolution": ({"K": 2, "C": 2, "P": 4, "R": 2}, {}),
    "stride 2": ({"K": 2, "P": 4, "R": 3}, {"stride": (2, 1)}),
    "stride 2, four taps": ({"K": 2, "P": 2, "R": 4}, {"stride": (2, 1)}),
    "dilation 2": ({"K": 2, "P": 4, "R": 3}, {"dilation": (2, 1)}),
    "both axes": ({"P": 2, "Q": 2, "R": 2, "S": 2}, {}),
    "depthwise": ({"G": 2, "N": 2, "P": 2, "R": 3}, {}),
}


def splits(bound: int, slots: int) -> Iterator[list[int]]:
    """All ways to write a power of two, or a prime, as a product over slots."""
    primes = [2] * (bound.bit_length() - 1) if bound & (bound - 1) == 0 else [bound]
    for chosen in combinations_with_replacement(range(slots), len(primes)):
        factors = [1] * slots
        for slot, prime in zip(chosen, primes, strict=True):
            factors[slot] *= prime
        yield factors


def orders(temporal: list[dict[str, int]]) -> Iterator[tuple[str, ...]]:
    """All orders, inner to outer, of the loops present at each level; absent ones go outside."""
    per_level = []
    for factors in temporal:
        present = [name for name in LOOPS if factors.get(name, 1) > 1]
        absent = "".join(name for name in LOOPS if name not in present)
        per_level.append(["".join(p) + absent for p in permutations(present)])
    return product(*per_level)


def all_mappings(bounds: dict[str, int], stride=(1, 1), dilation=(1, 1)) -> Iterator[Nest]:
    """All factors, orders and kept levels of one nest. An operand's counts do not depend on what others keep."""
    for factors in product(*(splits(bound, 2 * LEVELS) for bound in bounds.values())):
        by_slot = [dict(zip(bounds, slot, strict=True)) for slot in zip(*factors, strict=True)]
        temporal, spatial = by_slot[:LEVELS], by_slot[LEVELS:]
        for order in orders(temporal):
            for kept in product((True, False), repeat=LEVELS - 1):
                keep = {operand: [*kept, True] for operand in OPERANDS}
                yield Nest(bounds, stride, dilation, temporal, spatial, list(order), keep)


def as_mapping(nests: list[Nest]) -> Mapping:
    """The nests as one stacked `Mapping`, their fan-out alternately on X and Y."""
    temporal = np.array([[[f.get(name, 1.0) for name in LOOPS] for f in nest.temporal] for nest in nests])
    fan_out = np.array([[[f.get(name, 1.0) for name in LOOPS] for f in nest.spatial] for nest in nests])
    spatial = np.ones((*fan_out.shape[:2], 2, len(LOOPS)))
    spatial[0::2, :, 0], spatial[1::2, :, 1] = fan_out[0::2], fan_out[1::2]
    order = np.array([[[names.index(name) for name in LOOPS] for names in nest.order] for nest in nests], np.int32)
    keep = np.array([[nest.keep[operand] for operand in OPERANDS] for nest in nests], float)
    return Mapping(temporal, spatial, order, keep.swapaxes(1, 2))


def check_all_mappings(bounds, window):
    nests = list(all_mappings(bounds, **window))
    mappings = as_mapping(nests)
    counts = jax.vmap(count, in_axes=(None, 0))
    for pass_, summed in PASSES.items():
        counted = counts(make_operation(**bounds, **window, pass_=pass_), mappings)
        words = np.stack([counted.reads, counted.fills, counted.updates], axis=-1)
        for o, operand in enumerate(OPERANDS):
            expected = np.array([execute(nest, operand, operand == summed) for nest in nests])
            np.testing.assert_array_equal(words[:, :, o], expected, err_msg=f"{pass_} {operand}")


@pytest.mark.parametrize("name", NESTS)
def test_counts_equal_the_executed_nest(x64, name):
    check_all_mappings(*NESTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER_NESTS)
def test_counts_equal_the_executed_nest_larger(x64, name):
    check_all_mappings(*LARGER_NESTS[name])


def test_read_inputs_with_stride_and_dilation(x64):
    bounds, window = {"K": 2, "P": 4, "R": 2}, {"stride": (2, 1), "dilation": (3, 1)}
    nests = list(all_mappings(bounds, **window))
    counted = jax.vmap(count, in_axes=(None, 0))(make_operation(**bounds, **window), as_mapping(nests))
    expected = np.array([execute(nest, "inputs", False) for nest in nests])
    np.testing.assert_array_equal(np.stack([counted.reads, counted.fills], -1)[:, :, 1], expected[..., :2])
