"""Steps on several cores: one core is `evaluate_step`, what is shared and what adds up, overlap, gradients."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hw import memory
from hw.accesses import count
from hw.chip import make_chip
from hw.cores import evaluate_cores, make_cores
from hw.mapping import make_mapping, outermost_mapping
from hw.operation import LOOPS, make_operation, stack_operations
from hw.overlap import assign_passes, make_schedule
from hw.schedule import evaluate_step
from hw.step import make_step
from tests.test_schedule import WIDTH, mappings, two_layer_step

evaluated_in_turn, evaluated_on = jax.jit(evaluate_step), jax.jit(evaluate_cores)


def inputs(step, width=WIDTH):
    """Counts with all loops in DRAM, widths, and full density."""
    n, m = len(step.multiplicity), len(step.tensor_elements)
    accesses = count_all(step.operations, mappings(step.operations, n))
    return accesses, jnp.full((n, 3), width), jnp.full(m, width), jnp.ones((n, 2))


count_all = jax.jit(jax.vmap(count))


@pytest.mark.parametrize("shared_kib", [0.3, 2.0, 64.0])
def test_one_core_is_a_step_in_turn(x64, shared_kib):
    step, chip = two_layer_step(), make_chip(shared_kib=shared_kib, shared_banks=4, resident_fraction=0.4)
    schedule = make_schedule(step, [0] * step.num_slots, 1)
    expected = evaluated_in_turn(chip, step, *inputs(step))
    cost = evaluated_on(make_cores([chip]), step, schedule, *inputs(step))
    for name, value in vars(expected).items():
        if name != "components":
            np.testing.assert_allclose(getattr(cost, name), value, rtol=1e-12, atol=1e-30, err_msg=name)
    assert cost.components == expected.components


def test_cores_in_one_queue_do_not_overlap(x64):
    """Two equal cores that share a queue take as long as one; all but leakage and area is the same."""
    step, chip = two_layer_step(), make_chip(shared_kib=64, resident_fraction=0.5)
    core = assign_passes(step, weight_grad=1)
    schedule = make_schedule(step, core, 2, queue=[0] * step.num_slots)
    expected = evaluated_in_turn(chip, step, *inputs(step))
    cost = evaluated_on(make_cores([chip, chip]), step, schedule, *inputs(step))
    for name in ("latency", "operation_energy", "vector_energy", "transfer_energy", "slot_start", "occupancy"):
        np.testing.assert_allclose(getattr(cost, name), getattr(expected, name), rtol=1e-12, err_msg=name)
    assert float(cost.leakage_energy) > float(expected.leakage_energy)


def independent_step(num, sizes, elements):
    """Operations that have no tensor in common."""
    operation = make_operation(**sizes)
    tensors = np.arange(3 * num).reshape(num, 3)
    return make_step(stack_operations([operation] * num), tensors, elements * num), operation


def computing(operation):
    """K and C on the array, all else in time at the local SRAM: the MACs bind."""
    temporal, spatial = np.ones((4, len(LOOPS))), np.ones((4, 2, len(LOOPS)))
    for loop, bound in zip(LOOPS, np.asarray(operation.bounds), strict=True):
        if loop in "KC":
            spatial[1, "KC".index(loop), LOOPS.index(loop)] = bound
        else:
            temporal[1, LOOPS.index(loop)] = bound
    return make_mapping(operation, temporal, spatial)


def independent_costs(sizes, elements, map_operation, num_cores, num=4, **chip):
    step, operation = independent_step(num, sizes, elements)
    accesses = count_all(step.operations, stack_operations([map_operation(operation)] * num))
    widths = jnp.full((num, 3), WIDTH), jnp.full(3 * num, WIDTH)
    schedule = make_schedule(step, np.arange(num) % num_cores, num_cores)
    cores = make_cores([make_chip(**chip)] * num_cores)
    return evaluated_on(cores, step, schedule, accesses, *widths, jnp.ones((num, 2)))


def test_equal_cores_with_independent_work_share_the_latency():
    """16 x 16 channels, 1024 positions, 9 taps: 9216 products of 4 slice pairs each, and 147 456 bits from DRAM."""
    sizes = {"K": 16, "C": 16, "P": 32, "Q": 32, "R": 3, "S": 3}
    elements = [9 * 256, 16 * 34 * 34, 16 * 1024]
    costs = {
        c: independent_costs(
            sizes, elements, computing, c, resident_fraction=0.0, register_bandwidth_bits=2048,
            local_bandwidth_bits=2**14, shared_bandwidth_bits=2**14, dram_bandwidth_bits=2**14,
        )
        for c in (1, 2, 4)
    }  # fmt: skip
    cycles = float(costs[1].latency) * float(make_chip().frequency())
    assert cycles == pytest.approx(4 * 9216 * 4, rel=1e-5)
    for c in (2, 4):
        assert float(costs[c].latency) == pytest.approx(float(costs[1].latency) / c, rel=1e-5)
        np.testing.assert_allclose(costs[c].operation_energy, costs[1].operation_energy, rtol=1e-6)
        np.testing.assert_allclose(costs[c].utilisation, costs[1].utilisation, rtol=1e-6)
    power = [float(costs[c].leakage_energy / costs[c].latency) for c in (1, 2, 4)]
    assert power[2] - power[0] == pytest.approx(3 * (power[1] - power[0]), rel=1e-3)


def test_cores_that_wait_for_dram_gain_nothing():
    sizes, elements, slow = {"K": 4, "C": 12, "N": 8}, [48, 96, 32], {"dram_bandwidth_bits": 4, "resident_fraction": 0}
    costs = [independent_costs(sizes, elements, lambda o: outermost_mapping(o, 4), c, **slow) for c in (1, 4)]
    assert float(costs[1].latency) == pytest.approx(float(costs[0].latency), rel=1e-5)
    cycles = float(costs[1].latency * make_chip(**slow).frequency())
    assert cycles == pytest.approx(float(costs[1].level_cycles[:, -1].sum()), rel=1e-5)


def test_weight_gradients_beside_the_rest(x64):
    """Two different cores as in a chip for personalisation: one for forward and input_grad, one for weight_grad."""
    step = two_layer_step()
    chips = [make_chip(columns=8, resident_fraction=0.0), make_chip(rows=8, columns=8, local_kib=8, shared_kib=2)]
    schedule = make_schedule(step, assign_passes(step, weight_grad=1), 2)
    in_turn = make_schedule(step, schedule.core, 2, queue=[0] * step.num_slots)
    cores = make_cores(chips)
    cost, alone = (evaluated_on(cores, step, s, *inputs(step)) for s in (schedule, in_turn))
    assert float(cost.latency) < float(alone.latency)
    assert float(cost.latency) >= float(cost.level_cycles[:, -1].sum() / chips[0].frequency()) > 0.0
    durations = np.zeros(step.num_slots)
    durations[np.asarray(step.operation_slot)] += np.asarray(cost.operation_latency)
    durations[np.asarray(step.vector_slot)] += np.asarray(cost.vector_latency)
    ran = np.asarray(cost.slot_end - cost.slot_start)
    assert (ran >= durations * (1 - 1e-9)).all()
    for slot in range(step.num_slots):
        for before in np.flatnonzero(schedule.waits_for[slot]):
            assert float(cost.slot_start[slot]) >= float(cost.slot_end[before]) - 1e-15
    np.testing.assert_allclose(cost.operation_energy, alone.operation_energy, rtol=1e-12)
    parts = cost.operation_energy.sum() + cost.vector_energy.sum() + cost.transfer_energy.sum() + cost.leakage_energy
    assert float(cost.energy) == pytest.approx(float(parts), rel=1e-12)
    assert float(cost.breakdown.sum()) == pytest.approx(float(cost.energy), rel=1e-12)


def test_operations_are_priced_on_their_core(x64):
    """Energies and times of the weight gradients are those of the second chip with the first one's shared SRAM."""
    step = two_layer_step()
    chips = [make_chip(shared_kib=64, vdd=0.9), make_chip(rows=8, columns=4, local_kib=8, shared_kib=2, vdd=0.7)]
    cost = evaluated_on(
        make_cores(chips), step, make_schedule(step, assign_passes(step, weight_grad=1), 2), *inputs(step)
    )
    for core, ids in enumerate((np.array([0, 1, 3]), np.array([2, 4]))):
        size, width, banks = chips[0].size_bits, chips[0].bandwidth_bits, chips[0].banks
        chip = dataclasses.replace(
            chips[core],
            size_bits=chips[core].size_bits.at[2].set(size[2]),
            bandwidth_bits=chips[core].bandwidth_bits.at[2].set(width[2]),
            banks=chips[core].banks.at[2].set(banks[2]),
            relative_vdd=chips[core].relative_vdd.at[2].set(0.9 / float(chips[core].vdd)),
        )
        alone = evaluated_in_turn(chip, step, *inputs(step))
        assert float(alone.resident.min()) == float(cost.resident.min()) == 1.0
        for name in ("operation_energy", "operation_latency"):
            np.testing.assert_allclose(getattr(cost, name)[ids], getattr(alone, name)[ids], rtol=1e-12)


