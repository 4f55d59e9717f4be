"""Training under rules: a controller settles, the work it leaves is measured, and energies follow that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import evaluate_chip, trace
from hw.arithmetic import make_mac
from hw.chip import make_chip
from hw.cost import price
from nets import Laps, LayerRule, PrecisionRules
from nets.data import batches
from nets.dataset_files import load_dataset
from nets.low_bit_training import fit_low_bit, left_work
from nets.training import cross_entropy

RULES = PrecisionRules({"*": LayerRule(16, 16, 16, 16, learn=False, point="random_bit", laps=Laps(patience=2))})


def forward(params, rest, images, key, train):
    hidden = jax.nn.relu(images.reshape(images.shape[0], -1) @ params["hidden"]["kernel"])
    return hidden @ params["out"]["kernel"], rest


@pytest.fixture(scope="module")
def trained():
    digits = load_dataset("digits")
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, 24)) / 8.0},
        "out": {"kernel": jax.random.normal(keys[1], (24, 10)) / 5.0},
    }
    state, history = fit_low_bit(forward, params, {}, digits, RULES, epochs=8)
    return digits, state, history, next(batches(digits, 128, 0, 0))


def test_the_controller_settles_and_the_network_learns(trained):
    digits, state, history, _ = trained
    assert history.shape == (8, 2, 4)
    assert np.all(history[-1] < 16.0) and np.all(history[-1] % 4 == 0)
    logits, _ = forward(state.params, {}, digits.test.images, None, False)
    assert cross_entropy(logits, digits.test.labels) < 1.0


def test_energy_follows_measured_densities(trained):
    _, state, _, (images, labels) = trained
    workload = trace(lambda params, x: forward(params, {}, x, None, True)[0], state.params, images)
    bits = state.precision.bits()
    widths = workload.operation_bits(bits), workload.tensor_bits(bits)
    chip = make_chip(rows=4, columns=4, local_kib=4, shared_kib=16, mac=make_mac("slices", slice_bits=4))

    def found(density, **start):
        options = {"density": density, "evaluations": 64, **start}
        return evaluate_chip(chip, workload.step, *widths, jax.random.key(0), workload.labels, **options)

    work = left_work(forward, state, (images, labels), slice_width=4)
    density = workload.operation_density(work)
    # Operations in order of execution; nothing lies below "hidden" that could be trained.
    assert workload.labels == (
        "hidden (forward)",
        "out (forward)",
        "out (weight_grad)",
        "out (input_grad)",
        "hidden (weight_grad)",
    )
    np.testing.assert_array_equal(density, [work[0, 0], work[1, 0], work[1, 2], work[1, 1], work[0, 2]])
    assert density.prod(-1).min() > 0.0 and density.prod(-1).max() < 0.8
    dense = found(None)
    # From the mappings of the dense step, or what skipping saves would drown in the luck of two searches.
    sparse = found(density, start=dense.candidates, prices=dense.prices)
    np.testing.assert_array_equal(dense.density, 1.0)
    assert sparse.cost.edp < dense.cost.edp

    # Under the same mappings the MACs' energy is in proportion to the work left, operation by operation.
    def mac_energy(density):
        accesses = jax.tree.map(lambda x: x[:, 0], dense.candidates.accesses)
        resident = jnp.zeros((len(density), 3))
        cost = jax.vmap(price, (None, 0, 0, 0, 0, 0))(
            chip, workload.step.operations, accesses, widths[0], density, resident
        )
        return cost.mac_energy

    np.testing.assert_allclose(mac_energy(density), mac_energy(jnp.ones_like(density)) * density.prod(-1), rtol=1e-5)


def test_no_epochs_are_an_error(trained):
    digits, state, *_ = trained
    with pytest.raises(ValueError, match=r"expected epochs >= 1, got 0"):
        fit_low_bit(forward, state.params, {}, digits, RULES, epochs=0)
