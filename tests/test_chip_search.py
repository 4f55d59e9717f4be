"""The chip search: bounds below every chip of a box, cuts that lose none, the optimum of small spaces, budgets, endings."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from codesign import cli, rundir
from codesign.branching import OpenBoxes
from codesign.chip_boxes import Box, bound_boxes, every_hierarchy, halves, hierarchy, whole_space
from codesign.chip_population import METRICS, Goal, changed, follow_slopes, inside, on_grains, price_population
from codesign.chip_report import make_space, make_work
from codesign.chip_search import OBJECTIVES, SLOPED, ChipSearch, Plan, UnmetBudgetError, check_budgets
from codesign.design import SEARCHED_VARIABLES, DesignSpace, Variable, physical_values, with_values
from codesign.inspection import model_workload
from codesign.pareto import non_dominated
from codesign.summary import chip_values, read_bits, read_mapping
from experiments import table_chips
from hw.accesses import count
from hw.chip import make_chip
from hw.chips import CHIPS
from hw.schedule import evaluate_step

PLAN = Plan(evaluations=176, searched=2, boxes=1)
LAYER = {
    "id": 0,
    "operator_type": "Gemm",
    "equation": "O[b][k]+=W[k][c]*I[b][c]",
    "dimension_relations": [],
    "loop_dims": ["B", "K", "C"],
    "loop_sizes": [1, 32, 48],
    "operand_precision": {"W": 8, "I": 8, "O": 16, "O_final": 8},
    "operand_source": {"I": 0, "W": 0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network of one matrix product: two operations in training."""
    path = tmp_path_factory.mktemp("model") / "product.yaml"
    path.write_text(yaml.safe_dump([LAYER]))
    return str(path)


@pytest.fixture(scope="module")
def work(model):
    return make_work(model_workload(model, "digits", 16), "training_step", jnp.full((1, 4), 8.0))


@pytest.fixture(scope="module")
def space():
    return make_space(CHIPS["edge_trainer"](), None)


@pytest.fixture(scope="module")
def area(space):
    return float(space.base.area().total)


@pytest.fixture(scope="module")
def searched(space, work, area):
    """A search of a few rounds, and what it found."""
    search = ChipSearch(space, work, {"area": area}, plan=PLAN)
    return search, search.search(PLAN.effort(6))


@jax.jit
def counted_cost(chip, step, mapping, operation_bits, tensor_bits):
    """A step under mappings (n, ...), which are counted anew."""
    accesses = jax.vmap(count)(step.operations, mapping)
    return evaluate_step(chip, step, accesses, operation_bits, tensor_bits, jnp.ones((len(operation_bits), 2)))


def effort(rounds):
    return PLAN.effort(rounds)


def test_open_boxes_come_least_bound_first_and_closed_ones_are_not_forgotten():
    boxes = OpenBoxes[str](tolerance=0.1)
    for bound, name in ((3.0, "c"), (1.0, "a"), (2.0, "b")):
        boxes.add(bound, name, best=10.0)
    boxes.add(9.5, "hopeless", best=10.0)
    assert (len(boxes), boxes.bound) == (3, 1.0)
    assert [boxes.pop() for _ in range(3)] == [(1.0, "a"), (2.0, "b"), (3.0, "c")]
    assert not boxes and boxes.bound == 9.5 and boxes.is_done(10.0)


def test_cuts_lose_no_chip():
    variables = {
        "rows": Variable(2, 9, 1),
        "vdd": Variable(0.5, 0.8, 0.1, logarithmic=False),
        "slice_bits": Variable(1, 2, 1),
    }
    variables |= {"local_kib": Variable(2, 3, 1, optional=True), "local_banks": Variable(1, 2, 1)}
    space = DesignSpace(make_chip(), variables)
    every = itertools.product(range(2, 10), (0.5, 0.6, 0.7, 0.8), (1, 2), (0, 2, 3), (1, 2))
    # A local SRAM that is not there has no banks.
    chips = np.array([chip for chip in every if chip[3] or chip[4] == 1], float)

    def held(box):
        return ((chips >= box.low - 1e-9) & (chips <= box.high + 1e-9)).all(axis=1)

    whole = whole_space(space)
    assert (np.sum([held(box) for box in whole], axis=0) == 1).all()
    leaves, todo = 0, list(whole)
    while todo:
        box = todo.pop()
        cuts = list(halves(space, box))
        for one, other in cuts:
            np.testing.assert_array_equal(held(one) ^ held(other), held(box))
        todo += cuts[0] if cuts else ()
        leaves += not cuts
    assert leaves == len(chips)


