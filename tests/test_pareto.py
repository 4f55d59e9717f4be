"""Fronts, hypervolumes and knees, worked out by hand or by counting grid cells."""

import numpy as np
import pytest

from codesign.pareto import hypervolume, knee, non_dominated


def test_front_by_hand():
    points = [(1, 5), (2, 3), (2, 4), (4, 1), (5, 1), (3, 3)]
    # (2, 4) and (3, 3) lose to (2, 3), (5, 1) to (4, 1).
    assert non_dominated(points).tolist() == [True, True, False, True, False, False]


def test_equal_points_stay_together_and_one_objective_has_one_minimum():
    assert non_dominated([(1, 2), (1, 2), (0, 3)]).tolist() == [True, True, True]
    assert non_dominated([[3], [1], [2]]).tolist() == [False, True, False]
    assert non_dominated(np.zeros((0, 2))).tolist() == []


def test_area_by_hand():
    # Steps up to the corner (6, 6): x from 1 to 2: 1, from 2 to 4: 3, from 4 to 6: 5 high: 1*1 + 2*3 + 2*5 = 17.
    points = [(1, 5), (2, 3), (4, 1)]
    assert hypervolume(points, (6, 6)) == 17.0
    assert hypervolume([*points, (2, 4), (9, 0), (6, 0)], (6, 6)) == 17.0  # dominated or outside: nothing more
    assert hypervolume([(7, 7)], (6, 6)) == 0.0


def test_volume_by_hand():
    # Two boxes 2 x 1 x 3 and 1 x 3 x 3 that share 1 x 1 x 3.
    assert hypervolume([(1, 2, 0), (2, 0, 0)], (3, 3, 3)) == 6 + 9 - 3


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_counts_the_dominated_grid_cells(objectives):
    rng = np.random.default_rng(objectives)
    points = rng.integers(0, 6, (12, objectives))
    cells = np.stack(np.meshgrid(*[np.arange(5)] * objectives, indexing="ij"), -1).reshape(-1, objectives)
    dominated = (points[None] <= cells[:, None]).all(-1).any(1).sum()  # cell [c, c + 1] lies above p where p <= c
    assert hypervolume(points, np.full(objectives, 5)) == dominated


def test_knee_by_hand():
    # Scaled sums of the front: 1, 0.1 + 0.2, 0.5 + 0.1, 1; the dominated (0, 11) does not stretch the scale.
    assert knee([(0, 11), (0, 10), (1, 2), (5, 1), (10, 0)]) == 2
    assert knee([(3, 3)]) == 0
    assert knee([(1, 7), (0, 7)]) == 1
    # Three objectives: (1, 1, 1) / 4 sums to 0.75, the corners to 1 (4 of 4 in one objective).
    assert knee([(4, 0, 0), (0, 4, 0), (0, 0, 4), (1, 1, 1)]) == 3


@pytest.mark.parametrize("points", [[1, 2], [[1, np.nan]], [[np.inf, 0]], np.zeros((3, 0))])
def test_what_is_no_table_of_numbers_is_refused(points):
    for function in (non_dominated, knee, lambda p: hypervolume(p, (1, 1))):
        with pytest.raises(ValueError, match="expected finite objectives"):
            function(points)


def test_other_misuse_is_refused():
    with pytest.raises(ValueError, match="reference with 2 objectives"):
        hypervolume([(1, 2)], (1, 2, 3))
    with pytest.raises(ValueError, match="at least one point"):
        knee(np.zeros((0, 2)))
