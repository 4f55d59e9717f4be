"""The objective: soft minimum over candidates, gradients of a step's cost, constraints, prices, bit operations."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import objective
from codesign.objective import augmented_lagrangian, bit_operations, next_multiplier, next_prices, soft_minimum
from hw.accesses import count
from hw.chip import make_chip
from hw.cost import Cost, price
from hw.mapping import make_mapping
from hw.operation import LOOPS, make_operation, stack_operations
from hw.schedule import join, make_step, residency

JOULES_ONLY = jnp.array([1.0, 0.0])


def tiny_costs(energy, latency, violation):
    """Costs (1, K) whose energy, latency and single violation are given; other fields tell the candidates apart."""
    energy, latency, violation = (jnp.asarray(x)[None] for x in (energy, latency, violation))
    marks = jnp.arange(energy.shape[1], dtype=energy.dtype)[None]
    levels = jnp.broadcast_to(marks[:, :, None], (*marks.shape, 2))
    return Cost(
        energy=energy, latency=latency, cycles=marks, mac_energy=marks,
        access_energy=jnp.broadcast_to(marks[:, :, None, None], (*marks.shape, 2, 3)), control_energy=marks,
        mac_cycles=marks, compute_cycles=marks, level_cycles=levels, macs=marks, violation=violation[..., None],
    )  # fmt: skip


def test_value_is_that_of_the_best_legal_candidate():
    # Energy times a joule's price of 1, plus latency times a second's price of 2: 5, 4, 3; the last does not fit.
    costs = tiny_costs([1.0, 2.0, 1.0], [2.0, 1.0, 1.0], [0.0, 0.0, 0.5])
    best = soft_minimum(costs, jnp.array([1.0, 2.0]))
    assert (float(best.energy[0]), float(best.latency[0])) == (2.0, 1.0)
    assert float(best.violation.sum()) == 0.0
    for name in ("cycles", "mac_energy", "access_energy", "level_cycles", "macs"):
        np.testing.assert_allclose(getattr(best, name), 1.0, rtol=1e-6, err_msg=name)  # the mark of candidate 1


def test_value_without_a_legal_candidate_is_the_least_inflated_one():
    best = soft_minimum(tiny_costs([1.0, 2.0], [1.0, 1.0], [3.0, 0.5]), JOULES_ONLY)  # inflated: 4 and 3 joules
    np.testing.assert_allclose(best.energy, [3.0], rtol=1e-6)
    np.testing.assert_allclose(best.violation, [[0.5]], rtol=1e-6)


def test_gradient_weighs_candidates_by_softmax_of_their_scores():
    # Scores that differ by T log 3 get weights 3/4 and 1/4; weights themselves are constants.
    energy = jnp.array([1.0, 3.0**objective._TEMPERATURE])

    def total(energy):
        return soft_minimum(tiny_costs(energy, jnp.ones(2), jnp.zeros(2)), JOULES_ONLY).energy[0]

    value, gradient = jax.value_and_grad(total)(energy)
    assert float(value) == 1.0
    np.testing.assert_allclose(gradient, [0.75, 0.25], rtol=1e-5)


def test_misfit_of_a_cheaper_candidate_pulls_with_its_inflation():
    # 0.5 J inflated by 1 + 1 ties with the legal 1 J: weights 1/2 each, so d/dE = (1/2, 2/2) and d/dviolation = E/2.
    def total(energy, violation):
        return soft_minimum(tiny_costs(energy, jnp.ones(2), violation), JOULES_ONLY).energy[0]

    energy, violation = jnp.array([1.0, 0.5]), jnp.array([0.0, 1.0])
    assert float(total(energy, violation)) == 1.0
    by_energy, by_violation = jax.grad(total, argnums=(0, 1))(energy, violation)
    np.testing.assert_allclose(by_energy, [0.5, 1.0], rtol=1e-5)
    np.testing.assert_allclose(by_violation, [0.5, 0.25], rtol=1e-5)


def tiny_step():
    """A product forward, element-wise work on its result, and its weight gradient; tensors X, W, Y, Z, dY, dW."""
    sizes = {"N": 8, "K": 8, "C": 12}
    operations = stack_operations([make_operation(**sizes, pass_=p) for p in ("forward", "weight_grad")])
    elements = [8 * 12, 12 * 8, 64, 64, 64, 12 * 8]
    reads, writes = np.zeros((2, 1, 6))
    reads[0, 2], writes[0, [3, 4]] = 64, 64
    return make_step(
        operations, [[1, 0, 2], [5, 0, 4]], elements, operation_slot=[0, 2], external=[1, 0, 0, 0, 0, 0],
        vector_slot=[1], vector_ops=[64], vector_reads=reads, vector_writes=writes,
    )  # fmt: skip


def tiny_mapping(operation):
    """K and C spread over a 4 x 4 array, the rest in the local SRAM but for two tiles of C."""
    temporal, spatial = np.ones((4, len(LOOPS))), np.ones((4, 2, len(LOOPS)))
    n, k, c = (LOOPS.index(loop) for loop in "NKC")
    spatial[1, 0, k] = spatial[1, 1, c] = 4
    temporal[1, k], temporal[1, n], temporal[2, n], temporal[3, c] = 2, 4, 2, 3
    order = np.tile(np.arange(len(LOOPS), dtype=np.int32), (4, 1))
    keep = np.ones((4, 3))
    return make_mapping(operation, temporal, spatial, order, keep)


def tiny_accesses(step):
    """Counts (2, 1): one candidate per operation."""
    mappings = stack_operations([tiny_mapping(jax.tree.map(lambda x, i=i: x[i], step.operations)) for i in range(2)])
    return jax.tree.map(lambda x: x[:, None], jax.jit(jax.vmap(count))(step.operations, mappings))


def tiny_chip():
    return make_chip(rows=4, columns=4, local_kib=1, shared_kib=4, resident_fraction=0.05)


@pytest.mark.usefixtures("x64")
def test_gradient_of_a_step_with_respect_to_the_chip_is_that_of_finite_differences():
    step, chip = tiny_step(), tiny_chip()
    accesses = tiny_accesses(step)
    bits = jnp.full((2, 3), 8.0), jnp.full((6,), 8.0)

    def scaled(scales):
        """The chip with every number that a design moves scaled; DRAM's infinite size stays."""
        size = chip.size_bits.at[:-1].multiply(scales["size_bits"])
        fanout = chip.fanout.at[1].multiply(scales["fanout"])
        rest = {name: getattr(chip, name) * scales[name] for name in ("bandwidth_bits", "vdd", "resident_fraction")}
        return dataclasses.replace(chip, size_bits=size, fanout=fanout, **rest)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def log_edp(scales):
        cost = objective.step_cost(scaled(scales), step, *bits, accesses, jnp.ones(2))
        return jnp.log(cost.edp), jnp.sum(cost.violation)

    shapes = {"size_bits": (3,), "fanout": (2,), "bandwidth_bits": (4,), "vdd": (), "resident_fraction": ()}
    scales = {name: jnp.ones(shape) for name, shape in shapes.items()}
    (_, violation), gradient = log_edp(scales)
    assert float(violation) == 0.0  # so the only candidate is legal
    for name, shape in shapes.items():
        for index in np.ndindex(*shape):
            up, down = (scales | {name: scales[name].at[index].add(h)} for h in (1e-6, -1e-6))
            difference = float(log_edp(up)[0][0] - log_edp(down)[0][0]) / 2e-6
            assert difference != 0.0 or name == "bandwidth_bits"  # registers have more than they need
            np.testing.assert_allclose(
                gradient[name][index], difference, rtol=1e-4, atol=1e-8, err_msg=f"{name} {index}"
            )


