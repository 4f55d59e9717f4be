"""Enumeration against brute force: every mapping of small nests, counted by `hw.accesses.count`, none left out."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.enumeration import Enumerator, undominated
from codesign.mapspace import Limits, Nest, Space, factorisations
from hw.accesses import count
from hw.mapping import Mapping, make_mapping
from hw.operation import LOOPS, make_operation

KINDS = ("reads", "fills", "updates")


def make_space(keep, fan=None, fanout=4, capacity=None, temporal=None):
    """`keep` as strings of operands, innermost first; `fan` maps (level, axis) to loops."""
    levels = len(keep)
    space = Space(
        keep=np.array([[name in kept for name in "WIO"] for kept in keep]),
        temporal=np.ones((levels, 8), bool),
        spatial=np.zeros((levels, 2, 8), bool),
        fanout=np.ones((levels, 2)),
        capacity=np.full(levels, np.inf) if capacity is None else np.array(capacity, float),
        width=np.ones((levels, 3)),
    )
    for (level, axis), loops in (fan or {}).items():
        space.spatial[level, axis, [LOOPS.index(d) for d in loops]] = True
        space.fanout[level, axis] = fanout
    for level, loops in (temporal or {}).items():
        space.temporal[level] = [d in loops for d in LOOPS]
    return space


def make_nest(operation):
    return Nest(
        tuple(int(b) for b in operation.bounds), tuple(int(s) for s in operation.stride),
        tuple(int(d) for d in operation.dilation), int(np.argmax(operation.accumulated)),
    )  # fmt: skip


def make_price(space, seed=0):
    """Energy: other joules for every kind of access; latency: the largest of compute and every level's port."""
    rng = np.random.default_rng(seed)
    joules = rng.uniform(0.5, 2.0, (len(KINDS), *space.keep.shape)) * 4.0 ** np.arange(space.num_levels)[:, None]
    bandwidth = rng.uniform(1.0, 6.0, space.num_levels)

    def price(counts):
        energy, cycles = 0.0, [counts.cycles]
        for l in range(space.num_levels):
            words = [[getattr(counts, kind)(l, o) for o in range(3)] for kind in KINDS]
            energy = energy + sum(joules[i, l, o] * words[i][o] for i in range(3) for o in range(3))
            cycles.append(sum(map(sum, words)) * counts.share(l) / bandwidth[l])
        return np.stack([energy + 0 * counts.cycles, np.maximum.reduce([c + 0 * counts.cycles for c in cycles])])

    def price_accesses(accesses):
        words = np.stack([np.asarray(getattr(accesses, kind)) for kind in KINDS], axis=1)  # (n, 3, L, 3)
        instances = np.asarray(accesses.instances)
        energy = np.einsum("nklo,klo,nl->n", words, joules, instances)
        port = (words.sum(axis=(1, 3)) / bandwidth).max(axis=1)
        return np.stack([energy, np.maximum(np.asarray(accesses.compute_cycles), port)])

    return price, price_accesses


@functools.cache
def counted():
    return jax.jit(jax.vmap(count, in_axes=(None, 0)))


def count_mappings(operation, temporal, spatial, order, keep):
    """Counts of n mappings, as numpy."""
    n = len(temporal)
    mapping = Mapping(
        jnp.asarray(temporal), jnp.asarray(spatial), jnp.asarray(order, jnp.int32),
        jnp.broadcast_to(jnp.asarray(keep, jnp.asarray(temporal).dtype), (n, *keep.shape)),
    )  # fmt: skip
    return jax.tree.map(np.asarray, counted()(operation, mapping))


