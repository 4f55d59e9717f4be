"""The search for chips against trying every chip, and the combination of operations against trying every combination."""

import itertools
import time

import numpy as np
import pytest

from codesign.family_search import FamilySearch
from codesign.lagrangian import least_product, lower_hull
from codesign.mapspace import Nest
from experiments.gemmini import Gemmini

PRODUCT = Nest((1, 1, 8, 12, 6, 1, 1, 1), (1, 1), (1, 1))
WINDOW = Nest((1, 1, 64, 32, 28, 28, 3, 3), (1, 1), (1, 1))
WIDE = Nest((1, 1, 256, 64, 28, 28, 1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize("powers", [(1.0, 1.0), (1.0, 2.0)])
def test_the_least_product_is_that_of_all_combinations(powers):
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = [rng.uniform(1.0, 9.0, (2, n)) for n in (5, 1, 7, 4)]
        counts = rng.integers(1, 4, 4)
        best = np.inf
        for picks in itertools.product(*(range(c.shape[1]) for c in costs)):
            energy, latency = sum(n * c[:, i] for n, c, i in zip(counts, costs, picks, strict=True))
            best = min(best, energy ** powers[0] * latency ** powers[1])
        choice = least_product(costs, counts, powers)
        assert choice.value == pytest.approx(best)
        energy, latency = sum(n * c[:, i] for n, c, i in zip(counts, costs, choice.picks, strict=True))
        assert (choice.energy, choice.latency) == (pytest.approx(energy), pytest.approx(latency))


def test_no_point_lies_below_the_hull():
    costs = np.random.default_rng(1).uniform(1.0, 9.0, (2, 50))
    hull = lower_hull(costs)
    for price in np.geomspace(0.01, 100.0, 200):
        weighed = costs[0] + price * costs[1]
        assert weighed.min() == pytest.approx(weighed[hull].min())


def test_an_operation_without_mappings_is_an_error():
    with pytest.raises(ValueError, match="expected mappings of every operation"):
        least_product([np.ones((2, 1)), np.empty((2, 0))])


def every_chip(low, high):
    return itertools.product(*(range(a, b + 1) for a, b in zip(low, high, strict=True)))


@pytest.mark.parametrize(
    ("nests", "counts", "area"), [((PRODUCT, WINDOW), (3, 1), np.inf), ((WINDOW, WIDE), (1, 2), 0.028)]
)
def test_the_best_chip_is_the_best_of_all_chips(nests, counts, area):
    low, high = (2, 1, 1), (5, 6, 4)
    family = Gemmini(low=low, high=high)
    every, values = FamilySearch(family, nests, counts), {}
    for chip in every_chip(low, high):
        if family.area(chip) <= area:
            try:
                design, bound = every.map_chip(chip)
            except ValueError:  # a layer may fit no mapping on the smallest
                continue
            assert bound == pytest.approx(design.choice.value)
            values[chip] = design.choice.value
    assert len(values) > 20
    found = FamilySearch(family, nests, counts).search(area=area)
    assert found.design.choice.value == pytest.approx(min(values.values()), rel=1e-12)
    assert values[found.design.chip] == pytest.approx(found.design.choice.value, rel=1e-12)
    assert found.bound == pytest.approx(found.design.choice.value, rel=1e-12)


def test_a_search_that_stops_early_has_a_bound_below_the_best():
    family = Gemmini()
    begun = time.process_time()
    hurried = FamilySearch(family, (WINDOW, WIDE), (1, 2)).search(area=0.2, deadline=begun)
    best = FamilySearch(family, (WINDOW, WIDE), (1, 2)).search(area=0.2)
    assert hurried.bound <= best.design.choice.value <= hurried.design.choice.value
    assert best.bound == pytest.approx(best.design.choice.value)
    bounds = [p.bound for p in best.history]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(bounds))


def test_an_interrupt_returns_the_best_so_far_and_a_bound(monkeypatch):
    best = FamilySearch(Gemmini(), (WINDOW, WIDE), (1, 2)).search(area=0.2)
    search, visit, visits = FamilySearch(Gemmini(), (WINDOW, WIDE), (1, 2)), FamilySearch._visit, iter(range(24))

    def interrupted(*arguments):
        if next(visits, None) is None:
            raise KeyboardInterrupt
        return visit(search, *arguments)

    monkeypatch.setattr(search, "_visit", interrupted)
    found = search.search(area=0.2)
    assert found.bound <= best.design.choice.value <= found.design.choice.value
    assert found.bound < found.design.choice.value


def test_more_area_is_never_worse():
    values = [FamilySearch(Gemmini(), (WINDOW,), (1,)).search(area=a).design.choice.value for a in (0.05, 0.1, 0.4)]
    assert values[0] > values[1] > values[2]


def test_a_budget_below_the_smallest_chip_is_refused():
    with pytest.raises(ValueError, match="raise the budget"):
        FamilySearch(Gemmini(), (PRODUCT,), (1,)).search(area=1e-3)


def test_a_search_is_never_worse_than_its_start():
    chips, start = FamilySearch(Gemmini(), (WINDOW, WIDE), (1, 2)), (16, 128, 32)
    before, _ = chips.map_chip(start)
    found = chips.search(area=chips.family.area(start), deadline=0.0, start=start)
    assert found.design.choice.value <= before.choice.value
    assert found.history[0].value == before.choice.value
