"""The mapper: every proposal covers its operation, the best is legal, and small optima are found."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import mapper
from codesign.sharding import make_mesh
from hw.chip import make_chip
from hw.cost import evaluate
from hw.mapping import Mapping, make_mapping
from hw.operation import LOOPS, make_operation, stack_operations

PRICES = jnp.array([1.0, 0.1])
EVALUATE = jax.jit(evaluate)


def search(operations, chip, bits, **options):
    num = bits.shape[0]
    return mapper.begin_search(
        jax.random.key(options.pop("seed", 0)), operations, chip, bits, PRICES,
        slots=mapper.make_slots(chip), tables=mapper.make_tables(operations),
        density=jnp.ones((num, 2)), resident=jnp.zeros((num, 3)), **options,
    )()  # fmt: skip


@pytest.fixture(scope="module")
def operations():
    sizes = {"N": 4, "K": 10, "C": 6, "P": 5, "Q": 5, "R": 3, "S": 3}
    return stack_operations([make_operation(**sizes, pass_=p) for p in ("forward", "input_grad", "weight_grad")])


@pytest.fixture(scope="module")
def found(operations):
    chip = make_chip(rows=4, columns=4, local_kib=4, shared_kib=16)
    return chip, search(operations, chip, jnp.full((3, 3), 8.0), iterations=60)


def test_every_candidate_covers_its_operation(operations, found):
    _, candidates = found
    for n, k in np.ndindex(*candidates.scores.shape):
        operation = jax.tree.map(lambda x, n=n: x[n], operations)
        mapping = jax.tree.map(lambda x, n=n, k=k: x[n, k], candidates.mapping)
        make_mapping(operation, mapping.temporal, mapping.spatial, mapping.order, mapping.keep)  # raises if it does not


def test_best_candidates_fit_and_their_score_is_their_cost(operations, found):
    chip, candidates = found
    for n in range(3):
        operation = jax.tree.map(lambda x, n=n: x[n], operations)
        mapping = jax.tree.map(lambda x, n=n: x[n, 0], candidates.mapping)
        cost = EVALUATE(chip, operation, mapping, jnp.full(3, 8.0))
        assert float(jnp.sum(cost.violation)) == 0.0
        expected = np.log(float(PRICES[0] * cost.energy + PRICES[1] * cost.latency))
        np.testing.assert_allclose(candidates.scores[n, 0], expected, rtol=1e-5)


def test_chains_spread_over_a_mesh_find_the_same(operations, found):
    """On the one device of the tests; tests/test_sharding.py has several."""
    chip, candidates = found
    spread = search(operations, chip, jnp.full((3, 3), 8.0), iterations=60, mesh=make_mesh())
    jax.tree.map(np.testing.assert_array_equal, spread.mapping, candidates.mapping)


def test_candidates_are_sorted_and_distinct(found):
    scores = np.asarray(found[1].scores)
    assert np.all(np.diff(scores, axis=1) > 0)


def test_warm_start_never_loses(operations, found):
    chip, candidates = found
    again = search(operations, chip, jnp.full((3, 3), 8.0), iterations=1, start=candidates.mapping, seed=1)
    assert np.all(np.asarray(again.scores[:, 0]) <= np.asarray(candidates.scores[:, 0]) + 1e-5)


def every_mapping_of_a_small_product():
    """All mappings of a 4 x 4 x 4 product (N, K, C) on a 2 x 2 array, everything kept, one loop order for all levels."""
    splits = np.array([f for f in itertools.product((1, 2, 4), repeat=4) if np.prod(f) == 4], float)  # level 0 to DRAM
    places = [LOOPS.index(loop) for loop in "NKC"]
    for axes in itertools.product(range(3), repeat=2):
        temporal = np.ones((len(splits) ** 3, 4, len(LOOPS)))
        chosen = np.stack(np.meshgrid(*[range(len(splits))] * 3, indexing="ij"), -1).reshape(-1, 3)
        for column, place in enumerate(places):
            temporal[:, :, place] = splits[chosen[:, column]]
        spatial = np.ones((4, 2, len(LOOPS)))
        for axis, column in enumerate(axes):
            spatial[1, axis, places[column]] = 2
            temporal[:, 3, places[column]] /= 2  # the array takes its share from DRAM's factor
        legal = temporal[(temporal >= 1).all((1, 2))]
        temporal = np.resize(legal, temporal.shape)  # repeated up to one shape: one compilation
        for permutation in itertools.permutations(range(3)):
            order = np.arange(len(LOOPS))
            order[places] = np.array(places)[list(permutation)]
            yield temporal, spatial, np.tile(order, (4, 1))


def test_search_finds_the_enumerated_optimum():
    operation = make_operation(N=4, K=4, C=4)
    chip = make_chip(rows=2, columns=2, register_bits=64, local_kib=1, shared_kib=8)

    @jax.jit
    def lowest(temporal, spatial, order):
        def one(temporal):
            mapping = Mapping(temporal, spatial, order, jnp.ones((4, 3)))
            return mapper.score(evaluate(chip, operation, mapping, jnp.full(3, 8.0)), PRICES)

        return jnp.min(jax.vmap(one)(temporal))

    best = min(
        float(lowest(jnp.asarray(t, jnp.float32), jnp.asarray(s, jnp.float32), jnp.asarray(o, jnp.int32)))
        for t, s, o in every_mapping_of_a_small_product()
    )
    found = search(stack_operations([operation]), chip, jnp.full((1, 3), 8.0), iterations=400)
    assert float(found.scores[0, 0]) <= best + 1e-5


def test_with_neighbours_and_replace_best():
    first, second = (mapper.Candidates(x, x, x) for x in jnp.arange(12.0).reshape(2, 2, 3))  # (n, K) = (2, 3) each
    flat = mapper.with_neighbours([first, second])
    np.testing.assert_array_equal(flat.scores, [[0, 1, 2, 6], [3, 4, 5, 9]])
    better = mapper.Candidates(*(jnp.full((2, 2), -1.0),) * 3)
    np.testing.assert_array_equal(mapper.replace_best(flat, better).scores, [[-1, -1, 2, 6], [-1, -1, 5, 9]])


def test_misfit_names_operation_and_resource():
    chip = make_chip(rows=2, columns=2)
    violation = jnp.zeros((2, len(chip.limit_names()))).at[1, 1].set(0.5)
    with pytest.raises(ValueError, match=r"no valid mapping for conv2: .*local.*50%"):
        mapper.check_legal(violation, chip, ["conv1", "conv2"])