def every_mapping(operation, space):
    """All factors on all places and all orders of the loops that iterate, in blocks of (temporal, spatial, order)."""
    levels, bounds = space.num_levels, [int(b) for b in operation.bounds]
    per_loop = []
    for d, bound in enumerate(bounds):
        places = [(l, None) for l in range(levels) if space.temporal[l, d]]
        places += [(l, a) for l in range(levels) for a in range(2) if space.spatial[l, a, d]]
        splits = []
        for factors in itertools.product([f for f in range(1, bound + 1) if bound % f == 0], repeat=len(places)):
            if np.prod(factors) == bound:
                t, s = np.ones(levels), np.ones((levels, 2))
                for (l, a), factor in zip(places, factors, strict=True):
                    if a is None:
                        t[l] = factor
                    else:
                        s[l, a] = factor
                splits.append((t, s))
        per_loop.append(splits)
    for splits in itertools.product(*per_loop):
        temporal = np.stack([t for t, _ in splits], axis=-1)
        spatial = np.stack([s for _, s in splits], axis=-1)
        if (spatial.prod(axis=-1) > space.fanout).any():
            continue
        ranks = []
        for l in range(levels):
            running = [d for d in range(8) if temporal[l, d] > 1]
            resting = [d for d in range(8) if temporal[l, d] == 1]
            orders = itertools.permutations(running) if l else [tuple(running)]  # nothing is kept below level 0
            ranks.append([np.argsort([*order, *resting]) for order in orders])
        for order in itertools.product(*ranks):
            yield temporal, spatial, np.stack(order)


def brute_force(operation, space, price_accesses):
    """Costs (2, n) of all mappings that fit."""
    costs, mappings = [], list(every_mapping(operation, space))
    for i in range(0, len(mappings), 8192):
        block = mappings[i : i + 8192]
        padded = block + [block[0]] * (8192 - len(block))  # one shape, one compilation
        accesses = count_mappings(operation, *map(np.stack, zip(*padded, strict=True)), space.keep)
        fits = (accesses.footprint.sum(axis=-1) <= space.capacity).all(axis=-1)
        fits[len(block) :] = False
        costs.append(price_accesses(accesses)[:, fits])
    return np.concatenate(costs, axis=1)


