"""Narrowing: never a dearer objective, nothing cheap left out, errors inside the noise budget, formats as asked."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.config import Config, ModelConfig, SearchConfig, TrainConfig
from codesign.cooptimize import Phase, penalised, refresh_noise
from codesign.narrowing import narrow
from codesign.problem import make_task
from nets.data import Examples, batches
from nets.dataset_files import load_dataset
from nets.precision import freeze, narrowed
from nets.training import evaluate

BIT_OPERATIONS = Phase(learn_bits=True, penalty="bit_operations", weight=0.1)


@pytest.fixture(scope="module")
def problem():
    """An MLP on digits at 8 bits, the noise of its errors measured, and 128 examples."""
    config = Config(
        model=ModelConfig("mlp"), train=TrainConfig(batch_size=64), search=SearchConfig(candidates=2, evaluations=64)
    )
    dataset = load_dataset("digits")
    task, state = make_task(config, dataset)
    state = refresh_noise(task, state, *next(batches(dataset, 64, seed=0, epoch=0)), jax.random.key(0))
    return task, state, Examples(dataset.train.images[:128], dataset.train.labels[:128])


def objective(task, phase, state, examples):
    loss = evaluate(task.quantised_evaluation, (state.params, state.precision, state.quant_state), state.rest, examples)
    return float(loss.loss) + phase.weight * math.log(penalised(task, phase, state, state.precision.bits()))


def test_narrowed_formats_have_the_bits_asked_for(problem):
    precision = freeze(problem[1].precision)
    bits = precision.bits().at[0].set(jnp.array([5.0, 7.0, 4.0, 8.0]))
    top = jnp.zeros_like(bits[:, :2]).at[0, 0].set(1.0)
    moved = narrowed(precision, bits, top)
    np.testing.assert_array_equal(moved.bits(), bits)
    # Weights lose three bits, one of them off the top; inputs one off the bottom; the rest is as it was.
    np.testing.assert_array_equal(moved.log2_step[0] - precision.log2_step[0], [2.0, 1.0])
    assert float(moved.log2_range[0, 0] - precision.log2_range[0, 0]) == pytest.approx(-1.0, abs=0.1)
    assert float(moved.log2_range[0, 1] - precision.log2_range[0, 1]) == pytest.approx(0.0, abs=0.1)
    np.testing.assert_array_equal(moved.log2_range[1:], precision.log2_range[1:])
    np.testing.assert_array_equal(moved.error_bits, bits[:, 2:])


def test_the_objective_falls_to_where_no_narrower_width_is_better(problem):
    task, state, examples = problem
    before = dataclasses.replace(state, precision=freeze(state.precision))
    after, tried = narrow(task, BIT_OPERATIONS, state, examples)
    bits = after.precision.bits()
    assert tried > bits.size
    assert jnp.all(bits <= before.precision.bits()) and float(bits.mean()) < 8.0 and float(bits.min()) >= task.min_bits
    reached = objective(task, BIT_OPERATIONS, after, examples)
    assert reached < objective(task, BIT_OPERATIONS, before, examples)
    for row, column in [(0, 0), (1, 0), (1, 1)]:
        if bits[row, column] > task.min_bits:
            narrower = narrowed(after.precision, bits.at[row, column].add(-1.0), jnp.zeros_like(bits[:, :2]))
            other = dataclasses.replace(after, precision=narrower)
            assert objective(task, BIT_OPERATIONS, other, examples) >= reached
    # The same weights, chip and mappings: only formats moved.
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_errors_stay_inside_the_noise_budget(problem):
    task, state, examples = problem
    strict = dataclasses.replace(task, noise_budget=1e-12)
    after, _ = narrow(strict, BIT_OPERATIONS, state, examples)
    excess = [float(s.noise.excess(s.precision.bits()[:, 2:], 1e-12)) for s in (state, after)]
    assert excess[0] > 0.0 and excess[1] <= excess[0]
    free = narrow(dataclasses.replace(task, noise_budget=100.0), BIT_OPERATIONS, state, examples)[0]
    assert float(free.precision.bits()[:, 2:].mean()) < float(after.precision.bits()[:, 2:].mean())


def test_edp_stops_at_slice_boundaries(problem):
    """A width one bit above a slice goes below it where the network hardly counts."""
    task, state, examples = problem
    wide = dataclasses.replace(state, precision=dataclasses.replace(state.precision, error_bits=jnp.full((3, 2), 9.0)))
    phase = Phase(learn_bits=True, penalty="edp", weight=0.3)
    after, _ = narrow(dataclasses.replace(task, noise_budget=100.0), phase, wide, examples)
    bits = after.precision.bits()
    assert float(bits[:, 3].max()) <= 8.0 and float(bits[1:, 2].max()) <= 8.0
    assert float(bits[0, 2]) == 9.0  # the error that nothing below needs: no operation reads it, so nothing is gained
    assert penalised(task, phase, after, after.precision.bits()) < penalised(task, phase, wide, wide.precision.bits())