def test_area_and_leakage_count_the_shared_memory_once(x64):
    small, large = make_chip(rows=8, columns=8, shared_kib=2), make_chip(rows=16, columns=16, shared_kib=128)
    cores = make_cores([large, small])
    area, other = large.area(), small.area()
    private = other.macs + other.memories[:-2].sum() + other.vector
    overhead = 1.0 + float(large.technology["control.area"])
    assert float(cores.area()) == pytest.approx(float(area.total) + float(private) * overhead, rel=1e-12)
    # Leakage of the small core without its shared SRAM.
    own = small.leakage_power() - memory.leakage_power(small.levels()[2], small.technology, small.vdd)
    assert float(cores.leakage_power()) == pytest.approx(float(large.leakage_power() + own), rel=1e-12)


def test_tiles_of_all_cores_and_resident_tensors_fit_the_shared_memory(x64):
    chips = [make_chip(shared_kib=96, resident_fraction=0.4)] * 3
    cores = make_cores(chips)
    tiles = [chip.limits()[chip.limit_names().index("capacity shared")] for chip in cores.chips]
    assert float(cores.resident_bits()) == pytest.approx(0.4 * 96 * 8192)
    assert float(sum(tiles)) == pytest.approx(0.6 * 96 * 8192)
    assert float(tiles[0]) == pytest.approx(0.2 * 96 * 8192)