def test_no_chip_of_a_box_costs_less_than_its_bound(searched, space):
    """Designs that the search priced, and others of all hierarchies, in boxes drawn around each; a box of one chip among
    them."""
    search, found = searched
    rng, work = np.random.default_rng(0), search.work
    # As many as the search prices and bounds at once, so that nothing more is compiled.
    front = np.array([point.values for point in found.front])[:16]
    drawn = [inside(space, box, 4, rng) for box in whole_space(space)[3::4]]
    chips = np.concatenate([front, *drawn])[:48]
    assert set(hierarchy(space, chips)) == {0, 1, 2, 3}
    population = np.concatenate([chips, chips[: PLAN.population - 48]])
    priced = price_population(space.base, search.names, *search._known(population), jnp.ones(2))
    metrics, fits = np.asarray(priced.metrics)[:48], np.asarray(priced.misfit)[:48] == 0
    assert all(fits[hierarchy(space, chips) == which].any() for which in range(4))
    low, high = (np.array([getattr(v, end) for v in space.variables.values()]) for end in ("low", "high"))
    for width in (0.0, 0.3, 1.0):
        lower, upper = (
            np.where(chips > 0, chips + width * rng.random(chips.shape) * (end - chips), 0.0) for end in (low, high)
        )
        lower[:, -1] = upper[:, -1] = chips[:, -1]  # a box has one width of slices
        boxes = [Box(*ends) for ends in zip(lower, upper, strict=True)]
        parts = np.concatenate([np.stack(bound_boxes(space, boxes[i : i + 24], work), axis=-1) for i in (0, 24)])
        # Bounds of some part of the supplies lie below the chip, in all metrics at once; under budgets that it meets, too.
        budgets = np.quantile(metrics[fits], 0.8, axis=0)
        meets = fits & (metrics <= budgets).all(axis=1)
        assert meets.sum() > 3
        for limits, chosen in ((np.full(5, np.inf), fits), (budgets, meets)):
            held = Goal(np.ones(3), limits).held(parts)
            below = (held <= metrics[:, None] * (1 + 1e-5)).all(axis=-1).any(axis=-1)
            assert below[chosen].all(), width


def test_a_box_of_one_chip_has_the_area_of_that_chip(space, work):
    values = np.array([12, 20, 48, 24, 136, 640, 256, 0.8, 0.5, 8, 2, 4], float)
    assert list(space.variables) == list(SEARCHED_VARIABLES)
    chip = with_values(space.base, {n: jnp.asarray(v) for n, v in zip(space.variables, values, strict=True)})
    bounds = bound_boxes(space, [Box(values, values)], work)
    assert bounds.area[0, 0] == pytest.approx(float(chip.area().total), rel=1e-5)
    assert bounds.power[0, 0] == pytest.approx(float(chip.leakage_power()), rel=1e-5)
    assert bounds.sram[0, 0] == (24 + 136) * 8192


def test_a_search_keeps_its_promises(searched, area):
    search, found = searched
    metrics = np.array([point.metrics for point in found.front])
    assert len(metrics) > 3 and non_dominated(metrics[:, :3]).all()
    assert (metrics[:, METRICS.index("area")] <= area * (1 + 1e-6)).all()
    values = search.goal.values(metrics)
    assert (
        found.value == values.min() == search.goal.values(found.best.metrics) < search.goal.values(found.base.metrics)
    )
    assert found.bound <= found.value
    steps = np.array(found.history)
    assert (np.diff(steps[:, 2]) <= 0).all() and (np.diff(steps[:, 3]) >= -1e-6 * steps[0, 3]).all()
    for point in found.front:
        np.testing.assert_array_equal(on_grains(search.space, point.values), point.values)


