"""The front of a search for chips: what stays on it, what comes nearest, and what is dropped where it grows long."""

import numpy as np
import pytest

from codesign import chip_front
from codesign.chip_front import Front, Point
from codesign.chip_population import Goal, Priced

LIMITS = np.array([np.inf, np.inf, 10.0, np.inf, np.inf])  # of area
EDP = Goal(np.array([1.0, 1.0, 0.0]), LIMITS)
ENERGY = Goal(np.array([1.0, 0.0, 0.0]), LIMITS)


def take(front, rows, misfit=None):
    """Lets a front take chips of the given energy, latency and area; a design's only value is its place."""
    metrics = np.array([[*row, 1.0, 1.0] for row in rows], float)
    misfit = np.zeros(len(rows)) if misfit is None else np.array(misfit, float)
    priced = Priced(metrics, misfit, np.zeros(len(rows)), None)
    front.take(priced, lambda j: Point(np.array([j]), metrics[j], None, float(misfit[j]), 0.0))


def seen(front):
    return [tuple(point.metrics[:3]) for point in front.points]


def test_what_another_beats_does_not_stay():
    front = Front([EDP])
    take(front, [(4, 1, 5), (4, 2, 5), (1, 4, 5), (1, 1, 11), (4, 1, 5)])  # the last but one is too large
    assert sorted(seen(front)) == [(1, 4, 5), (4, 1, 5)]
    take(front, [(1, 3, 5), (3, 3, 4)])
    assert sorted(seen(front)) == [(1, 3, 5), (3, 3, 4), (4, 1, 5)]
    assert front.value == pytest.approx(3.0)
    assert tuple(front.best(ENERGY).metrics[:3]) == (1, 3, 5)
    assert [point.metrics[0] for point in front.ranked(EDP)] == [1, 4, 3]


def test_until_something_is_within_the_budgets_the_nearest_is_the_best():
    front = Front([EDP])
    assert front.best(EDP) is None and front.ranked(EDP) == [] and front.value == np.inf
    take(front, [(1, 1, 20), (1, 1, 15), (1, 1, 5)], misfit=[0, 0, 0.1])  # what does not fit lies behind all that does
    assert front.best(EDP).metrics[2] == 15 and front.ranked(EDP) == [front.best(EDP)] and front.value == np.inf
    take(front, [(1, 1, 16)])
    assert front.best(EDP).metrics[2] == 15
    take(front, [(9, 9, 9)])
    assert seen(front) == [(9, 9, 9)] and front.best(EDP).metrics[2] == 9


def test_a_long_front_keeps_its_ends_and_the_best_of_every_goal(monkeypatch):
    monkeypatch.setattr(chip_front, "_FRONT", 5)
    energies = np.arange(1.0, 21.0)
    latencies = 30.0 - energies
    latencies[12] = 2.0  # far below its neighbours
    front = Front([EDP, ENERGY])
    take(front, list(zip(energies, latencies, np.full(20, 1.0), strict=True)))
    assert len(front.points) <= 5
    assert {1.0, 13.0} <= {point.metrics[0] for point in front.points}  # 13 * 2 is the least product but that of 1 * 29
    assert front.best(EDP).metrics[0] == 13.0 and front.best(ENERGY).metrics[0] == 1.0