def test_the_vector_unit_beside_the_array(x64):
    """With a queue of its own, the vector work of slot 1 runs beside the operation of slot 2; slot 3 reads both."""
    operation = make_operation(N=8, C=12, K=6)
    reads, writes = np.zeros((2, 2, 8))
    reads[0, 2], writes[0, 3] = 48, 48
    reads[1, [3, 6]], writes[1, 7] = 48, 48
    step = make_step(
        stack_operations([operation] * 2), [[0, 1, 2], [4, 5, 6]], [72, 96, 48, 48, 72, 96, 48, 48],
        operation_slot=[0, 2], vector_slot=[1, 3], vector_ops=[480, 48], vector_reads=reads, vector_writes=writes,
    )  # fmt: skip
    chip = make_chip(shared_kib=64)
    schedule = make_schedule(step, [0] * 4, 1, queue=[0, 1, 0, 1])
    cost = evaluated_on(make_cores([chip]), step, schedule, *inputs(step))
    in_turn = evaluated_in_turn(chip, step, *inputs(step))
    assert float(cost.slot_start[2]) == float(cost.slot_end[0])
    assert float(cost.slot_start[1]) == float(cost.slot_end[0])
    assert float(cost.slot_start[3]) == pytest.approx(float(jnp.max(cost.slot_end[1:3])))
    hidden = min(float(in_turn.vector_latency[0]), float(in_turn.operation_latency[1]))
    assert float(cost.latency) == pytest.approx(float(in_turn.latency) - hidden, rel=1e-9)