def test_a_design_costs_what_is_said(searched, work):
    """Its mappings counted anew and priced on its chip."""
    search, found = searched
    mapping = jax.tree.map(lambda x: x[:, 0], found.best.mappings.mapping)
    cost = counted_cost(search.chip(found.best), work.step, mapping, work.operation_bits, work.tensor_bits)
    assert float(cost.violation.sum()) == 0.0
    np.testing.assert_allclose(found.best.metrics[:4], [cost.energy, cost.latency, cost.area, cost.power], rtol=1e-5)


def test_a_small_space_is_searched_to_its_best_chip(space, work):
    """All 48 chips, without registers or local SRAM or with both, each with mappings of its own, against a search of them."""
    free = {
        "rows": Variable(4, 16, 4),
        "register_bytes": Variable(32, 32, 4, optional=True),
        "local_kib": Variable(16, 24, 8, optional=True),
        "vdd": Variable(0.6, 0.7, 0.1, logarithmic=False),
    }
    values = physical_values(space.base) | {"rows": 8.0, "local_kib": 16.0, "vdd": 0.7}
    fixed = {n: dataclasses.replace(v, low=values[n], high=values[n]) for n, v in space.variables.items()}
    start = with_values(space.base, {n: jnp.asarray(values[n]) for n in free})
    small = DesignSpace(start, fixed | free)
    found = ChipSearch(small, work, {}, plan=PLAN, seed=1).search(effort(8))
    every = np.tile([values[n] for n in small.variables], (48, 1))
    columns = [list(small.variables).index(n) for n in free]
    every[:, columns] = list(itertools.product((4, 8, 12, 16), (0, 32), (0, 16, 24), (0.6, 0.7)))
    all_ = ChipSearch(small, work, {}, plan=dataclasses.replace(PLAN, searched=49), seed=2)
    all_.start()
    all_.try_chips(np.concatenate([every, every[:16]]), all_.goal)
    exhaustive = all_.found()
    assert exhaustive.evaluations >= 48 * PLAN.evaluations * 2
    assert found.value == pytest.approx(exhaustive.value, rel=0.02)


