"""Local search over spaces: keeps to what hardware allows, finds proven optima, says what does not fit, can be stopped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.annealing import Slots, make_freedom
from codesign.anytime import Effort, keep_searching
from codesign.flat import FlatPrices, map_network, map_operations
from codesign.mapspace import Nest, Space
from experiments.gemmini import DEFAULT, WORKLOADS, Gemmini, read_workload
from hw.accesses import count
from hw.mapping import make_mapping
from hw.operation import LOOPS

NETWORK_EDP = {"bert": 5.966e9, "resnet50": 2.146e11, "retinanet": 1.170e11, "unet": 2.164e14}
"""Proven optima on the default chip, docs/search.md."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ("resnet50", "retinanet", "unet")])
def test_local_search_alone_comes_near_the_proven_optimum(name):
    check_near_optimum(name)


def check_near_optimum(name):
    """Within 2 % at 10 000 evaluations per layer; returns what was found."""
    workload = read_workload(WORKLOADS, name)
    space, prices = Gemmini().flat(DEFAULT)
    choice, found = map_network(jax.random.key(0), workload.nests, workload.counts, space, prices, Effort(10_000))
    assert choice.value == pytest.approx(NETWORK_EDP[name], rel=0.02)
    assert choice.value > NETWORK_EDP[name] * 0.999  # four digits, and rounding in float32
    return workload.nests, space, prices, found


def test_what_is_found_keeps_to_the_space_and_costs_what_it_says():
    """BERT's products: near the optimum, counted again, priced by the accelerator's own constants."""
    nests, space, prices, found = check_near_optimum("bert")
    for i, k in np.ndindex(len(nests), 3):
        mapping = jax.tree.map(lambda x, i=i, k=k: np.asarray(x[i, k]), found.mapping)
        covered = mapping.temporal.prod(axis=0) * mapping.spatial.prod(axis=(0, 1))
        np.testing.assert_array_equal(covered, nests[i].bounds)  # perfect factors
        assert (mapping.temporal[:-1][~space.temporal[:-1]] == 1).all() and (mapping.spatial[~space.spatial] == 1).all()
        np.testing.assert_array_equal(mapping.keep, space.keep)
        with jax.enable_x64(True):
            operation = nests[i].operation()
            exact = make_mapping(operation, *vars(mapping).values())
            accesses = jax.tree.map(np.asarray, counted(operation, exact))
        words = (accesses.reads + accesses.fills + accesses.updates).sum(axis=1) * accesses.instances
        energy = float(words @ np.asarray(prices.access)) + float(prices.mac) * nests[i].macs
        assert float(found.energy[i, k]) == pytest.approx(energy, rel=1e-5)
        assert (accesses.footprint.sum(axis=1) <= space.capacity).all()
        assert (accesses.fanout <= space.fanout).all()


counted = jax.jit(count)


def small_space(**changes):
    levels, loops = 3, len(LOOPS)
    space = Space(
        keep=np.ones((levels, 3), bool),
        temporal=np.ones((levels, loops), bool),
        spatial=np.zeros((levels, 2, loops), bool),
        fanout=np.array([[1, 1], [4, 1], [1, 1]], float),
        capacity=np.array([16, 256, np.inf]),
        width=np.ones((levels, 3)),
    )
    space.spatial[1, 0] = True
    return dataclasses.replace(space, **changes)


UNIT = FlatPrices(jnp.array([1.0, 6.0, 200.0]), jnp.asarray(1.0), jnp.array([8.0, 8.0, 4.0]), jnp.zeros(3))


def test_imperfect_factors_use_an_array_that_prime_bounds_leave_idle():
    """17 x 19 x 23 products on four MACs: no factor but the bounds themselves divides them, and none of them fits four."""
    nests, latency = [Nest((1, 23, 17, 19, 1, 1, 1, 1), (1, 1), (1, 1))], jnp.array([[0.0, 1.0]])
    space = small_space()
    perfect, imperfect = (
        map_operations(jax.random.key(0), nests, space, UNIT, latency, perfect=p, iterations=60) for p in (True, False)
    )
    macs = 17 * 19 * 23
    assert float(perfect.cycles[0, 0]) >= macs
    assert macs / 4 <= float(imperfect.cycles[0, 0]) < macs / 2


def test_constraints_are_never_moved():
    slots = Slots.of(np.array([[1, 1], [4, 4], [1, 1]]))
    spatial = np.zeros((3, 2, 8), bool)
    spatial[1, 0, LOOPS.index("K")] = True
    freedom = make_freedom(slots, spatial=spatial, keep=np.eye(3))
    number = dict(zip(LOOPS, np.asarray(freedom.num_places), strict=True))
    assert number["K"] == 3 and number["C"] == 2  # two levels in time; K along X as well
    assert slots.places[int(freedom.places[LOOPS.index("K"), 2])] == (1, 0)
    assert not freedom.toggles.any()
    assert make_freedom(slots).toggles.all() and (make_freedom(slots).num_places == 4).all()


def test_no_valid_mapping_names_the_level_and_its_smallest_tiles():
    space = small_space(capacity=np.array([16, 2, np.inf]))
    nests = [Nest((1, 4, 4, 4, 1, 1, 1, 1), (1, 1), (1, 1))]
    found = map_operations(jax.random.key(0), nests, space, UNIT, jnp.array([[1.0, 0.0]]), iterations=60)
    with pytest.raises(ValueError, match=r"operation 0 .*level 1 holds 2 and the smallest tiles take 3; enlarge it"):
        found.check(nests, space)


def test_a_search_keeps_to_its_evaluations_and_tells_how_it_goes():
    reports = []
    best = keep_searching(lambda i, b: i, 100, Effort(350), float, reports.append)
    assert best == 2 and [r.evaluations for r in reports] == [100, 200, 300]
    assert [r.value for r in reports] == [0.0, 1.0, 2.0]


def test_a_search_out_of_time_has_taken_one_step():
    assert keep_searching(lambda i, b: i, 100, Effort(1000, seconds=0.0), float) == 0


def test_an_interrupt_returns_the_best_so_far():
    def step(i, best):
        if i == stop:
            raise KeyboardInterrupt
        return i

    stop = 3
    assert keep_searching(step, 1, Effort(10), float) == 2
    stop = 0
    with pytest.raises(KeyboardInterrupt):
        keep_searching(step, 1, Effort(10), float)
