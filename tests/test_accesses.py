"""Closed-form counts against the executed loop nest, on all mappings of small nests, and by hand."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations_with_replacement, permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hw import LOOPS, OPERANDS, PASSES, TIMELOOP, Mapping, count, make_mapping, make_operation
from hw.accesses import _accesses as accesses_of
from hw.traffic import count_traffic
from tests.oracle.loop_nest import Nest, entering, execute

LEVELS = 3
PIECE = 2048
"""Mappings counted at a time: all nests of one number of levels share a compilation."""

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


UNEVEN_NESTS = {
    "matrix product": ({"K": 5, "C": 3}, {}),
    "row": ({"P": 7, "R": 3}, {}),
    "stride 2": ({"P": 5, "R": 4}, {"stride": (2, 1)}),
    "dilation 2": ({"P": 5, "R": 3}, {"dilation": (2, 1)}),
    "stride beyond the window": ({"K": 3, "P": 7}, {"stride": (3, 1)}),
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


@jax.jit
def count_piece(operation, mappings):
    return jax.vmap(count, in_axes=(None, 0))(operation, mappings)


def count_all(operation, mappings: Mapping):
    """Counts of stacked mappings, as numpy arrays."""
    number = len(mappings.order)
    pieces = []
    for start in range(0, number, PIECE):
        rows = np.arange(start, start + PIECE) % number
        pieces.append(count_piece(operation, jax.tree.map(lambda x, rows=rows: x[rows], mappings)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:number], *pieces)


def check_all_mappings(bounds, window):
    nests = list(all_mappings(bounds, **window))
    mappings = as_mapping(nests)
    for pass_, summed in PASSES.items():
        counted = count_all(make_operation(**bounds, **window, pass_=pass_), mappings)
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


def uneven_splits(bound: int, slots: int) -> Iterator[list[int]]:
    """All factors, innermost first, of which none exceeds the tiles that are there; the last one covers the rest."""
    if slots == 1:
        yield [bound]
        return
    for factor in range(1, bound + 1):
        for rest in uneven_splits(-(-bound // factor), slots - 1):
            yield [factor, *rest]


def uneven_mappings(bounds: dict[str, int], stride=(1, 1), dilation=(1, 1)) -> Iterator[Nest]:
    """All factors and orders of one nest, those that do not divide the bounds among them; everything is kept."""
    everything = {operand: [True] * LEVELS for operand in OPERANDS}
    for factors in product(*(uneven_splits(bound, 2 * LEVELS) for bound in bounds.values())):
        by_slot = [dict(zip(bounds, slot, strict=True)) for slot in zip(*factors, strict=True)]
        spatial, temporal = by_slot[0::2], by_slot[1::2]
        for order in orders(temporal):
            yield Nest(bounds, stride, dilation, temporal, spatial, list(order), everything)


@pytest.mark.parametrize(
    "name", ["matrix product", "row", *(pytest.param(n, marks=pytest.mark.slow) for n in list(UNEVEN_NESTS)[2:])]
)
def test_counts_of_uneven_factors_equal_the_executed_nest(x64, name):
    """Words that enter all instances of every level, where edge tiles are smaller and instances may idle.

    Where both loops of an axis are cut, one unevenly, its small edge tiles may share less than a halo: there the closed
    form may count too much, never too little.
    """
    bounds, window = UNEVEN_NESTS[name]
    nests = list(uneven_mappings(bounds, **window))
    nests = [nests[i] for i in np.random.default_rng(0).permutation(len(nests))[:2000]]
    operation, mappings = make_operation(**bounds, **window), as_mapping(nests)
    counted = count_all(operation, mappings)
    words = counted.entering * counted.instances[:, :, None]
    tiles = np.minimum(mappings.tiles(), operation.bounds)[..., [LOOPS.index("P"), LOOPS.index("R")]]
    whole = np.array([bounds.get("P", 1), bounds.get("R", 1)])
    is_exact = ~((tiles < whole).all(-1) & (whole % tiles > 0).any(-1))
    for o, operand in enumerate(OPERANDS):
        expected = np.array([entering(nest, operand) for nest in nests])
        assert np.all(words[:, :, o] >= expected - 1e-9)
        exact = is_exact if operand == "inputs" else slice(None)
        np.testing.assert_allclose(words[:, :, o][exact], expected[exact], rtol=1e-12, err_msg=operand)
    assert is_exact.mean() > 0.4
    for pass_ in PASSES:
        counted = count_all(make_operation(**bounds, **window, pass_=pass_), mappings)
        assert min(float(np.min(words)) for words in (counted.reads, counted.fills, counted.updates)) > -1e-9


def test_idle_branches_of_the_last_pass_want_no_inputs():
    # 5 outputs on 4 rows by 3 taps: the first pass wants 4 + 3 - 1 inputs, the second 3.
    operation = make_operation(P=5, R=3)
    mapping = make_mapping(operation, [factors(P=2)], [[factors(P=4), factors(R=3)]])
    assert count(operation, mapping).reads[0, 1] == pytest.approx(9)


def test_read_inputs_with_stride_and_dilation(x64):
    bounds, window = {"K": 2, "P": 4, "R": 2}, {"stride": (2, 1), "dilation": (3, 1)}
    nests = list(all_mappings(bounds, **window))
    counted = count_all(make_operation(**bounds, **window), as_mapping(nests))
    expected = np.array([execute(nest, "inputs", False) for nest in nests])
    np.testing.assert_array_equal(np.stack([counted.reads, counted.fills], -1)[:, :, 1], expected[..., :2])


COUNTS = ("reads", "fills", "updates", "entering", "finals", "footprint", "instances", "compute_cycles")


def factors(**by_loop):
    return [float(by_loop.get(name, 1)) for name in LOOPS]


def ranks(*inner_to_outer):
    names = [*inner_to_outer, *(name for name in LOOPS if name not in inner_to_outer)]
    return [names.index(name) for name in LOOPS]


def random_mappings(number, seed, num_levels=4, real=False):
    """Operation and stacked mappings of a strided convolution, with random factors, orders, fan-outs and keep sets."""
    rng = np.random.default_rng(seed)
    choices = (1.0, 2.0, 3.0) if not real else None
    shape = (number, num_levels, len(LOOPS))
    temporal = rng.choice(choices, shape) if choices else rng.uniform(1.05, 2.95, shape)
    fan_out = np.where(rng.random((number, num_levels, 2, 8)) < 0.2, 2.0 if choices else 1.7, 1.0 if choices else 1.01)
    covered = temporal.prod(1) * fan_out.prod((1, 2))
    bounds = np.floor(covered.min(axis=0)) if real else covered[0]
    order = rng.permuted(np.tile(np.arange(8, dtype=np.int32), (number, num_levels, 1)), axis=-1)
    keep = (rng.random((number, num_levels, 3)) < 0.7).astype(float)
    keep[:, -1] = 1.0
    return bounds, Mapping(temporal, fan_out, order, keep)


def test_outputs_by_hand():
    """K = 4, C = 6 on two levels: C 3 inside, then C 2 inside K 4 outside.

    One output at a time is in the buffer; it is complete after 3 x 2 products, so each enters once: 4 entries, no
    fills. 24 products update the buffer, 4 of them the first of their output, so 20 read first.
    """
    operation = make_operation(K=4, C=6)
    mapping = make_mapping(operation, [factors(C=3), factors(C=2, K=4)], order=[ranks("C"), ranks("C", "K")])
    accesses = count(operation, mapping)
    np.testing.assert_array_equal(accesses.updates[:, 2], [24, 4])
    np.testing.assert_array_equal(accesses.reads[:, 2], [20, 0])
    np.testing.assert_array_equal(accesses.fills[:, 2], [0, 0])
    np.testing.assert_array_equal(accesses.finals[:, 2], [4, 4])
    # With C outside of K every output comes back once, half complete.
    mapping = make_mapping(operation, [factors(C=3), factors(C=2, K=4)], order=[ranks("C"), ranks("K", "C")])
    accesses = count(operation, mapping)
    np.testing.assert_array_equal(accesses.updates[:, 2], [24, 8])
    np.testing.assert_array_equal(accesses.reads[:, 2], [20, 4])
    np.testing.assert_array_equal(accesses.fills[:, 2], [4, 0])


def test_a_sliding_window_keeps_its_halo():
    # 8 outputs, 3 taps: the window of 3 inputs enters once, then one input per step: 3 + 7 = 10, all there are.
    operation = make_operation(P=8, R=3)
    accesses = count(operation, make_mapping(operation, [factors(R=3), factors(P=8)]))
    assert accesses.fills[0, 1] == 10 and accesses.reads[1, 1] == 10 and accesses.footprint[0, 1] == 3
    # By two: 3 + 7 * 2 = 17 of the 17 inputs; by four, nothing is shared: 8 * 3 of the 31.
    for stride, entered in ((2, 17), (4, 24)):
        operation = make_operation(P=8, R=3, stride=(stride, 1))
        assert count(operation, make_mapping(operation, [factors(R=3), factors(P=8)])).fills[0, 1] == entered


def test_diagonals_are_multicast():
    # 4 rows of outputs by 3 columns of taps want only 6 different inputs, and all 12 weights-by-outputs pairs.
    operation = make_operation(P=4, R=3)
    mapping = make_mapping(operation, [factors()], [[factors(P=4), factors(R=3)]])
    np.testing.assert_array_equal(count(operation, mapping).reads[0], [3, 6, 0])
    operation = make_operation(P=4, R=3, stride=(2, 1))
    np.testing.assert_array_equal(count(operation, mapping).reads[0], [3, 8 + 1, 0])


def test_gaps_of_an_accumulated_window_are_no_first_touches():
    # 4 outputs at stride 3 under one tap: a box of 10 inputs, of which 4 are updated, each once.
    operation = make_operation(P=4, stride=(3, 1), pass_="input_grad")
    accesses = count(operation, make_mapping(operation, [factors(P=4), factors()]))
    np.testing.assert_array_equal(accesses.updates[:, 1], [4, 10])
    np.testing.assert_array_equal(accesses.reads[:, 1], [0, 0])
    assert accesses.footprint[0, 1] == 10 and accesses.fills[0, 1] == 0


def test_a_hundred_channels_on_sixteen_columns(x64):
    """7 passes, the last of 4 columns: no product is counted that is not there, and no word of what K moves.

    All 16 columns hear the 8 inputs of every pass: 7 x 8 x 16 reads by the MACs.
    """
    operation = make_operation(K=100, C=8)
    mapping = make_mapping(operation, [factors(C=8), factors(K=7)], [[factors()] * 2, [factors(K=16), factors()]])
    accesses = count(operation, mapping)
    assert accesses.compute_cycles == 7 * 8 and accesses.macs == 800
    np.testing.assert_allclose(accesses.reads[0] * accesses.instances[0], [800, 896, 700])
    np.testing.assert_array_equal(accesses.reads[1, :2], [800, 8])
    np.testing.assert_array_equal(accesses.updates[1, 2], 100)
    assert accesses.macs / (accesses.compute_cycles * 16) == pytest.approx(100 / 112)


def test_sums_over_an_uneven_fan_out_take_whole_passes():
    """3 products on 2 rows: two passes update the sum; a fan-out of 9 for 3 products, one."""
    operation = make_operation(K=2, C=3)
    mapping = make_mapping(operation, [factors(C=2), factors(K=2)], [[factors(C=2), factors()], [factors()] * 2])
    accesses = count(operation, mapping)
    np.testing.assert_array_equal(accesses.updates[0], [0, 0, 4])
    np.testing.assert_array_equal(accesses.reads[0, 2], 2)
    mapping = make_mapping(operation, [factors(K=2), factors()], [[factors(C=3), factors(C=3)], [factors()] * 2])
    np.testing.assert_array_equal(count(operation, mapping).updates[0], [0, 0, 2])


def test_a_halo_in_an_edge_tile():
    # 100 outputs under 3 taps in tiles of 16: the six full tiles and that of 4 together meet each of 102 inputs once.
    operation = make_operation(P=100, R=3)
    accesses = count(operation, make_mapping(operation, [factors(P=16, R=3), factors(P=7)]))
    np.testing.assert_allclose(accesses.fills[0, 1], 102, rtol=1e-6)
    assert accesses.footprint[0, 1] == 18
    # 9 outputs in tiles of 8, fetched anew for every k: 10 and 3 inputs.
    operation = make_operation(K=2, P=9, R=3)
    mapping = make_mapping(operation, [factors(P=8, R=3), factors(P=2, K=2)], order=[ranks("P"), ranks("P", "K")])
    np.testing.assert_allclose(count(operation, mapping).fills[0, 1], 2 * 11, rtol=1e-6)  # P slides: 11 there are
    operation = make_operation(C=2, P=9, R=3)
    mapping = make_mapping(operation, [factors(P=8, R=3), factors(P=2, C=2)], order=[ranks("P"), ranks("C", "P")])
    np.testing.assert_allclose(count(operation, mapping).fills[0, 1], 2 * 13, rtol=1e-6)


def test_partial_sums_of_copies_are_not_final():
    operation = make_operation(K=2, C=4)
    mapping = make_mapping(operation, [factors(C=2), factors(K=2)], [[factors()] * 2, [factors(C=2), factors()]])
    np.testing.assert_array_equal(count(operation, mapping).finals[:, 2], [0, 2])


def test_a_matrix_product_has_the_same_input_gradient_in_both_forms():
    """dX = dY W^T accumulated in place, or as the outputs of the product with K and C exchanged."""
    direct = make_operation(N=4, K=6, C=8, pass_="input_grad")
    as_outputs = make_operation(N=4, K=8, C=6)
    mapping = make_mapping(direct, [factors(N=2, C=2), factors(K=6), factors(C=4, N=2)])
    exchanged = make_mapping(as_outputs, [factors(N=2, K=2), factors(C=6), factors(K=4, N=2)])
    a, b = count(direct, mapping), count(as_outputs, exchanged)
    for name in ("reads", "fills", "updates", "finals"):
        of_a, of_b = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(of_a[:, [0, 1, 2]], of_b[:, [0, 2, 1]])


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (1, 2))])
def test_counts_are_continuous_from_one_to_three(x64, pass_, stride, dilation):
    """Every factor, temporal or spatial, of every level and loop is swept; neighbours a billionth apart agree."""
    bounds, base = random_mappings(1, seed=stride[0] + dilation[1], num_levels=3)
    sizes = {name: int(bound) for name, bound in zip(LOOPS, bounds, strict=True)}
    operation = make_operation(**sizes, stride=stride, dilation=dilation, pass_=pass_)
    grid = np.linspace(1.0, 3.0, 49)
    points = np.clip(np.concatenate([grid - 1e-9, grid, grid + 1e-9]), 1.0, 3.0)
    slots = [(kind, l, d) for kind in (0, 1) for l in range(3) for d in range(8)]
    temporal = np.tile(base.temporal, (len(slots), len(points), 1, 1))
    spatial = np.tile(base.spatial, (len(slots), len(points), 1, 1, 1))
    for i, (kind, l, d) in enumerate(slots):
        if kind == 0:
            temporal[i, :, l, d] = points
        else:
            spatial[i, :, l, 0, d] = points
    flat = Mapping(
        temporal.reshape(-1, 3, 8),
        spatial.reshape(-1, 3, 2, 8),
        np.tile(base.order, (len(slots) * len(points), 1, 1)),
        np.tile(base.keep, (len(slots) * len(points), 1, 1)),
    )
    accesses = count_all(operation, flat)
    for name in COUNTS:
        values = np.asarray(getattr(accesses, name)).reshape(len(slots), 3, len(grid), -1)
        before, at, after = values.swapaxes(0, 1)
        scale = np.abs(at).max(axis=1, keepdims=True) + 1.0
        assert np.max((np.abs(before - at) + np.abs(after - at)) / scale) < 1e-6, name


def sum_of(counted, operation, mapping, weights):
    accesses = counted(operation, mapping)
    return sum(jnp.sum(w * x) for w, x in zip(weights, jax.tree.leaves(accesses), strict=True))


@jax.jit
def log_counts(operation, order, keep, temporal, spatial):
    accesses = count(operation, Mapping(temporal, spatial, order, keep))
    return jnp.stack([jnp.sum(jnp.log1p(getattr(accesses, name))) for name in COUNTS])


@pytest.mark.parametrize("pass_", PASSES)
def test_gradients(x64, pass_):
    """Reverse mode against finite differences at random real factors, away from kinks."""
    bounds, mappings = random_mappings(1, seed=5, num_levels=3, real=True)
    sizes = {name: int(bound) for name, bound in zip(LOOPS, bounds, strict=True)}
    operation = make_operation(**sizes, stride=(2, 1), pass_=pass_)
    mapping = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), mappings)

    check_grads(
        partial(log_counts, operation, mapping.order, mapping.keep),
        (mapping.temporal, mapping.spatial),
        order=1,
        modes=("rev",),
        eps=1e-6,
        rtol=1e-5,
    )


def test_the_adjoint_equals_autodiff(x64):
    """On random real-valued factors, orders and keep sets; every count has a random cotangent."""
    number, num_levels = 40, 3
    _, mappings = random_mappings(number, seed=7, num_levels=num_levels, real=True)
    mappings = jax.tree.map(jnp.asarray, mappings)
    rng = np.random.default_rng(1)

    def by_autodiff(operation, mapping):
        nest = jax.tree.map(lambda x: x[..., None], (operation, mapping))
        return jax.tree.map(lambda x: x[..., 0], accesses_of(*nest, count_traffic(*nest, TIMELOOP)))

    pulls = [
        jax.jit(jax.vmap(jax.grad(partial(sum_of, counted), 1, allow_int=True), in_axes=(None, 0, 0)))
        for counted in (count, by_autodiff)
    ]
    windows = ({}, {"stride": (2, 1)}, {"dilation": (1, 2)})
    for window, pass_ in product(windows, PASSES):
        operation = make_operation(G=9, N=9, K=9, C=9, P=40, Q=50, R=4, S=3, **window, pass_=pass_)
        accesses = count_piece(operation, mappings)
        # Relative to the words that pass, so that no count outweighs another.
        scale = 1.0 + accesses.entering.max(axis=(1, 2))
        weights = [
            jnp.asarray(rng.normal(size=x.shape))
            / (scale if i < 6 else 1.0 + jnp.abs(x).max()).reshape(-1, *[1] * (x.ndim - 1))
            for i, x in enumerate(jax.tree.leaves(accesses))
        ]
        by_hand, expected = (pull(operation, mappings, weights) for pull in pulls)
        for a, b in ((by_hand.temporal, expected.temporal), (by_hand.spatial, expected.spatial)):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9 * float(jnp.abs(b).max()))


def test_large_layers_in_float32():
    """A feed-forward layer of a language model at batch 4096: 32-bit counts within 1e-5, and the same ranking."""
    sizes = {"N": 4096 * 2048, "K": 49152, "C": 12288}
    rng = np.random.default_rng(0)
    number, num_levels = 400, 4
    temporal, spatial = np.ones((number, num_levels, 8)), np.ones((number, num_levels, 2, 8))
    for loop, bound in sizes.items():
        d, rest = LOOPS.index(loop), bound
        for prime in (2, 3):
            while rest % prime == 0:
                rest //= prime
                slot = rng.integers(0, num_levels + 1, number)
                for row, l in enumerate(slot):
                    if l == num_levels:
                        spatial[row, 1, 0, d] *= prime
                    else:
                        temporal[row, l, d] *= prime
    order = rng.permuted(np.tile(np.arange(8, dtype=np.int32), (number, num_levels, 1)), axis=-1)
    mappings = Mapping(temporal, spatial, order, np.ones((number, num_levels, 3)))

    def words(dtype):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else None), mappings)
        operation = jax.tree.map(lambda x: x.astype(dtype), make_operation(**sizes))
        accesses = count_piece(operation, cast)
        moved = (accesses.reads + accesses.fills + accesses.updates) * accesses.instances[:, :, None]
        return [np.asarray(leaf, np.float64) for leaf in (*jax.tree.leaves(accesses), moved.sum((1, 2)))]

    single = words(jnp.float32)
    with jax.enable_x64(True):
        double = words(jnp.float64)
    for a, b in zip(single, double, strict=True):
        assert np.all(np.abs(a - b) <= 1e-5 * np.abs(b))
    (a, b), differ = (single[-1], double[-1]), 1e-4
    apart = np.abs(np.subtract.outer(b, b)) > differ * b
    assert np.all((np.subtract.outer(a, a) > 0)[apart] == (np.subtract.outer(b, b) > 0)[apart])


def test_transformations_agree():
    """jit = eager = vmap on the leading and on the trailing axis = loop."""
    bounds, mappings = random_mappings(3, seed=9, num_levels=2)
    mappings = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else None), mappings)
    sizes = {name: int(bound) for name, bound in zip(LOOPS, bounds, strict=True)}
    operation = make_operation(**sizes, pass_="input_grad")
    leading = jax.vmap(count, in_axes=(None, 0))(operation, mappings)
    trailing = jax.vmap(count, in_axes=(None, -1), out_axes=-1)
    trailing = jax.jit(trailing)(operation, jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), mappings))
    for i in range(3):
        alone = count(operation, jax.tree.map(lambda x, i=i: x[i], mappings))
        for a, b, c in zip(*map(jax.tree.leaves, (alone, leading, trailing)), strict=True):
            np.testing.assert_allclose(b[i], a, rtol=1e-6, atol=1e-3)
            np.testing.assert_allclose(c[..., i], a, rtol=1e-6, atol=1e-3)


def test_order_of_absent_loops_changes_nothing():
    operation = make_operation(K=4, C=6)
    temporal = [factors(C=3), factors(C=2, K=4)]
    one = count(operation, make_mapping(operation, temporal, order=[ranks("C", "S", "K"), ranks("R", "C", "G", "K")]))
    other = count(operation, make_mapping(operation, temporal, order=[ranks("C"), ranks("C", "K")]))
    jax.tree.map(np.testing.assert_array_equal, one, other)
