"""Legalising, polishing and random chips: on the grain, never worse, inside the budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.baselines import random_chips
from codesign.config import Config, ModelConfig, SearchConfig, TrainConfig
from codesign.design import DEFAULT_VARIABLES, DesignSpace, physical_values
from codesign.evaluation import evaluate
from codesign.legalize import legal_chip, polish, preference
from codesign.problem import make_task
from hw.chip import make_chip
from nets.dataset_files import load_dataset

SEARCH = {"evaluations": 64, "num_best": 2}


@pytest.fixture(scope="module")
def problem():
    """Design space of the default chip, and a small training step at 8 bits: step, operation_bits, tensor_bits."""
    config = Config(
        model=ModelConfig("mlp"), train=TrainConfig(batch_size=64), search=SearchConfig(candidates=2, evaluations=64)
    )
    task, state = make_task(config, load_dataset("digits"))
    bits = state.precision.bits()
    return task.space, (task.workload.step, task.workload.operation_bits(bits), task.workload.tensor_bits(bits))


@pytest.fixture(scope="module")
def start(problem):
    """The base chip, evaluated."""
    space, work = problem
    return evaluate(legal_chip(space, space.initial()), *work, jax.random.key(0), **SEARCH)


def assert_on_grain(values):
    for name, variable in DEFAULT_VARIABLES.items():
        grains = values[name] / variable.grain
        assert abs(grains - round(grains)) < 1e-6 * grains, (name, values[name])
        assert variable.low <= values[name] <= variable.high, (name, values[name])


def test_legal_chip_is_exactly_on_its_grain():
    space = DesignSpace(make_chip(), DEFAULT_VARIABLES)
    for seed in range(20):
        design = space.random(jax.random.key(seed))
        legal = physical_values(legal_chip(space, design))
        assert_on_grain(legal)
        assert all(legal[name] == round(legal[name]) for name in ("rows", "columns", "local_kib", "shared_kib"))
        # It is the chip of the last iterate: there is nothing left to round.
        iterate = physical_values(space.chip(design))
        np.testing.assert_allclose(list(legal.values()), list(iterate.values()), rtol=1e-5)


def test_legal_chip_leaves_what_is_not_free():
    base = make_chip(rows=7, vdd=0.8125)
    space = DesignSpace(base, {name: DEFAULT_VARIABLES[name] for name in ("columns", "local_kib")})
    legal = physical_values(legal_chip(space, space.random(jax.random.key(0))))
    untouched = set(DEFAULT_VARIABLES) - {"columns", "local_kib"}
    assert {n: legal[n] for n in untouched} == {n: physical_values(base)[n] for n in untouched}


@pytest.mark.parametrize("area_share", [2.0, 0.7])
def test_polish_prefers_its_result_and_respects_budgets(problem, start, area_share):
    """Also from a chip that is too large: it first goes where the budget is exceeded least."""
    space, work = problem
    budgets = {"area": area_share * float(start.cost.area)}
    polished = polish(space, start, *work, budgets, jax.random.key(1), max_rounds=20, **SEARCH)
    assert preference(polished.cost, budgets) < preference(start.cost, budgets)
    assert float(polished.cost.area) <= budgets["area"]
    assert float(polished.cost.edp) < float(start.cost.edp)
    assert float(jnp.sum(polished.cost.violation)) == 0.0
    assert_on_grain(physical_values(polished.chip))
    assert polished.evaluations > start.evaluations


def test_polish_stops_where_no_neighbour_is_better(problem, start):
    space, work = problem
    nothing_free = DesignSpace(space.base, {})
    polished = polish(nothing_free, start, *work, {}, jax.random.key(1), **SEARCH)
    assert polished.chip is start.chip and polished.evaluations == start.evaluations


def test_preference_puts_budgets_and_misfits_before_edp(start):
    cost = start.cost
    area, edp = float(cost.area), float(cost.edp)
    assert preference(cost, {}) == preference(cost, {"area": area * 1.001}) == (0.0, edp)
    assert preference(cost, {"area": area / 1.5}) == pytest.approx((0.5, edp))
    latency = float(cost.latency)
    assert preference(cost, {"area": area / 1.5, "latency": latency / 1.25}) == pytest.approx((0.75, edp))


def test_random_chips_are_inside_the_area_budget_and_the_best_is_kept(problem, start):
    space, work = problem
    budgets = {"area": 0.5 * float(start.cost.area)}
    one, many = (
        random_chips(space, *work, budgets, jax.random.key(2), num, rounds=1, prices=start.prices, **SEARCH)
        for num in (1, 5)
    )
    for found in (one, many):
        assert float(found.chip.area().total) <= budgets["area"]
        assert_on_grain(physical_values(found.chip))
    assert preference(many.cost, budgets) <= preference(one.cost, budgets)
    assert many.evaluations == 5 * one.evaluations == 5 * 64 * len(work[1])


def test_random_chips_need_an_area_that_some_chip_has(problem):
    space, work = problem
    with pytest.raises(ValueError, match=r"none of 200 draws has at most 0.001 mm2; raise the area budget"):
        random_chips(space, *work, {"area": 1e-9}, jax.random.key(0), 2, **SEARCH)