def test_slopes_lead_where_the_goal_lies(searched, space):
    """Least energy at a low supply, least latency at a high one, and not beyond a limit."""
    search, found = searched
    values = np.tile(found.base.values, (PLAN.population - 2 * (PLAN.population // 3), 1))
    limits = tuple(jnp.asarray(end, jnp.float32) for end in (space.column("low"), space.column("high")))
    known, vdd = search._known(values), search.names.index("vdd")

    def moved(powers, budgets=None):
        goal = Goal(jnp.array(powers), jnp.array([(budgets or {}).get(name, jnp.inf) for name in METRICS]))
        prices = jnp.tile(
            jnp.array([powers[0] / found.base.metrics[0], powers[1] / found.base.metrics[1]]), (len(values), 1)
        )
        after = follow_slopes(space.base, search.names, SLOPED, *known[:2], limits, *known[2:], prices, goal)
        return float(after[0, vdd])

    start = found.base.values[vdd]
    assert moved((1.0, 1e-6, 0.0)) < start - 0.05
    assert moved((1e-6, 1.0, 0.0)) > start + 0.05
    slow = found.base.metrics[METRICS.index("latency")]
    assert moved((1.0, 1e-6, 0.0), {"latency": slow}) > start - 0.05


def test_changes_stay_on_grains_and_inside(space):
    rng = np.random.default_rng(0)
    parents = inside(space, whole_space(space)[0], 5, rng)
    children = changed(space, parents, 200, rng)
    np.testing.assert_array_equal(on_grains(space, children), children)
    assert (children != parents[0]).any(axis=0).all()
    assert set(hierarchy(space, children)) >= {0, 1, 2}


def test_a_chip_and_what_is_left_of_it_without_some_of_its_memories(space):
    values = physical_values(space.base)
    chips = every_hierarchy(space, np.array([values[name] for name in space.variables]))
    np.testing.assert_array_equal(hierarchy(space, chips), range(4))
    left = [{n: float(v) for n, v in zip(space.variables, chip, strict=True)} for chip in chips]
    assert left[0] == values
    assert left[2] == values | {"local_kib": 0.0, "local_bandwidth_bits": 32.0, "local_banks": 1.0}
    assert left[3] == left[2] | {"register_bytes": 0.0}
    assert {hierarchy(space, np.stack(box))[0] for box in whole_space(space)} == {0, 1, 2, 3}


def test_levels_alone_may_be_free():
    space = make_space(CHIPS["edge_trainer"](), ("levels", "rows"))
    assert {name: (v.low, v.high, v.optional) for name, v in space.variables.items()} == {
        "rows": (2, 64, False),
        "register_bytes": (32, 32, True),
        "local_kib": (32, 32, True),
    }
    assert not any(v.optional for v in make_space(space.base, ("local_kib", "rows")).variables.values())


def test_a_budget_below_every_bound_is_refused_at_once(space, work):
    with pytest.raises(UnmetBudgetError) as caught:
        ChipSearch(space, work, {"area": 1e-9}, plan=PLAN)
    assert caught.value.is_proven and caught.value.metric == "area" and caught.value.nearest > 1e-9
    with pytest.raises(UnmetBudgetError, match="sram"):
        ChipSearch(space, work, {"sram": 8192.0}, plan=PLAN)


def test_limits_of_power_and_latency_raise_each_others_bounds():
    """3 J in 1 s, 1 W of them leakage: 2 J of work. Under 2 W there is 1 W for it: 2 s, and 2 J of leakage. In 4 s: 0.5 W."""
    limits = np.array([np.inf, 4.0, np.inf, 2.0, np.inf])
    bounds = np.array([[3.0, 1.0, 5.0, 1.0, 7.0], [12.0, 2.0, 5.0, 3.0, 7.0]])
    held = Goal(np.ones(3), limits).held(bounds)
    np.testing.assert_allclose(held[0], [4.0, 2.0, 5.0, 1.5, 7.0])
    assert held[1, 1] == np.inf and held[1, 3] == 4.5  # leaks more than it may
    unlimited = Goal(np.ones(3), np.full(5, np.inf)).held(bounds)
    np.testing.assert_allclose(unlimited, bounds)


def test_budgets_that_only_together_cannot_be_met_name_the_nearest(space, work):
    """Each can be met alone; with the budget raised to what was said, both can as far as bounds tell."""
    bounds = bound_boxes(space, whole_space(space), work)
    budgets = {"latency": 1.2 * bounds.latency.min(), "power": 1.2 * bounds.power.min()}
    for name, limit in budgets.items():
        ChipSearch(space, work, {name: limit}, plan=PLAN)
    with pytest.raises(UnmetBudgetError) as caught:
        ChipSearch(space, work, budgets, plan=PLAN)
    assert caught.value.is_proven and caught.value.nearest > budgets[caught.value.metric]
    ChipSearch(space, work, budgets | {caught.value.metric: 1.001 * caught.value.nearest}, plan=PLAN)


def test_a_budget_that_nothing_found_meets_names_the_nearest(space, work, searched):
    _, found = searched
    least = min(point.metrics[1] for point in found.front)
    search = ChipSearch(space, work, {"latency": least / 3, "area": 1.0}, plan=PLAN)
    hurried = search.search(effort(1))
    assert hurried.value == math.inf and not hurried.front
    with pytest.raises(UnmetBudgetError) as caught:
        check_budgets(hurried, search.goal)
    assert (caught.value.metric, caught.value.is_proven) == ("latency", False)
    assert caught.value.nearest == hurried.best.metrics[1] > least / 3


def test_an_interrupt_returns_the_best_so_far(space, work, area, monkeypatch):
    search = ChipSearch(space, work, {"area": area}, plan=PLAN)
    once = search.search(effort(1))

    def interrupt():
        raise KeyboardInterrupt

    again = ChipSearch(space, work, {"area": area}, plan=PLAN)
    seen = []
    found = again.search(effort(5), lambda p: (seen.append(p), monkeypatch.setattr(again, "_branch", interrupt)))
    assert len(seen) == 1 and found.value == once.value  # the same seed found the same
    assert found.bound <= found.value


def test_the_command_writes_designs_that_cost_what_it_says(model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["search", "--model", model, "--batch-size", "16", "--rounds", "2", "--evaluations", "160", "--json"]
    assert cli.main([*command, "--sram-kib", "200", "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["best"]["sram_kib"] <= 200 and told["gap"] >= 0 and 0 <= told["hypervolume"] <= 1
    assert (out / "front.svg").stat().st_size > 1000
    rows = (out / "front.csv").read_text().splitlines()
    assert len(rows) == 1 + len(told["front"]) and rows[0].startswith("design,energy_uj")
    workload = model_workload(model, "digits", 16)
    for folder in (out, out / rows[1].split(",")[0]):
        design = rundir.read_design(folder / rundir.DESIGN)
        chip = with_values(CHIPS["edge_trainer"](), chip_values(design["chip"]))
        bits = read_bits(design["bits"])
        mappings = [read_mapping(design["mappings"][label], chip.names) for label in workload.labels]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *mappings)
        widths = workload.operation_bits(bits), workload.tensor_bits(bits)
        cost = counted_cost(chip, workload.step, stacked, *widths)
        assert float(cost.energy) * 1e6 == pytest.approx(design["training_step"]["energy_uj"], rel=1e-4)
        assert float(cost.latency) * 1e3 == pytest.approx(design["training_step"]["latency_ms"], rel=1e-4)


def test_the_command_writes_what_it_has_when_interrupted(model, tmp_path, capsys, monkeypatch):
    branch, rounds = ChipSearch._branch, iter(range(1))

    def interrupted(search):
        if next(rounds, None) is None:
            raise KeyboardInterrupt
        branch(search)

    monkeypatch.setattr(ChipSearch, "_branch", interrupted)
    command = ["search", "--model", model, "--batch-size", "16", "--rounds", "9", "--evaluations", "160", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(told["history"]) == 1 and (tmp_path / "out" / rundir.DESIGN).is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chip", "nothing"], "nearest is"),
        (
            ["--area-mm2", "0.0001"],
            "area_mm2: expected budgets that a chip can meet, got 0.0001; no chip in these ranges and budgets has less",
        ),
        (["--chip", "edge_trainer_fp32", "--free", "slice_bits"], "leave it out"),
        (["--bits", "17"], "width"),
        (["--seconds", "0"], "expected a number from"),
    ],
)
def test_a_mistake_is_told_in_one_line(options, message, model, tmp_path, capsys):
    command = ["search", "--model", model, "--batch-size", "16", "--rounds", "1", "--evaluations", "160"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_objectives_and_their_powers():
    metrics = np.array([2.0, 3.0, 5.0, 7.0, 11.0])
    products = {name: Goal(np.array(powers), np.full(5, np.inf)).values(metrics) for name, powers in OBJECTIVES.items()}
    assert products == pytest.approx({"edp": 6.0, "ed2p": 18.0, "energy": 2.0, "latency": 3.0})


@pytest.mark.slow
def test_the_table_of_controls_has_a_row_for_each(capsys):
    table_chips.main(quick=True, as_json=True)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["variant"] for row in rows] == [*table_chips.VARIANTS, table_chips.EVOLUTION]
    assert len({row["chips"] for row in rows}) == 1 and all(row["edp"][0] > 0 for row in rows)
