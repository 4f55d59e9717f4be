"""The joint step: what each phase moves and leaves, constraints, one compilation, and the same numbers as eagerly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.config import Config, ModelConfig, SearchConfig, TrainConfig
from codesign.cooptimize import Phase, make_step, refresh_mappings, refresh_noise, start_phase
from codesign.objective import step_cost
from codesign.problem import make_task
from nets.data import batches
from nets.dataset_files import load_dataset
from nets.noise import no_noise

MIN_BITS, MAX_BITS = 6, 10
NUM_STEPS = 20
PHASES = {
    "float32": Phase(quantised=False),
    "quantised": Phase(),
    "bits": Phase(learn_bits=True, penalty="bit_operations", weight=0.3),
    "joint": Phase(learn_bits=True, learn_chip=True, penalty="edp", weight=0.3),
    "chip": Phase(train=False, learn_chip=True, penalty="edp", weight=1.0),
}


@pytest.fixture(scope="module")
def problem():
    """An MLP on digits with an energy budget it misses by half, almost no room for noise, and bits that move fast."""
    config = Config(
        model=ModelConfig("mlp"),
        train=TrainConfig(batch_size=64, optimizer="sgd", learning_rate=0.05),
        search=SearchConfig(candidates=2, evaluations=320),
    )
    dataset = load_dataset("digits")
    task, state = make_task(config, dataset)
    batch = next(batches(dataset, 64, seed=0, epoch=0))
    cost = jax.jit(step_cost)(task.space.chip(state.design), *work(task, state), state.mappings.accesses, state.prices)
    task = dataclasses.replace(
        task, budgets={"energy": 0.5 * float(cost.energy)}, noise_budget=1e-4, min_bits=MIN_BITS, max_bits=MAX_BITS,
        precision_rate=0.2,
    )  # fmt: skip
    state = dataclasses.replace(state, multipliers={"energy": jnp.zeros(()), "noise": jnp.zeros(())})
    return task, state, batch


def work(task, state):
    bits = state.precision.bits()
    return task.workload.step, task.workload.operation_bits(bits), task.workload.tensor_bits(bits)


def train(problem, name, state=None, steps=NUM_STEPS):
    """State and metrics after every step of a phase; the first entry is the state before."""
    task, initial, batch = problem
    phase = PHASES[name]
    step = make_step(task, phase, NUM_STEPS)
    states, seen = [start_phase(task, phase, initial if state is None else state, NUM_STEPS)], []
    for i in range(steps):
        data = batch if phase.train else (None, None)
        new, metrics = step(states[-1], *data, jax.random.key(i))
        states.append(new)
        seen.append({name: float(value) for name, value in metrics.items()})
    return states, seen


@pytest.fixture(scope="module")
def measured(problem):
    """The state with the noise of its 8 bit errors measured."""
    task, state, batch = problem
    return refresh_noise(task, state, *batch, jax.random.key(0))


@pytest.fixture(scope="module")
def chip_run(problem, measured):
    return train(problem, "chip", measured)


@pytest.fixture(scope="module")
def held_run(problem, measured):
    """Bits that pay for their work, those of errors held by the noise they add."""
    return train(problem, "bits", measured)


@pytest.fixture(scope="module")
def free_run(problem, measured):
    """The same where errors add no noise."""
    return train(problem, "bits", dataclasses.replace(measured, noise=no_noise(len(measured.precision.names))))


def changed(before, after):
    """Names of the fields of a state of which any bit differs."""

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    return {name for name in vars(before) if not same(getattr(before, name), getattr(after, name))}


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("float32", {"params"}),
        ("quantised", {"params", "quant_state"}),
        ("bits", {"params", "quant_state", "precision", "multipliers"}),
        ("joint", {"params", "quant_state", "precision", "design", "multipliers", "prices"}),
        ("chip", {"design", "multipliers", "prices"}),
    ],
)
def test_a_phase_moves_its_own_groups_and_leaves_the_others_bit_for_bit(problem, measured, name, moved):
    states, _ = train(problem, name, measured, steps=2)
    assert changed(states[0], states[-1]) - {"opt_state"} == moved
    if "design" in moved:
        still = {n for n, raw in states[0].design.items() if raw == states[-1].design[n]}
        assert still == {"resident_fraction"}  # this small network fits into the shared SRAM at any share of it


def test_steps_compile_once(problem, measured):
    """Also after a refresh of mappings and noise, and for another weight: nothing changes its shape or type."""
    task, _, batch = problem
    states, _ = train(problem, "joint", measured, steps=2)
    state = refresh_mappings(task, states[-1], jax.random.key(1), task.refresh_evaluations)
    state = refresh_noise(task, state, *batch, jax.random.key(1))
    step = make_step(task, PHASES["joint"], NUM_STEPS)
    dearer = make_step(task, PHASES["joint"]._replace(weight=3.0), NUM_STEPS)
    after = [one(state, *batch, jax.random.key(2))[0] for one in (step, dearer)]
    assert "opt_state" in changed(*after)  # the weight is heard
    assert step.func is dearer.func and step.func._cache_size() == 1


@pytest.mark.parametrize("name", ["bits", pytest.param("joint", marks=pytest.mark.slow)])
def test_jitted_step_is_the_eager_step(problem, measured, name):
    task, _, batch = problem
    phase = PHASES[name]
    step, state = make_step(task, phase, NUM_STEPS), start_phase(task, phase, measured, NUM_STEPS)
    jitted = step(state, *batch, jax.random.key(0))
    with jax.disable_jit():
        eager = step(state, *batch, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_bits_stay_between_their_bounds(free_run, held_run):
    for state in (*free_run[0], *held_run[0]):
        bits = np.asarray(state.precision.bits())
        assert bits.min() >= MIN_BITS and bits.max() <= MAX_BITS
        assert np.array_equal(bits, np.round(bits))
    assert float(free_run[0][-1].precision.bits().min()) == MIN_BITS  # the bounds were felt
    assert float(held_run[0][-1].precision.bits().max()) == MAX_BITS


def test_noise_constraint_raises_the_bits_of_errors(free_run, held_run):
    held, seen = held_run
    before, after, free = (np.asarray(one.precision.bits()[:, 2:]) for one in (held[0], held[-1], free_run[0][-1]))
    assert after.mean() > before.mean() > free.mean()
    assert seen[0]["excess_noise"] > 0 and seen[-1]["excess_noise"] < seen[0]["excess_noise"]


def test_chip_gradient_lowers_what_it_pays_for(chip_run):
    """EDP, and above all energy, of which the budget allows half."""
    _, seen = chip_run
    edp, energy = ([metrics[name] for metrics in seen] for name in ("edp", "energy"))
    assert len(edp) == 20 and edp[-1] < edp[0] and energy[-1] < 0.9 * energy[0]
    assert seen[-1]["edp"] == pytest.approx(seen[-1]["energy"] * seen[-1]["latency"], rel=1e-5)


def test_multiplier_grows_while_its_budget_is_exceeded(chip_run):
    states, seen = chip_run
    excess = np.array([metrics["excess_energy"] for metrics in seen])
    assert excess[0] == pytest.approx(np.log(2 / 0.98), rel=1e-3)  # twice a budget that is held 2 % tighter
    multipliers = np.array([float(state.multipliers["energy"]) for state in states])
    assert np.all(excess > 0) and np.all(np.diff(multipliers) > 0)
    np.testing.assert_allclose(multipliers[1:], 0.1 * np.cumsum(excess), rtol=1e-4)


def test_refresh_keeps_the_best_and_adds_the_neighbours(problem):
    task, state, _ = problem
    once = refresh_mappings(task, state, jax.random.key(0), task.refresh_evaluations)
    twice = refresh_mappings(task, once, jax.random.key(1), task.refresh_evaluations)
    num_neighbours = len(task.space.neighbours(state.design)) - 1
    assert once.mappings.scores.shape == (len(task.workload.names), task.num_candidates + num_neighbours)
    assert np.all(np.asarray(twice.mappings.scores[:, 0]) <= np.asarray(once.mappings.scores[:, 0]) + 1e-5)
    assert changed(once, twice) <= {"mappings"}