GEMMINI = {"keep": ["W", "O", "WI", "WIO"], "fan": {(1, 1): "C", (2, 0): "K"}, "temporal": {0: ""}}
CASES = {
    "window": ({"K": 2, "C": 2, "P": 4, "R": 3}, GEMMINI | {"capacity": [1, 6, 24, np.inf]}),
    "stride": ({"K": 2, "P": 4, "R": 3, "S": 2, "stride": (2, 1)}, GEMMINI | {"capacity": [1, 4, 40, np.inf]}),
    "both axes": ({"C": 2, "P": 2, "Q": 2, "R": 2, "S": 2}, GEMMINI | {"capacity": [1, 2, 20, np.inf]}),
    "product": ({"N": 4, "K": 4, "C": 6}, GEMMINI | {"capacity": [1, 4, 20, np.inf]}),
    "weight gradient": (
        {"N": 2, "K": 2, "P": 4, "R": 2, "pass_": "weight_grad"},
        {"keep": ["W", "WIO", "WIO"], "fan": {(1, 0): "PK"}, "capacity": [2, 12, np.inf]},
    ),
    "inputs kept twice": (
        {"K": 2, "C": 2, "P": 4, "R": 2},
        {"keep": ["I", "WIO", "WIO"], "capacity": [3, 14, np.inf], "fan": {(1, 0): "K"}},
    ),
    "everything kept everywhere": (
        {"K": 2, "C": 2, "P": 4, "R": 2},
        {"keep": ["WIO", "WIO", "WIO"], "capacity": [5, 16, np.inf]},
    ),
    "fan-out of windows": (
        {"K": 2, "P": 4, "R": 3, "dilation": (2, 1)},
        {"keep": ["W", "WIO", "WIO"], "fan": {(1, 0): "P", (1, 1): "R"}, "capacity": [3, 30, np.inf]},
    ),
    "input gradient of a product": (
        {"N": 4, "K": 3, "C": 4, "pass_": "input_grad"},
        {"keep": ["W", "IO", "WIO"], "fan": {(1, 0): "K"}, "capacity": [1, 9, np.inf]},
    ),
    "groups": ({"G": 2, "N": 2, "P": 4, "R": 3}, {"keep": ["O", "WI", "WIO"], "capacity": [4, 12, np.inf]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_front_is_that_of_all_mappings(case, x64):
    sizes, hardware = CASES[case]
    operation, space = make_operation(**sizes), make_space(**hardware)
    price, price_accesses = make_price(space)
    costs = brute_force(operation, space, price_accesses)
    expected = costs[:, undominated_slowly(costs)]
    found = Enumerator(make_nest(operation), space).search(price)
    assert found.complete
    np.testing.assert_allclose(found.costs, expected[:, np.argsort(expected[0])], rtol=1e-9)


def undominated_slowly(costs):
    """The Pareto set of (2, n), one of equal points."""
    best, chosen = np.inf, []
    for i in np.lexsort((costs[1].round(6), costs[0].round(6))):
        if costs[1, i] < best * (1 - 1e-9):
            best = costs[1, i]
            chosen.append(i)
    return chosen


@pytest.mark.parametrize("objective", [0, 1, "edp"])
def test_the_k_cheapest_are_those_of_all_mappings(objective, x64):
    """Without repeats: equal costs of different loop orders count once, so distinct costs are compared."""
    sizes, hardware = CASES["window"]
    operation, space = make_operation(**sizes), make_space(**hardware)
    price, price_accesses = make_price(space)

    def choose(costs):
        return costs.prod(axis=0)[None] if objective == "edp" else costs[objective][None]

    expected = np.sort(choose(brute_force(operation, space, price_accesses))[0])
    found = Enumerator(make_nest(operation), space, num_best=5).search(lambda counts: choose(price(counts)))
    assert found.costs.shape == (1, 5) and len(np.unique(found.origin, axis=0)) == 5
    assert np.all(np.diff(found.costs[0]) >= 0)
    # Different factors may cost the same; each found cost is among those of all mappings, and none was jumped over.
    assert found.costs[0, 0] == pytest.approx(expected[0])
    distinct = expected[np.concatenate([[True], np.diff(expected) > 1e-9 * expected[1:]])]
    places = np.searchsorted(distinct, found.costs[0] * (1 - 1e-9))
    np.testing.assert_allclose(distinct[places], found.costs[0], rtol=1e-9)
    assert set(range(places[-1])) <= set(places)


LAYERS = {
    "strided window": {"K": 64, "C": 3, "P": 112, "Q": 112, "R": 7, "S": 7, "stride": (2, 2)},
    "window": {"K": 256, "C": 256, "P": 14, "Q": 14, "R": 3, "S": 3},
    "product": {"N": 128, "K": 768, "C": 3072},
    "tall": {"K": 48, "C": 32, "P": 30, "Q": 10, "R": 1, "S": 5, "stride": (1, 2)},
}


@pytest.mark.parametrize("layer", LAYERS)
def test_costs_are_those_of_the_counted_mappings(layer, x64):
    operation, space = make_operation(**LAYERS[layer]), make_space(**GEMMINI, fanout=16)
    space.capacity[:] = [1, 512, 2**17, np.inf]
    price, price_accesses = make_price(space)
    enumerator = Enumerator(make_nest(operation), space)
    found = enumerator.search(price)
    temporal, spatial, order = map(np.stack, zip(*(enumerator.mapping(o) for o in found.origin), strict=True))
    for t, s, o in zip(temporal, spatial, order, strict=True):
        make_mapping(operation, t, s, o, space.keep)  # raises if it does not cover the operation
    accesses = count_mappings(operation, temporal, spatial, order, space.keep)
    np.testing.assert_allclose(price_accesses(accesses), found.costs, rtol=1e-9)
    assert (accesses.footprint.sum(axis=-1) <= space.capacity).all()


def test_no_random_mapping_of_a_real_layer_beats_the_front(x64):
    operation, space = make_operation(**LAYERS["window"]), make_space(**GEMMINI, fanout=16)
    space.capacity[:] = [1, 512, 2**17, np.inf]
    price, price_accesses = make_price(space)
    front = Enumerator(make_nest(operation), space).search(price).costs
    rng, n = np.random.default_rng(0), 4096
    temporal, spatial = np.ones((n, 4, 8)), np.ones((n, 4, 2, 8))
    for d, bound in enumerate(int(b) for b in operation.bounds):
        places = [(l, None) for l in range(4) if space.temporal[l, d]]
        places += [(l, a) for l in range(4) for a in range(2) if space.spatial[l, a, d]]
        splits = factorisations(bound, len(places))
        for (l, a), column in zip(places, splits[rng.integers(len(splits), size=n)].T, strict=True):
            (temporal[:, l] if a is None else spatial[:, l, a])[:, d] = column
    order = np.argsort(rng.random((n, 4, 8)), axis=-1)
    accesses = count_mappings(operation, temporal, spatial, order, space.keep)
    fits = (accesses.footprint.sum(axis=-1) <= space.capacity).all(axis=-1)
    fits &= (spatial.prod(axis=-1) <= space.fanout).all(axis=(1, 2))
    assert fits.sum() > 50
    costs = price_accesses(accesses)[:, fits]
    assert ((front[:, :, None] <= costs[:, None] * (1 + 1e-9)).all(axis=0)).any(axis=0).all()


def test_a_search_may_be_narrowed_and_go_on_from_what_is_known():
    operation, space = make_operation(**LAYERS["window"]), make_space(**GEMMINI, fanout=16)
    space.capacity[:] = [1, 512, 2**17, np.inf]
    price, _ = make_price(space)
    enumerator = Enumerator(make_nest(operation), space)
    narrow = Limits(np.array([1, 64, 2**13, np.inf]), np.array([[1, 1], [1, 8], [8, 1], [1, 1]], float))
    known = enumerator.search(price)
    found = enumerator.search(price, narrow, known)
    afresh = make_space(**GEMMINI, fanout=8)
    afresh.capacity[:] = narrow.capacity
    np.testing.assert_allclose(found.costs, Enumerator(make_nest(operation), afresh).search(price).costs)
    assert (found.costs.min(axis=1) >= known.costs.min(axis=1)).all() and (found.costs[0, 0] > known.costs[0, 0])


@pytest.fixture(scope="module")
def strided():
    """An enumerator of a strided window, a price, and all of its front."""
    operation, space = make_operation(**LAYERS["strided window"]), make_space(**GEMMINI, fanout=16)
    space.capacity[:] = [1, 512, 2**17, np.inf]
    price, _ = make_price(space)
    enumerator = Enumerator(make_nest(operation), space)
    return enumerator, price, enumerator.search(price)


def interrupting(price, calls):
    """A price during whose call of that number Ctrl-C is pressed."""
    left = iter(range(calls, -1, -1))

    def priced(counts):
        if next(left, 1) == 0:
            raise KeyboardInterrupt
        return price(counts)

    return priced


@pytest.mark.parametrize("limit", ["time", "evaluations", "interrupt"])
def test_a_search_that_is_ended_has_a_mapping_and_tells_what_it_left_open(limit, strided):
    enumerator, price, best = strided
    if limit == "time":
        hurried = enumerator.search(price, deadline=0.0)
    elif limit == "evaluations":
        hurried = enumerator.search(price, evaluations=best.evaluations // 20)
        assert hurried.evaluations < best.evaluations / 2
    else:
        hurried = enumerator.search(interrupting(price, 150))
    assert not hurried.complete and best.complete and hurried.costs.shape[1]
    everything = np.concatenate([hurried.costs, hurried.open_costs], axis=1)
    assert ((everything[:, :, None] <= best.costs[:, None]).all(axis=0)).any(axis=0).all()


def test_an_interrupt_goes_on_to_a_caller_that_asks_for_it_or_where_nothing_was_found(strided):
    enumerator, price, _ = strided
    with pytest.raises(KeyboardInterrupt):
        enumerator.search(interrupting(price, 150), keep_on_interrupt=False)
    with pytest.raises(KeyboardInterrupt):
        enumerator.search(interrupting(price, 0))


def test_undominated_against_its_definition():
    points = np.random.default_rng(1).integers(0, 5, (3, 200)).astype(float)
    for times in (1, 3):
        expected = []
        for j in range(200):
            ahead = [
                i for i in range(200)
                if (points[:, i] <= points[:, j]).all() and ((points[:, i] < points[:, j]).any() or i < j)
            ]  # fmt: skip
            if len(ahead) < times:
                expected.append(j)
        assert undominated(points, times).tolist() == expected


def test_factorisations_are_all_and_distinct():
    splits = factorisations(360, 4)
    assert (splits.prod(axis=1) == 360).all() and len(np.unique(splits, axis=0)) == len(splits)
    assert len(splits) == 20 * 10 * 4  # 2**3, 3**2 and 5 over four places: C(6,3) C(5,3) C(4,3)


def test_what_cannot_be_searched_is_refused():
    space = make_space(**GEMMINI)
    price, _ = make_price(space)
    with pytest.raises(ValueError, match="transposed"):
        Enumerator(make_nest(make_operation(P=4, R=3, pass_="input_grad")), space)
    space.capacity[2] = 1
    with pytest.raises(ValueError, match="level 2 holds 1 and the smallest tiles take 2"):
        Enumerator(make_nest(make_operation(K=4, C=4)), space).search(price)


REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "timeloop" / "points.jsonl"
KEEP = {"gemmini": ["W", "O", "WI", "WIO"], "eyeriss": ["WIO", "WIO", "WIO"]}
FAST = [{"R": 3, "P": 28, "C": 64}, {"R": 1, "P": 7, "C": 512}]
"""Layers that are enumerated in a second; the rest takes up to ten. Local search does them all: test_search_references."""


def reference_points():
    """One of every chip and layer."""
    chosen = {}
    for point in map(json.loads, REFERENCE.read_text().splitlines()):
        dims, kind = point["dims"], point["arch"]["kind"]
        is_fast = any(layer.items() <= dims.items() for layer in FAST) and "K" in dims
        if point["set"] == "layers" and is_fast and (kind == "gemmini" or dims["R"] == 1):
            chosen.setdefault((kind, *dims.values()), point)
    return list(chosen.values())


@pytest.mark.skipif(not REFERENCE.exists(), reason="no ../shared/reference beside the repository")
def test_no_mapping_that_timeloop_scored_takes_less_energy():
    """Gemmini- and Eyeriss-like chips, every loop free to fan out along both axes; Timeloop's energies, as it printed them."""
    points = reference_points()
    assert {p["arch"]["kind"] for p in points} == set(KEEP) and len(points) > 3
    for point in points:
        levels, dims = point["arch"]["levels"], point["dims"]
        space = make_space(KEEP[point["arch"]["kind"]], capacity=[level["entries"] or np.inf for level in levels])
        space.fanout[:] = [level["fanout_below"] for level in levels]
        space.spatial[space.fanout > 1] = True
        operation = make_operation(**dims, stride=(point["stride"],) * 2, dilation=(point["dilation"],) * 2)

        def energy(counts, levels=levels, macs=operation.macs, mac=point["arch"]["mac"]["energy"]):
            words = sum(level["access_energy"] * counts.accesses(l) for l, level in enumerate(levels))
            return 1e-6 * (words + float(macs) * mac)[None]

        found = Enumerator(make_nest(operation), space).search(energy)
        assert found.complete and found.costs[0, 0] <= point["result"]["energy_total_uJ"] + 0.005
