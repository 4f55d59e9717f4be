"""Error bars and bounds: samples again one by one, comparisons by hand, totals against their parts."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.cost_report import describe_cost, describe_operations, explain_dearest, headline, training_cost
from codesign.evaluation import evaluate
from codesign.tracing import trace
from codesign.uncertainty import NUM_SAMPLES, compare, interval, sample_step
from hw.arithmetic import make_mac
from hw.bounds import lower_bound
from hw.chip import make_chip
from hw.schedule import evaluate_step
from hw.technology import sample_technologies


@pytest.fixture(scope="module")
def costed():
    """A training step of two layers on a small chip."""

    def network(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": jnp.zeros((12, 10)), "b": jnp.zeros((10, 4))}
    workload = trace(network, params, jnp.zeros((8, 12)))
    chip = make_chip(rows=4, columns=4, local_kib=4, shared_kib=16, mac=make_mac("fixed"))
    bits = jnp.full((2, 4), 8.0)
    widths = workload.operation_bits(bits), workload.tensor_bits(bits)
    found = evaluate(chip, workload.step, *widths, jax.random.key(0), evaluations=64)
    return training_cost(workload, found, bits), found, widths


def test_units_of_the_headline_numbers():
    cost = SimpleNamespace(energy=3e-4, latency=2e-3, area=1.5e-6)
    expected = {"energy_uj": 300.0, "latency_ms": 2.0, "edp_js": 6e-7, "area_mm2": 1.5, "power_mw": 150.0}
    assert headline(cost) == pytest.approx(expected)


def test_tiny_edp_survives_single_precision():
    cost = SimpleNamespace(energy=jnp.asarray(1e-25), latency=jnp.asarray(1e-20), area=1.0)
    assert float(headline(cost)["edp_js"]) == pytest.approx(1e-45, rel=1e-6)  # below the smallest float32


def test_samples_are_costs_under_one_technology_each(costed):
    one, found, (operation_bits, tensor_bits) = costed
    samples = sample_technologies(jax.random.key(0), NUM_SAMPLES, one.chip.technology)
    accesses = jax.tree.map(lambda x: x[:, 0], found.candidates.accesses)
    for i in (0, 100, NUM_SAMPLES - 1):
        chip = dataclasses.replace(one.chip, technology=jax.tree.map(lambda x, i=i: x[i], samples))
        density = jnp.ones((len(operation_bits), 2))
        alone = jax.jit(evaluate_step)(chip, one.step, accesses, operation_bits, tensor_bits, density)
        for name in ("energy", "latency", "area", "operation_energy", "breakdown"):
            np.testing.assert_allclose(getattr(one.drawn, name)[i], getattr(alone, name), rtol=1e-5, err_msg=name)


def test_intervals_are_quantiles_of_the_samples(costed):
    one, *_ = costed
    row = describe_cost(one)
    assert set(row["intervals"]) == {*headline(one.cost), "energy_per_sample_uj", "energy_by_component_uj"}
    for name, samples in headline(one.drawn).items():
        low, high = row["intervals"][name]
        assert low < high
        below, above = np.mean(samples < low), np.mean(samples > high)
        assert below == pytest.approx(0.05, abs=0.01) and above == pytest.approx(0.05, abs=0.01)
    # Drawn after one seed: described twice, the same.
    assert row == describe_cost(one)
    assert list(row["intervals"]["energy_by_component_uj"]) == list(row["energy_by_component_uj"])


def test_two_chips_move_together(costed):
    """Their intervals overlap, yet the one with a lower supply takes less energy in every sample."""
    one, found, widths = costed
    accesses = jax.tree.map(lambda x: x[:, 0], found.candidates.accesses)
    frugal = dataclasses.replace(one.chip, vdd=one.chip.vdd * 0.95)
    _, other = sample_step(frugal, one.step, accesses, *widths)
    mine, theirs = np.asarray(one.drawn.operation_energy.sum(1)), np.asarray(other.operation_energy.sum(1))
    assert interval(theirs)[1] > interval(mine)[0] and (theirs < mine).all()


def test_comparison_by_hand():
    reference = {
        "energy_uj": 2.0,
        "area_mm2": 1.0,
        "samples": {"energy_uj": [1.0, 2.0, 3.0, 4.0], "area_mm2": [1.0] * 4},
    }
    row = {"energy_uj": 3.0, "area_mm2": 1.0, "samples": {"energy_uj": [2.0, 3.0, 2.0, 8.0], "area_mm2": [1.0] * 4}}
    compared = compare(row, reference)
    assert compared["energy_uj"]["ratio"] == 1.5
    assert compared["energy_uj"]["holds"] == 0.75  # lower than the reference in the third sample
    assert compared["area_mm2"] == {"ratio": 1.0, "interval": [1.0, 1.0], "holds": 1.0}
    back = compare(reference, row)["energy_uj"]
    assert back["holds"] == 0.75 and back["ratio"] == pytest.approx(2 / 3)


def test_bounds_of_operations_and_of_the_step(costed):
    one, _, (operation_bits, _) = costed
    rows, row = describe_operations(one), describe_cost(one)
    least_energy, least_latency = 0.0, 0.0
    for i, operation in enumerate(rows):
        nest = jax.tree.map(lambda x, i=i: x[i], one.step.operations)
        resident = one.cost.resident[one.step.operand_tensor[i]]
        bound = jax.jit(lower_bound)(one.chip, nest, operation_bits[i], None, resident)
        assert operation["energy_to_bound"] == pytest.approx(
            float(one.cost.operation_energy[i] / bound.energy), rel=1e-5
        )
        assert operation["energy_to_bound"] > 1 - 1e-5 and operation["latency_to_bound"] > 1 - 1e-5
        least_energy, least_latency = least_energy + float(bound.energy), least_latency + float(bound.latency)
    # What mappings do not move is the same on both sides, so the whole is closer to its bound than its operations are.
    spent = float(one.cost.operation_energy.sum())
    fixed = float(one.cost.energy - one.cost.leakage_energy) - spent
    latency = least_latency + float(one.cost.latency) - float(one.cost.operation_latency.sum())
    assert row["latency_to_bound"] == pytest.approx(float(one.cost.latency) / latency, rel=1e-4)
    leaking = float(one.cost.leakage_energy) * latency / float(one.cost.latency)
    assert row["energy_to_bound"] == pytest.approx(float(one.cost.energy) / (least_energy + fixed + leaking), rel=1e-4)
    assert row["edp_to_bound"] == pytest.approx(row["energy_to_bound"] * row["latency_to_bound"])


def test_dearest_operations_are_explained(costed):
    one, *_ = costed
    explained = explain_dearest(one, 2)
    order = np.argsort(-np.asarray(one.cost.operation_energy))
    assert [part["operation"] for part in explained] == [one.labels[i] for i in order[:2]]
    shares = np.asarray(one.cost.operation_energy)[order[:2]] / float(one.cost.energy)
    assert [part["share"] for part in explained] == pytest.approx(shares.tolist())
    limits = {row["operation"]: row["limited_by"] for row in describe_operations(one)}
    for part in explained:
        assert f"bound by {limits[part['operation']]}" in part["text"] and "sram.energy.k" in part["text"]


def test_own_technology_gives_the_cost_itself(costed):
    one, found, widths = costed
    own, _ = sample_step(one.chip, one.step, jax.tree.map(lambda x: x[:, 0], found.candidates.accesses), *widths)
    for name in ("energy", "latency", "area", "operation_energy", "breakdown"):
        np.testing.assert_allclose(getattr(own, name), getattr(found.cost, name), rtol=1e-5, err_msg=name)
