"""The random control: its draws cover the operation and fit, and are costed as the search costs them."""

import numpy as np
import pytest

from codesign.enumeration import Enumerator
from codesign.mapspace import Nest
from codesign.random_mappings import draw, fitting, prime_factors, sample
from experiments.gemmini import DEFAULT, Gemmini
from hw.mapping import make_mapping
from hw.operation import make_operation

NEST = Nest((1, 2, 24, 12, 14, 10, 3, 2), (2, 1), (1, 2))
OPERATION = {"N": 2, "K": 24, "C": 12, "P": 14, "Q": 10, "R": 3, "S": 2, "stride": (2, 1), "dilation": (1, 2)}


@pytest.mark.parametrize("widest", [False, True])
def test_draws_cover_the_operation(widest):
    family = Gemmini()
    limits = family.limits(DEFAULT, DEFAULT)
    draws = draw(NEST, family.space, limits, np.random.default_rng(0), 50, widest)
    for temporal, spatial, order in zip(*draws, strict=True):
        make_mapping(make_operation(**OPERATION), temporal, spatial, order, family.space.keep)
        assert (temporal.prod(axis=0) * spatial.prod(axis=(0, 1))).tolist() == list(NEST.bounds)
        assert not widest or (spatial[1, 1, 3], spatial[2, 0, 2]) == (12, 12)


def test_every_place_is_as_likely():
    family = Gemmini()
    nest = Nest((1, 1, 1, 2, 1, 1, 1, 1), (1, 1), (1, 1))
    draws = draw(nest, family.space, family.limits(DEFAULT, DEFAULT), np.random.default_rng(0), 8000, False)
    shares = np.concatenate([(draws.temporal[:, 1:, 3] == 2), (draws.spatial[:, 1, 1, 3] == 2)[:, None]], axis=1)
    np.testing.assert_allclose(shares.mean(axis=0), 0.25, atol=0.02)  # four standard deviations


def test_samples_fit_and_none_beats_the_front():
    family = Gemmini()
    limits, price = family.limits(DEFAULT, DEFAULT), family.price(DEFAULT, DEFAULT, NEST)
    limits.capacity[1:3] = 60, 4000
    sampled = sample(NEST, family.space, price, limits, np.random.default_rng(0), 300)
    assert sampled.costs.shape == (2, 300) and sampled.drawn > 300
    assert len(fitting(NEST, family.space, limits, sampled.draws)) == 300
    front = Enumerator(NEST, family.space).search(price, limits).costs
    ahead = (front[:, :, None] <= sampled.costs[:, None] * (1 + 1e-12)).all(axis=0)
    assert ahead.any(axis=0).all()


def test_what_fits_is_what_the_counted_tiles_say():
    family = Gemmini()
    limits = family.limits((4, 1, 1), (4, 1, 1))
    seen = []

    def price(counts):
        seen.append(
            (counts.tile(1, 2), counts.tile(2, 0) + counts.tile(2, 1), counts.fan_out(1, 1), counts.fan_out(2, 0))
        )
        return counts.cycles[None]

    sample(NEST, family.space, price, limits, np.random.default_rng(0), 1000)
    outputs, scratchpad, rows, columns = seen[0]
    assert (outputs <= 64).all() and (scratchpad <= 1024).all() and (rows <= 4).all() and (columns <= 4).all()
    assert outputs.max() > 32 and scratchpad.max() > 512


def test_a_chip_that_nothing_fits_gives_no_samples():
    family = Gemmini()
    limits, price = family.limits(DEFAULT, DEFAULT), family.price(DEFAULT, DEFAULT, NEST)
    limits.capacity[2] = 1
    sampled = sample(NEST, family.space, price, limits, np.random.default_rng(0), 10, most=4096)
    assert sampled.costs.shape == (2, 0) and sampled.drawn == 4096


def test_prime_factors():
    assert [int(np.prod(prime_factors(n))) for n in range(1, 200)] == list(range(1, 200))
    assert all(len(prime_factors(f)) == 1 for n in range(2, 200) for f in prime_factors(n))