def test_gradients_equal_differences(x64):
    step = two_layer_step()
    chips = [make_chip(shared_kib=0.6, shared_banks=4), make_chip(rows=8, local_kib=8)]
    schedule = make_schedule(step, assign_passes(step, weight_grad=1), 2)
    accesses, operation_bits, tensor_bits, density = inputs(step)

    @jax.jit
    def log_energy_and_latency(vdd, shared_bits, dram, width):
        moved = [dataclasses.replace(chip, vdd=vdd[i]) for i, chip in enumerate(chips)]
        moved[0] = dataclasses.replace(
            moved[0],
            size_bits=moved[0].size_bits.at[-2].set(shared_bits),
            bandwidth_bits=moved[0].bandwidth_bits.at[-1].set(dram),
        )
        bits = [jnp.broadcast_to(width, x.shape) for x in (operation_bits, tensor_bits)]
        cost = evaluate_cores(make_cores(moved), step, schedule, accesses, *bits, density)
        return jnp.log(jnp.stack([cost.energy, cost.latency]))

    args = (jnp.array([0.8, 0.75]), chips[0].size_bits[-2], jnp.array(11.0), jnp.array(7.3))
    gradients = jax.jit(jax.jacrev(log_energy_and_latency, argnums=(0, 1, 2)))(*args)
    for i in range(3):  # widths count in whole slices, straight through: no difference shows that
        for index in np.ndindex(args[i].shape):
            step_size = 1e-5 * float(args[i][index])
            moves = [[a.at[index].add(s * step_size) if j == i else a for j, a in enumerate(args)] for s in (1, -1)]
            difference = (log_energy_and_latency(*moves[0]) - log_energy_and_latency(*moves[1])) / (2 * step_size)
            found = gradients[i][(slice(None), *index)]
            np.testing.assert_allclose(found, difference, rtol=1e-5, atol=1e-12)
            assert np.abs(found).max() > 0.0


def test_gradients_are_finite_where_slots_tie():
    """Two equal cores with equal work start and end together."""
    step, _ = independent_step(4, {"K": 4, "C": 12, "N": 8}, [48, 96, 32])
    accesses, *rest = inputs(step)
    schedule = make_schedule(step, [0, 1, 0, 1], 2)

    def latency(chip, accesses):
        return evaluate_cores(make_cores([chip, chip]), step, schedule, accesses, *rest).latency

    gradients = jax.jit(jax.grad(latency, allow_int=True))(make_chip(resident_fraction=0.1), accesses)
    sizes = {name: np.asarray(getattr(gradients, name)) for name in ("fanout", "bandwidth_bits", "vdd", "size_bits")}
    assert all(np.isfinite(gradient).all() for gradient in sizes.values())
    assert sizes["vdd"] < 0.0  # a higher supply is a faster clock


def test_assignments_are_a_batch():
    step = two_layer_step()
    chips = [make_chip(rows=16, columns=8, shared_kib=64), make_chip(rows=8, columns=8, local_kib=8)]
    cores, rng = make_cores(chips), np.random.default_rng(0)
    schedules = [make_schedule(step, rng.integers(0, 2, step.num_slots), 2) for _ in range(5)]
    batch = jax.jit(jax.vmap(evaluate_cores, (None, None, 0, None, None, None, None)))
    costs = batch(cores, step, stack_operations(schedules), *inputs(step))
    for i, schedule in enumerate(schedules):
        cost = evaluated_on(cores, step, schedule, *inputs(step))
        for name in ("energy", "latency", "slot_start", "breakdown", "resident", "utilisation"):
            np.testing.assert_allclose(getattr(costs, name)[i], getattr(cost, name), rtol=1e-5, atol=1e-12)
    assert len({float(latency) for latency in costs.latency}) > 1


def test_unlike_cores_are_refused():
    step, chip = two_layer_step(), make_chip()
    deeper = dataclasses.replace(chip, kinds=("register", *chip.kinds))
    for chips in ([], [chip, deeper]):
        with pytest.raises(ValueError, match="equally many memory levels"):
            make_cores(chips)
    schedule = make_schedule(step, [0] * step.num_slots, 1)
    with pytest.raises(ValueError, match="schedule for 2 cores, got one for 1"):
        evaluate_cores(make_cores([chip, chip]), step, schedule, *inputs(step))


def test_example_of_the_documentation_runs(capsys):
    page = (Path(__file__).parent.parent / "docs" / "schedule.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(example, "schedule.md", "exec"), {"__name__": "example"})
    lines = re.findall(r"(.+): ([\d.]+) µs, ([\d.]+) µJ, ([\d.]+) mm²", capsys.readouterr().out)
    assert [name for name, *_ in lines] == ["in turn", "side by side"]
    (slow, _, area), (fast, _, same) = (map(float, numbers) for _, *numbers in lines)
    assert fast < slow
    assert same == area
