"""Training steps: stand-alone sums, compulsory traffic, residency against brute force, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hw.accesses import count
from hw.arithmetic import make_mac
from hw.chip import make_chip
from hw.cost import evaluate
from hw.mapping import make_mapping, outermost_mapping
from hw.operation import LOOPS, make_operation, stack_operations
from hw.schedule import evaluate_step, join, make_step, residency
from hw.step import padded

BATCH, FEATURES, HIDDEN, CLASSES = 8, 12, 6, 4
(X, W1, Y1, X2, W2, Y2, KEPT, DY2, DW2, DX2, DY1, DW1, MASTER) = range(13)
NUM_TENSORS = 13
WIDTH = 8.0


def dense(C, K, pass_):
    return make_operation(N=BATCH, C=C, K=K, pass_=pass_)


def rows(*works):
    """Vector reads or writes: one {tensor: elements} for each piece of work."""
    table = np.zeros((len(works), NUM_TENSORS))
    for row, work in zip(table, works, strict=True):
        for tensor, elements in work.items():
            row[tensor] = elements
    return table


def two_layer_step():
    """MLP of two layers: forward with a ReLU between, loss, both backward passes of layer 2, ReLU, layer 1, updates."""
    elements = np.zeros(NUM_TENSORS)
    elements[[X]] = BATCH * FEATURES
    elements[[W1, DW1]] = FEATURES * HIDDEN
    elements[[Y1, X2, KEPT, DX2, DY1]] = BATCH * HIDDEN
    elements[[W2, DW2]] = HIDDEN * CLASSES
    elements[[Y2, DY2]] = BATCH * CLASSES
    elements[MASTER] = FEATURES * HIDDEN + HIDDEN * CLASSES
    operations = [
        dense(FEATURES, HIDDEN, "forward"),
        dense(HIDDEN, CLASSES, "forward"),
        dense(HIDDEN, CLASSES, "weight_grad"),
        dense(HIDDEN, CLASSES, "input_grad"),
        dense(FEATURES, HIDDEN, "weight_grad"),
    ]
    origin = list(range(NUM_TENSORS))
    origin[KEPT] = X2
    hidden, classes = BATCH * HIDDEN, BATCH * CLASSES
    weights = {W1: FEATURES * HIDDEN, W2: HIDDEN * CLASSES}
    return make_step(
        stack_operations(operations),
        [[W1, X, Y1], [W2, X2, Y2], [DW2, KEPT, DY2], [W2, DX2, DY2], [DW1, X, DY1]],
        elements,
        operation_slot=[0, 2, 4, 5, 7],
        persistent=[t in (W1, W2, MASTER) for t in range(NUM_TENSORS)],
        origin=origin,
        external=[float(t == X) for t in range(NUM_TENSORS)],
        vector_slot=[1, 3, 6, 8],
        vector_ops=[hidden, 3 * classes, hidden, 2 * elements[MASTER]],
        vector_reads=rows(
            {Y1: hidden}, {Y2: classes}, {DX2: hidden}, {DW1: weights[W1], DW2: weights[W2], MASTER: elements[MASTER]}
        ),
        vector_writes=rows({X2: hidden}, {DY2: classes}, {DY1: hidden}, {MASTER: elements[MASTER], **weights}),
    )


def evaluated(step, chip, width=WIDTH):
    """Cost with every loop in DRAM and the same width everywhere."""
    n = step.operation_slot.shape[0]
    return evaluate_at(chip, step, mappings(step.operations, n), jnp.asarray(width))


@jax.jit
def evaluate_at(chip, step, mappings, width):
    accesses = jax.vmap(count)(step.operations, mappings)
    bits = [jnp.broadcast_to(width, shape) for shape in (step.operand_tensor.shape, step.tensor_elements.shape)]
    return evaluate_step(chip, step, accesses, *bits, jnp.ones((bits[0].shape[0], 2), width.dtype))


def mappings(operations, n):
    return stack_operations([outermost_mapping(jax.tree.map(lambda x, i=i: x[i], operations), 4) for i in range(n)])


def stand_alone(step, chip):
    """Costs of the operations with all operands in DRAM."""
    n = step.operation_slot.shape[0]
    bits = jnp.full((n, 3), WIDTH)
    return evaluate_all(chip, step.operations, mappings(step.operations, n), bits)


evaluate_all = jax.jit(jax.vmap(evaluate, (None, 0, 0, 0)))


def dram_energy(chip):
    """Joules to move a bit between DRAM and chip."""
    return float(chip.energy_per_bit()[-1].mean() + chip.wire_energy_per_bit()[-1])


def test_a_padded_step_costs_what_it_did(x64):
    """The forward pass alone, with the shapes of the training step, costs what it does within that."""
    training, chip = two_layer_step(), make_chip(resident_fraction=0.0)
    first = jax.tree.map(lambda x: x[:2], training.operations)
    reads, writes = (np.asarray(x)[:2] for x in (training.vector_reads, training.vector_writes))
    forward = make_step(
        first, training.operand_tensor[:2].tolist(), training.tensor_elements.tolist(), operation_slot=[0, 2],
        external=training.tensor_external.tolist(), vector_slot=[1, 3], vector_ops=training.vector_ops[:2].tolist(),
        vector_reads=reads, vector_writes=writes,
    )  # fmt: skip
    full = padded(forward, like=training)
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(jnp.shape, training)
    cost, whole = evaluated(full, chip), evaluated(training, chip)
    for name in ("operation_energy", "operation_latency", "vector_energy", "vector_latency", "access_energy"):
        alone, among_all = getattr(cost, name), getattr(whole, name)
        np.testing.assert_allclose(alone[:2], among_all[:2], rtol=1e-12, err_msg=name)
        assert not alone[2:].any(), name
    latency = whole.operation_latency[:2].sum() + whole.vector_latency[:2].sum()
    np.testing.assert_allclose(cost.latency, latency, rtol=1e-12)
    energy = whole.operation_energy[:2].sum() + whole.vector_energy[:2].sum()
    np.testing.assert_allclose(cost.energy - cost.leakage_energy, energy, rtol=1e-12)
    np.testing.assert_allclose(cost.slot_end[len(forward.operation_slot) + 2 :], cost.latency, rtol=1e-12)


def test_a_step_is_padded_to_no_less_than_it_is():
    with pytest.raises(ValueError, match="at least 5 operations, 4 pieces of vector work and 13 tensors, got 2, 2"):
        training = two_layer_step()
        part = jax.tree.map(lambda x: x[:2], (training.operation_slot, training.vector_slot))
        padded(training, like=dataclasses.replace(training, operation_slot=part[0], vector_slot=part[1]))


def test_lives_follow_from_slots():
    step = two_layer_step()
    lives = {t: (int(step.tensor_birth[t]), int(step.tensor_death[t])) for t in range(NUM_TENSORS)}
    assert lives[X] == (0, 7)
    assert lives[X2] == (1, 2)
    assert lives[KEPT] == (3, 4)  # from the slot after the last use of X2 in the forward pass
    assert lives[DY2] == (3, 5)
    assert lives[W1] == lives[W2] == lives[MASTER] == (0, 8)
    assert step.operation_pass.tolist() == [0, 0, 2, 1, 2]


def test_nothing_resident_is_the_sum_of_stand_alone_work():
    step, chip = two_layer_step(), make_chip(resident_fraction=0.0)
    cost, alone = evaluated(step, chip), stand_alone(step, chip)
    np.testing.assert_allclose(cost.operation_energy, alone.energy, rtol=1e-6)
    np.testing.assert_allclose(cost.operation_latency, alone.latency, rtol=1e-6)
    moved = WIDTH * (step.vector_reads.sum(1) + step.vector_writes.sum(1))
    read_energy, write_energy = chip.energy_per_bit()[-1] + chip.wire_energy_per_bit()[-1]
    traffic = WIDTH * (step.vector_reads.sum(1) * read_energy + step.vector_writes.sum(1) * write_energy)
    control = float(chip.technology["clock.energy"]) + float(chip.technology["control.energy"])
    arithmetic = step.vector_ops * chip.vector_energy()
    np.testing.assert_allclose(cost.vector_energy, traffic + arithmetic * (1 + control), rtol=1e-5)
    cycles = np.maximum(moved / float(chip.bits_per_cycle()[-1]), step.vector_ops / float(chip.vector_lanes))
    np.testing.assert_allclose(cost.vector_latency, cycles / float(chip.frequency()), rtol=1e-5)
    assert float(cost.transfer_energy.sum()) == 0.0
    latency = float(alone.latency.sum() + cost.vector_latency.sum())
    energy = float(alone.energy.sum() + cost.vector_energy.sum()) + float(chip.leakage_power()) * latency
    assert float(cost.latency) == pytest.approx(latency, rel=1e-5)
    assert float(cost.energy) == pytest.approx(energy, rel=1e-5)
    assert float(cost.edp) == pytest.approx(energy * latency, rel=1e-5)
    assert float(cost.power) == pytest.approx(energy / latency, rel=1e-5)


def test_unlimited_sram_leaves_compulsory_traffic():
    step, chip = two_layer_step(), make_chip(shared_kib=2**20, resident_fraction=0.5)
    cost = evaluated(step, chip)
    np.testing.assert_array_equal(cost.resident, 1.0)
    batch_bits = BATCH * FEATURES * WIDTH
    assert float(cost.dram_energy) == pytest.approx(batch_bits * dram_energy(chip), rel=1e-5)
    assert float(cost.spilled_bits.sum()) == 0.0


@pytest.mark.parametrize("shared_kib", [0.5, 1.0, 64.0])
def test_total_is_the_sum_of_its_breakdown(shared_kib):
    step, chip = two_layer_step(), make_chip(shared_kib=shared_kib, resident_fraction=0.5)
    cost = evaluated(step, chip)
    assert cost.components == ("mac", "register", "local", "shared", "dram", "control", "vector", "leakage")
    assert float(cost.breakdown.sum()) == pytest.approx(float(cost.energy), rel=1e-5)
    parts = cost.operation_energy.sum() + cost.vector_energy.sum() + cost.transfer_energy.sum() + cost.leakage_energy
    assert float(parts) == pytest.approx(float(cost.energy), rel=1e-5)
    memory = cost.access_energy.sum() + cost.mac_energy.sum()
    assert float(memory) < float(cost.operation_energy.sum())  # control comes on top


def test_last_in_first_out():
    """Nested lives of 1, 3 and 5 slots and 40, 50 and 30 bits in 100: two fit, the outermost by a third."""
    operation = make_operation(N=1)
    nested = [[0, 0, 0], [1, 1, 1], [2, 2, 2], [1, 1, 1], [0, 0, 0]]
    step = make_step(stack_operations([operation] * 5), nested, [30.0, 50.0, 40.0])
    np.testing.assert_allclose(residency(step, jnp.ones(3), jnp.array(100.0)), [1 / 3, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(residency(step, jnp.ones(3), jnp.array(60.0)), [0.0, 0.4, 1.0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("times", [1, 3])
def test_kept_copy_spills_what_no_longer_fits(times):
    """60 of 100 bits are taken while the copy lives: 20 % of its 50 bits leave, written to DRAM each time."""
    operation = make_operation(N=1)
    origin, copy, large = 0, 1, 2
    operands = [[origin] * 3, [large] * 3, [copy] * 3]
    chip = make_chip(shared_kib=200 / 8192, shared_banks=1e-3, resident_fraction=0.5)
    step = make_step(
        stack_operations([operation] * 3),
        operands,
        [50.0, 50.0, 60.0],
        origin=[0, 0, 2],
        tensor_multiplicity=[times] * 3,
    )
    cost = evaluated(step, chip, width=1.0)
    np.testing.assert_allclose(cost.resident, [1.0, 0.8, 1.0], rtol=1e-5)
    np.testing.assert_allclose(cost.spilled_bits, [0.0, 10.0, 0.0], rtol=1e-4)
    np.testing.assert_allclose(cost.occupancy, [50.0, 100.0, 40.0], rtol=1e-5)
    shared = float(chip.energy_per_bit()[-2].mean())
    control = float(chip.technology["clock.energy"]) + float(chip.technology["control.energy"])
    expected = times * 10.0 * (shared * (1 + control) + dram_energy(chip))
    np.testing.assert_allclose(cost.transfer_energy, [0.0, expected, 0.0], rtol=1e-4)
    cycles = times * 10.0 / float(chip.bits_per_cycle()[-2:].min())
    np.testing.assert_allclose(cost.transfer_latency, [0.0, cycles / float(chip.frequency()), 0.0], rtol=1e-4)
    after_origin = float(cost.operation_latency[0] + cost.transfer_latency[copy])
    np.testing.assert_allclose(cost.slot_start, [0.0, after_origin, float(cost.slot_end[1])], rtol=1e-5)


def random_step(seed, num_tensors=12, num_operations=9):
    rng = np.random.default_rng(seed)
    persistent = rng.random(num_tensors) < 0.2
    operands = rng.integers(0, num_tensors, (num_operations, 3))
    operations = stack_operations([make_operation(N=1)] * num_operations)
    return make_step(operations, operands, rng.uniform(1, 50, num_tensors), persistent=persistent)


@pytest.mark.parametrize("seed", range(5))
def test_residency_and_occupancy_equal_brute_force(x64, seed):
    step = random_step(seed)
    size = np.asarray(step.tensor_elements) * 2.0
    birth, death = np.asarray(step.tensor_birth), np.asarray(step.tensor_death)
    capacity = 120.0
    occupied = [0.0] * step.num_slots
    expected = np.ones(len(size))
    for t in sorted(range(len(size)), key=lambda t: (death[t] - birth[t], t)):
        free = min([capacity - occupied[s] for s in range(birth[t], death[t] + 1)], default=capacity)
        expected[t] = min(max(free / size[t], 0.0), 1.0)
        for s in range(birth[t], death[t] + 1):
            occupied[s] += expected[t] * size[t]
    resident = np.asarray(residency(step, jnp.full(len(size), 2.0), jnp.array(capacity)))
    np.testing.assert_allclose(resident, expected, atol=1e-9)
    np.testing.assert_allclose((resident * size) @ np.asarray(step.alive()), occupied, atol=1e-9)
    assert max(occupied) <= capacity * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_occupancy_of_a_step_equals_a_sweep_over_its_slots(x64, seed):
    """A tensor is there from the first slot that names it to the last, weights always; 120 bits for all of them."""
    step = random_step(seed)
    chip = make_chip(shared_kib=240 / 8192, shared_banks=1e-3, resident_fraction=0.5)
    cost = evaluated(step, chip, width=2.0)
    bits = np.asarray(cost.resident) * 2.0 * np.asarray(step.tensor_elements)
    always = np.random.default_rng(seed).random(len(bits)) < 0.2  # drawn first in `random_step`
    for slot in range(step.num_slots):
        so_far, still = (set(np.ravel(step.operand_tensor[part])) for part in (slice(0, slot + 1), slice(slot, None)))
        there = (so_far & still) | (set(np.flatnonzero(always)) & set(np.ravel(step.operand_tensor)))
        assert float(cost.occupancy[slot]) == pytest.approx(sum(bits[t] for t in there), rel=1e-9)
    assert 60.0 < float(cost.occupancy.max()) <= 120.0 * (1 + 1e-9)


def test_more_capacity_is_never_worse():
    step = two_layer_step()
    chip = make_chip(shared_kib=2, shared_banks=1)
    shares = jnp.geomspace(0.03, 0.9, 12)
    costs = [evaluated(step, dataclasses.replace(chip, resident_fraction=share)) for share in shares]
    resident = np.stack([cost.resident for cost in costs])
    assert (np.diff(resident, axis=0) >= -1e-6).all()
    assert (np.diff([float(cost.dram_energy) for cost in costs]) <= 1e-15).all()
    assert resident[0].min() == 0.0
    assert resident[-1].min() == 1.0


def test_residency_gradients(x64):
    step = two_layer_step()
    widths = jnp.linspace(5.0, 9.0, NUM_TENSORS)
    for capacity in (700.0, 1500.0, 3000.0):
        check_grads(lambda b, c: residency(step, b, c), (widths, jnp.array(capacity)), order=1, modes=["fwd", "rev"])


@pytest.mark.slow
def test_step_gradients_equal_differences(x64):
    step, chip = two_layer_step(), make_chip(shared_kib=0.3, shared_banks=4, resident_fraction=0.5)

    def log_energy_and_latency(vdd, shared_bits, width):
        moved = dataclasses.replace(chip, vdd=vdd, size_bits=chip.size_bits.at[-2].set(shared_bits))
        cost = evaluated(step, moved, width)
        return jnp.log(jnp.stack([cost.energy, cost.latency]))

    args = (jnp.array(0.8), chip.size_bits[-2] * 1.01, jnp.array(7.3))
    _, pullback = jax.vjp(log_energy_and_latency, *args)
    gradients = [pullback(direction) for direction in jnp.eye(2)]
    for i in range(2):  # a width counts in whole slices, straight through: no difference shows that
        moves = [[a * (1 + sign * 1e-5 * (j == i)) for j, a in enumerate(args)] for sign in (1, -1)]
        difference = (log_energy_and_latency(*moves[0]) - log_energy_and_latency(*moves[1])) / (2e-5 * args[i])
        np.testing.assert_allclose([g[i] for g in gradients], difference, rtol=1e-5, atol=1e-9)
    assert gradients[0][2] > 0.0
    assert gradients[1][2] > 0.0


def test_jit_vmap_and_eager_agree():
    step, names = two_layer_step(), ("energy", "latency", "area", "occupancy", "breakdown", "resident", "utilisation")
    chips = [make_chip(shared_kib=kib, shared_banks=1) for kib in (0.2, 0.5, 2.0)]
    batched = jax.vmap(lambda chip: evaluated(step, chip))(stack_operations(chips))
    for i, cost in enumerate(evaluated(step, chip) for chip in chips):
        for name in (*names, "dram_energy"):
            np.testing.assert_allclose(getattr(batched, name)[i], getattr(cost, name), rtol=2e-5, err_msg=name)

    def joined(chip, costs, bits):
        return join(chip, step, costs, residency(step, bits, chip.size_bits[-2] * chip.resident_fraction), bits)

    arguments = (chips[0], stand_alone(step, chips[0]), jnp.full(NUM_TENSORS, WIDTH))
    eager, jitted = joined(*arguments), jax.jit(joined)(*arguments)
    for name in names:
        np.testing.assert_allclose(getattr(eager, name), getattr(jitted, name), rtol=2e-5, err_msg=name)


def test_slots_run_in_turn():
    """Each slot starts where the one before ends; external data come with the first slot that touches them."""
    step, chip = two_layer_step(), make_chip(resident_fraction=0.5)
    cost = evaluated(step, chip)
    duration = np.zeros(step.num_slots)
    duration[np.asarray(step.operation_slot)] += np.asarray(cost.operation_latency)
    duration[np.asarray(step.vector_slot)] += np.asarray(cost.vector_latency)
    duration[0] += float(cost.transfer_latency[X])
    assert float(cost.transfer_latency[X]) > 0.0
    np.testing.assert_allclose(cost.slot_end, duration.cumsum(), rtol=1e-5)
    np.testing.assert_allclose(cost.slot_start[1:], cost.slot_end[:-1], rtol=1e-5)
    assert float(cost.slot_end[-1]) == pytest.approx(float(cost.latency), rel=1e-5)


def run_from(operation, level):
    """The mapping with every loop in time at one level."""
    temporal = np.ones((4, len(LOOPS)))
    temporal[level] = np.asarray(operation.bounds)
    return make_mapping(operation, temporal)


def test_cycles_of_dram_tell_its_bits():
    """With all loops in the shared SRAM every operand crosses to DRAM once, in each of three runs."""
    operation, chip = dense(FEATURES, HIDDEN, "forward"), make_chip(resident_fraction=0.0)
    elements = [FEATURES * HIDDEN, BATCH * FEATURES, BATCH * HIDDEN]
    step = make_step(stack_operations([operation]), [[0, 1, 2]], elements, multiplicity=[3.0])
    widths = jnp.array([4.0, 8.0, 6.0])
    accesses = jax.vmap(count)(step.operations, stack_operations([run_from(operation, 2)]))
    cost = jax.jit(evaluate_step)(chip, step, accesses, widths[None], widths, jnp.ones((1, 2)))
    assert cost.level_cycles.shape == (1, 4)
    bits = np.asarray(cost.level_cycles[0] * chip.bits_per_cycle())
    np.testing.assert_allclose(bits[-1], 3 * np.dot(elements, widths), rtol=1e-5)
    per_bit = chip.energy_per_bit()[-2:].mean(axis=1) + chip.wire_energy_per_bit()[-2:]
    np.testing.assert_allclose(bits[-1] * per_bit[-1], cost.access_energy[0, -1].sum(), rtol=1e-5)
    assert bits[-2] > bits[-1]  # the array asks for more


def unrolled(operation, temporal, rows, columns):
    """A mapping with the given loops in space, (loop, factor) below the local SRAM, and the others in time there."""
    time, spatial = np.ones((4, len(LOOPS))), np.ones((4, 2, len(LOOPS)))
    time[1, [LOOPS.index(loop) for loop in temporal]] = list(temporal.values())
    for axis, (loop, factor) in enumerate((columns, rows)):
        spatial[1, axis, LOOPS.index(loop)] = factor
    return make_mapping(operation, time, spatial)


def test_weight_gradient_on_an_array_for_k_and_c():
    """ZigZag's figures for this layer, batch 4, on 16 x 16 MACs: K on columns, and rows whose sums are added up.

    Channels C are no sum of a weight gradient, so its rows lie idle and it takes 589824 cycles instead of 36864. With a
    mapping of its own, outputs P on the rows, it is as fast as the forward pass.
    """
    sizes = {"N": 4, "K": 16, "C": 16, "P": 32, "Q": 32, "R": 3, "S": 3}
    forward, gradient = (make_operation(**sizes, pass_=p) for p in ("forward", "weight_grad"))
    columns, rest = ("K", 16), {"N": 4, "Q": 32, "R": 3, "S": 3}
    mapped = {
        "forward": unrolled(forward, rest | {"P": 32}, ("C", 16), columns),
        "as forward": unrolled(gradient, rest | {"P": 32, "C": 16}, ("C", 1), columns),
        "own": unrolled(gradient, rest | {"P": 2, "C": 16}, ("P", 16), columns),
    }
    elements = [16 * 16 * 9, 4 * 16 * 34 * 34, 4 * 16 * 32 * 32]
    step = make_step(stack_operations([forward, gradient]), [[0, 1, 2]] * 2, elements)
    wide = dataclasses.replace(make_chip(mac=make_mac("fixed")), bandwidth_bits=jnp.full(4, 2.0**20))
    utilisation = {}
    for name in ("as forward", "own"):
        accesses = jax.vmap(count)(step.operations, stack_operations([mapped["forward"], mapped[name]]))
        widths = jnp.full((2, 3), 8.0), jnp.full(3, 8.0)
        cost = jax.jit(evaluate_step)(wide, step, accesses, *widths, jnp.ones((2, 2)))
        utilisation[name] = np.asarray(cost.utilisation)
        cycles = np.asarray(cost.operation_latency) * float(wide.frequency())
        np.testing.assert_allclose(cycles, [36864, {"as forward": 589824, "own": 36864}[name]], rtol=1e-5)
    np.testing.assert_allclose(utilisation["as forward"], [1.0, 0.0, 1 / 16], rtol=1e-5)
    np.testing.assert_allclose(utilisation["own"], [1.0, 0.0, 1.0], rtol=1e-5)


def test_utilisation_by_pass():
    step, chip = two_layer_step(), make_chip(resident_fraction=0.0)
    cost, alone = evaluated(step, chip), stand_alone(step, chip)
    for index in range(3):
        ids = np.flatnonzero(step.operation_pass == index)
        expected = alone.mac_cycles[ids].sum() / (256 * alone.cycles[ids].sum())
        assert float(cost.utilisation[index]) == pytest.approx(float(expected), rel=1e-5)


def test_multiplicity_scales_operations():
    operations = stack_operations([dense(3, 2, "forward")])
    chip = make_chip()
    once = evaluated(make_step(operations, [[0, 1, 2]], [6.0, 24.0, 16.0]), chip)
    thrice = evaluated(make_step(operations, [[0, 1, 2]], [6.0, 24.0, 16.0], multiplicity=[3.0]), chip)
    assert float(thrice.operation_energy[0]) == pytest.approx(3 * float(once.operation_energy[0]), rel=1e-6)
    assert float(thrice.latency) == pytest.approx(3 * float(once.latency), rel=1e-6)
    assert thrice.utilisation[1:].tolist() == [0.0, 0.0]  # no backward passes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operand_tensor": []}, "operands for each"),
        ({"operation_slot": [0, 0]}, "every slot"),
        ({"operand_tensor": [[0, 1, 2], [0, 1, 3]]}, "tensor ids"),
        ({"origin": [0, 1, 7]}, "tensor ids"),
        ({"tensor_elements": [1.0, 0.0, 1.0]}, "one element"),
        ({"origin": [0, 0, 2]}, "kept copy 1"),
    ],
)
def test_bad_steps_are_refused(change, message):
    arguments = {
        "operations": stack_operations([make_operation(N=1)] * 2),
        "operand_tensor": [[0, 1, 2], [0, 1, 2]],
        "tensor_elements": [1.0, 1.0, 1.0],
    }
    with pytest.raises(ValueError, match=message):
        make_step(**(arguments | change))
