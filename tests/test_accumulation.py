"""Gradient accumulation over micro-batches, and the traffic of optimisers, by hand."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.tracing import trace
from hw.accesses import count
from hw.chip import make_chip
from hw.schedule import evaluate_step
from tests.test_schedule import mappings
from tests.test_tracing import network

WEIGHTS = 64 * 10  # of a single layer


def single_layer(**options):
    """A layer of 64 inputs and 10 outputs, batch 2, without bias."""
    params = {"kernel": jnp.zeros((64, 10))}
    return trace(lambda p, x: x @ p["kernel"], params, jnp.zeros((2, 64)), gradient_bits=12.0, **options)


def cost_of(workload, chip, bits=8.0):
    """Cost with every loop in DRAM."""
    step, table = workload.step, jnp.full((max(workload.product.tolist()) + 1, 4), bits)
    n = len(step.multiplicity)
    accesses = jax.jit(jax.vmap(count))(step.operations, mappings(step.operations, n))
    return evaluated(
        chip, step, accesses, workload.operation_bits(table), workload.tensor_bits(table), jnp.ones((n, 2))
    )


evaluated = jax.jit(evaluate_step)


@pytest.mark.parametrize(("optimizer", "num_states"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_traffic_of_an_update(optimizer, num_states):
    """For each weight: gradient read; master and states read and written, at their widths; the 8 bit copy written."""
    workload = single_layer(optimizer=optimizer, master_bits=32.0, state_bits=20.0)
    chip = make_chip(resident_fraction=0.0, dram_bandwidth_bits=2, vector_lanes=64)
    cost = cost_of(workload, chip)
    bits = WEIGHTS * (12 + 2 * 32 + 2 * num_states * 20 + 8)
    update = workload.vector_passes.index("update")
    cycles = float(cost.vector_latency[update] * chip.frequency())
    assert cycles == pytest.approx(bits / 2, rel=1e-5)


def test_states_have_the_width_of_master_weights_by_default():
    workload = single_layer(optimizer="adam", master_bits=24.0)
    stored = dict(zip(workload.tensor_names, workload.tensor_bits(jnp.full((1, 4), 8.0)).tolist(), strict=True))
    assert stored["kernel state"] == stored["kernel master"] == 24.0
    assert stored["kernel gradient"] == 12.0


def test_one_micro_batch_changes_nothing():
    fn, *arguments = network("lenet", (8, 8, 1))
    one, default = trace(fn, *arguments, micro_batches=1), trace(fn, *arguments)
    assert jax.tree.structure(one) == jax.tree.structure(default)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(default), strict=True):
        np.testing.assert_array_equal(a, b)


def test_passes_run_once_a_micro_batch_and_updates_once():
    fn, *arguments = network("lenet", (8, 8, 1))
    once, workload = trace(fn, *arguments), trace(fn, *arguments, micro_batches=4)
    assert workload.batch == 4 * once.batch
    assert workload.labels == once.labels
    assert set(workload.step.multiplicity.tolist()) == {4.0}
    assert set(workload.inference.multiplicity.tolist()) == {1.0}
    groups = Counter(n for n, p in zip(once.vector_names, once.vector_passes, strict=True) if p == "update")
    for pass_ in ("update", "accumulate"):
        assert groups == Counter(
            n for n, p in zip(workload.vector_names, workload.vector_passes, strict=True) if p == pass_
        )
    updates = [slot for slot, p in zip(workload.step.vector_slot, workload.vector_passes, strict=True) if p == "update"]
    others = set(range(workload.step.num_slots)) - {int(slot) for slot in updates}
    assert min(map(int, updates)) > max(others)
    gradients = [i for i, kind in enumerate(workload.tensor_kind) if kind == "weight_gradient"]
    assert {int(workload.step.tensor_birth[i]) for i in gradients} == {0}
    assert {int(workload.step.tensor_death[i]) for i in gradients} == {workload.step.num_slots - 1}
    assert 4 * sum(r["macs"] for r in once.table()) == sum(r["macs"] for r in workload.table())


def work(workload, cost):
    """Energy and latency of operations and of vector work by pass."""
    found = {"operations": np.array([cost.operation_energy.sum(), cost.operation_latency.sum()])}
    for i, pass_ in enumerate(workload.vector_passes):
        found[pass_] = found.get(pass_, 0) + np.array([cost.vector_energy[i], cost.vector_latency[i]])
    return found


def test_cost_of_micro_batches():
    """Four times the passes of one, one update, and three fetches of the gradients' sum, here from DRAM."""
    fn, *arguments = network("lenet", (8, 8, 1))
    chip = make_chip(resident_fraction=0.0, dram_bandwidth_bits=2, vector_lanes=64)
    workloads = [trace(fn, *arguments, micro_batches=k) for k in (1, 4)]
    costs = [cost_of(workload, chip) for workload in workloads]
    once, four = (work(workload, cost) for workload, cost in zip(workloads, costs, strict=True))
    for name, times in {"operations": 4, "forward": 4, "backward": 4, "update": 1}.items():
        np.testing.assert_allclose(four[name], times * once[name], rtol=1e-5)
    fetched = 3 * 16.0 * workloads[0].num_parameters
    frequency = float(chip.frequency())
    read = float(chip.energy_per_bit()[-1, 0] + chip.wire_energy_per_bit()[-1])
    control = 1 + float(chip.technology["clock.energy"] + chip.technology["control.energy"])
    additions = 3 * workloads[0].num_parameters * float(chip.vector_energy()) * control
    np.testing.assert_allclose(four["accumulate"], [fetched * read + additions, fetched / 2 / frequency], rtol=1e-5)
    assert float(costs[1].latency) == pytest.approx(sum(latency for _, latency in four.values()), rel=1e-5)


def test_images_come_in_every_micro_batch():
    fn, *arguments = network("lenet", (8, 8, 1), batch=8)
    chip = make_chip(shared_kib=2**20)
    once, four = (cost_of(trace(fn, *arguments, micro_batches=k), chip) for k in (1, 4))
    np.testing.assert_allclose(four.transfer_energy, 4 * once.transfer_energy, rtol=1e-5)
    assert float(four.dram_energy) == pytest.approx(4 * float(once.dram_energy), rel=1e-5)


def test_frozen_layers_are_not_accumulated():
    fn, *arguments = network("lenet", (8, 8, 1))
    workload = trace(fn, *arguments, trainable=("dense2",), micro_batches=3)
    accumulated = {n for n, p in zip(workload.vector_names, workload.vector_passes, strict=True) if p == "accumulate"}
    assert accumulated == {"dense2/kernel", "other parameters"}
    assert Counter(workload.passes) == {"forward": 4, "weight_grad": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": 0}, "micro_batches"),
        ({"micro_batches": 1.5}, "micro_batches"),
        ({"state_bits": 0.0}, "widths"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        single_layer(**options)