@pytest.mark.usefixtures("x64")
def test_prices_are_the_gradient_of_log_edp():
    step, chip = tiny_step(), tiny_chip()
    widths = jnp.full((6,), 8.0)
    rho = residency(step, widths, chip.size_bits[-2] * chip.resident_fraction)
    accesses = jax.tree.map(lambda x: x[:, 0], tiny_accesses(step))
    over_operations = jax.vmap(price, (None, 0, 0, 0, 0, 0))
    costs = jax.jit(over_operations)(
        chip, step.operations, accesses, jnp.full((2, 3), 8.0), jnp.ones((2, 2)), rho[step.operand_tensor]
    )

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_prices(extra):
        """By a joule and a second more of the second operation."""
        more = {"energy": costs.energy.at[1].add(extra[0]), "latency": costs.latency.at[1].add(extra[1])}
        cost = join(chip, step, dataclasses.replace(costs, **more), rho, widths)
        return jnp.log(cost.edp), next_prices(cost)

    gradient, prices = gradient_and_prices(jnp.zeros(2))
    np.testing.assert_allclose(prices, gradient, rtol=1e-10)


def test_augmented_lagrangian_by_hand():
    # Active, multiplier 2, stiffness 4, excess 0.5: ((2 + 2)^2 - 2^2) / 8 = 1.5, slope max(0, 2 + 2) = 4.
    value, slope = jax.value_and_grad(augmented_lagrangian)(jnp.asarray(0.5), jnp.asarray(2.0), 4.0)
    assert (float(value), float(slope)) == (1.5, 4.0)
    # Well inside: 2 - 4 < 0, so -2^2 / 8, whatever the excess.
    value, slope = jax.value_and_grad(augmented_lagrangian)(jnp.asarray(-1.0), jnp.asarray(2.0), 4.0)
    assert (float(value), float(slope)) == (-0.5, 0.0)
    # No multiplier yet: stiffness / 2 excess^2 outside, nothing inside.
    assert float(augmented_lagrangian(jnp.asarray(3.0), jnp.asarray(0.0), 4.0)) == 18.0
    assert float(augmented_lagrangian(jnp.asarray(-3.0), jnp.asarray(0.0), 4.0)) == 0.0


def test_multiplier_climbs_with_the_excess_and_never_below_zero():
    assert float(next_multiplier(jnp.asarray(0.5), jnp.asarray(1.0), 0.1)) == pytest.approx(1.05)
    assert float(next_multiplier(jnp.asarray(-0.5), jnp.asarray(0.01), 0.1)) == 0.0
    assert float(jax.grad(next_multiplier)(jnp.asarray(0.5), jnp.asarray(1.0), 0.1)) == 0.0


def test_excess_is_the_log_of_metric_over_budget():
    cost = SimpleNamespace(area=jnp.asarray(1e-6), energy=jnp.asarray(3e-4), latency=jnp.asarray(1.0))
    excess = objective.excesses(cost, {"area": 2e-6, "energy": 1e-4})
    assert set(excess) == {"area", "energy"}
    np.testing.assert_allclose([excess["area"], excess["energy"]], [-np.log(2), np.log(3)], rtol=1e-5)


def test_bit_operations_by_hand():
    step = tiny_step()
    step = dataclasses.replace(step, multiplicity=jnp.array([1.0, 3.0]))
    bits = jnp.array([[8.0, 4.0, 16.0], [5.0, 4.0, 6.0]])  # of weights, inputs, outputs
    macs = 8 * 8 * 12
    # Forward reads weights and inputs; weight_grad reads inputs and outputs, three times.
    assert float(bit_operations(step, bits)) == macs * (8 * 4 + 3 * 4 * 6)
