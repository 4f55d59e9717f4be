"""Mappings: coverage, footprint of tiles, errors."""

import numpy as np
import pytest

from hw import LOOPS, count, make_mapping, make_operation, outermost_mapping

OPERATION = make_operation(K=100, C=3)


def factors(**by_loop):
    return [float(by_loop.get(name, 1)) for name in LOOPS]


def test_tiles_multiply_from_inside_out():
    mapping = make_mapping(
        OPERATION,
        temporal=[factors(C=3), factors(K=5), factors(K=2)],
        spatial=[[factors(), factors()], [factors(K=5), factors(K=2)], [factors(), factors()]],
    )
    np.testing.assert_array_equal(mapping.tiles()[:, [LOOPS.index("K"), LOOPS.index("C")]], [[1, 3], [50, 3], [100, 3]])
    assert mapping.num_levels == 3


def test_the_outermost_mapping_keeps_one_element_everywhere():
    accesses = count(OPERATION, outermost_mapping(OPERATION, 4))
    np.testing.assert_array_equal(accesses.footprint[:3], np.ones((3, 3)))
    np.testing.assert_array_equal(accesses.footprint[3], [300, 3, 100])
    assert accesses.compute_cycles == 300


def test_factors_may_exceed_the_bound():
    spatial = [[factors(K=16), factors()]]
    assert make_mapping(OPERATION, [factors(K=7, C=3)], spatial).temporal.shape == (1, 8)
    with pytest.raises(ValueError, match="cover its bound 100, got 96"):
        make_mapping(OPERATION, [factors(K=6, C=3)], spatial)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal": [factors(K=50, C=3)]}, "expected the factors of K to cover its bound 100, got 50"),
        ({"temporal": [factors(K=100, C=3, N=0.5)]}, "expected temporal factors >= 1, got 0.5"),
        ({"temporal": [factors(K=float("nan"), C=3)]}, "expected temporal factors >= 1"),
        ({"temporal": [[1.0] * 7]}, r"expected temporal of shape \(1, 8\), got \(1, 7\)"),
        ({"spatial": np.ones((2, 2, 8))}, r"expected spatial of shape \(1, 2, 8\)"),
        ({"order": [[0, 0, 1, 2, 3, 4, 5, 6]]}, "permutation"),
        ({"keep": [[1, 0, 1]]}, "outermost level"),
        ({"keep": [[1, 0.5, 1]]}, "keep of 0 and 1"),
    ],
)
def test_errors(change, message):
    arguments = {"temporal": [factors(K=100, C=3)]} | change
    with pytest.raises(ValueError, match=message):
        make_mapping(OPERATION, **arguments)
