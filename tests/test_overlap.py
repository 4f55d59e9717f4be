"""Schedules of slots: makespans against an event simulation, bounds, lives in time, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hw.operation import make_operation, stack_operations
from hw.overlap import assign_passes, list_schedule, make_schedule
from hw.step import make_step, residency
from tests.test_schedule import DX2, KEPT, X2, random_step, two_layer_step

run = jax.jit(list_schedule)


def simulate(waits_for, duration, memory_latency):
    """Start and end of every slot: time goes on from event to event, each memory works off the head of its queue."""
    num_slots, num_memories = memory_latency.shape
    start, end = [None] * num_slots, [None] * num_slots
    queues = [[] for _ in range(num_memories)]  # [slot, seconds left]
    now = 0.0
    while None in end:
        started = True
        while started:
            started = False
            for j in range(num_slots):
                if start[j] is None and all(end[i] is not None for i in range(num_slots) if waits_for[j][i]):
                    start[j], started = now, True
                    for queue, seconds in zip(queues, memory_latency[j], strict=True):
                        if seconds > 0:
                            queue.append([j, float(seconds)])
                    break
        running = [j for j in range(num_slots) if start[j] is not None and end[j] is None]
        left = [start[j] + duration[j] - now for j in running] + [queue[0][1] for queue in queues if queue]
        pause = min(seconds for seconds in left if seconds > 1e-12)
        now += pause
        for queue in queues:
            if queue:
                queue[0][1] -= pause
                if queue[0][1] <= 1e-12:
                    queue.pop(0)
        for j in running:
            if start[j] + duration[j] <= now + 1e-12 and not any(j == job[0] for queue in queues for job in queue):
                end[j] = now
    return np.array(start), np.array(end)


def random_slots(seed, num_slots=9, num_cores=3):
    """Who waits for whom on cores with a queue each, seconds of each slot, and of two shared memories for it."""
    rng = np.random.default_rng(seed)
    core = rng.integers(0, num_cores, num_slots)
    waits_for = np.tril((rng.random((num_slots, num_slots)) < 0.2) | (core[:, None] == core[None]), -1)
    duration = rng.uniform(0.5, 2.0, num_slots)
    use = rng.random((num_slots, 2)) * (rng.random((num_slots, 2)) < 0.7)
    return waits_for, duration, duration[:, None] * use


@pytest.mark.parametrize("seed", range(20))
def test_equals_an_event_simulation(x64, seed):
    slots = random_slots(seed)
    timing, (start, end) = run(*slots), simulate(*slots)
    np.testing.assert_allclose(timing.start, start, atol=1e-9)
    np.testing.assert_allclose(timing.end, end, atol=1e-9)
    assert float(timing.latency) == pytest.approx(end.max(), abs=1e-9)


def longest_chain(waits_for, duration):
    ends = np.zeros(len(duration))
    for j in range(len(duration)):
        ends[j] = duration[j] + max((ends[i] for i in range(j) if waits_for[j, i]), default=0.0)
    return ends.max()


def test_no_bandwidth_is_used_twice_and_no_chain_is_cut(x64):
    contended = 0
    for seed in range(200):
        waits_for, duration, memory_latency = random_slots(seed)
        latency = float(run(waits_for, duration, memory_latency).latency)
        chain = longest_chain(waits_for, duration)
        assert latency >= max(chain, *memory_latency.sum(axis=0)) - 1e-9
        assert latency <= duration.sum() + 1e-9  # no schedule is slower than one slot after the other
        contended += latency > chain + 1e-9
        alone = np.zeros_like(memory_latency)
        assert float(run(waits_for, duration, alone).latency) == pytest.approx(chain, rel=1e-12)
    assert contended > 20


def test_more_cores_are_never_slower_where_no_memory_is_shared(x64):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        depends = np.tril(rng.random((10, 10)) < 0.15, -1)
        duration, core = rng.uniform(0.5, 2.0, 10), rng.integers(0, 4, 10)
        latencies = []
        for merged in (core * 0, core // 2, core):  # each has all queues of the next one joined
            waits_for = np.tril(depends | (merged[:, None] == merged[None]), -1)
            latencies.append(float(run(waits_for, duration, np.zeros((10, 2))).latency))
        assert latencies[0] == pytest.approx(duration.sum())
        assert latencies[0] >= latencies[1] - 1e-9
        assert latencies[1] >= latencies[2] - 1e-9


def test_a_memory_serves_in_the_order_of_starts():
    """Slots 0 and 1 start at once and want 3 s of one memory each; slot 2 follows slot 0."""
    waits_for = jnp.zeros((3, 3), bool).at[2, 0].set(True)
    timing = run(waits_for, jnp.array([4.0, 3.0, 1.0]), jnp.array([[3.0], [3.0], [1.0]]))
    assert timing.start.tolist() == [0.0, 0.0, 4.0]
    assert timing.end.tolist() == [4.0, 6.0, 7.0]  # slot 1 is served from 3 to 6, slot 2 from 6 to 7


def test_gradients_away_from_ties(x64):
    for seed in range(5):
        waits_for, duration, memory_latency = random_slots(seed)
        waits_for = jnp.asarray(waits_for)
        used = jnp.where(memory_latency > 0, memory_latency, 0.1)  # a memory that is not used at all is a kink

        def latency(duration, used, waits_for=waits_for):
            return list_schedule(waits_for, duration, used).latency

        check_grads(jax.jit(latency), (jnp.asarray(duration), used), order=1, modes=["rev"])


def test_who_waits_for_whom():
    """Weight gradients (slots 4 and 7) on a core of their own; slots as in `two_layer_step`."""
    step = two_layer_step()
    core = assign_passes(step, weight_grad=1)
    assert core.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0]
    schedule = make_schedule(step, core, 2)
    waits = {j: set(np.flatnonzero(row)) for j, row in enumerate(np.asarray(schedule.waits_for))}
    assert waits[3] == {0, 1, 2}  # its core
    assert waits[4] == {1, 3}  # reads X2, which is kept, and dY2
    assert waits[5] == {0, 1, 2, 3}  # not slot 4: the input gradient runs beside it
    assert waits[7] == {4, 6}  # its core, dY1; the inputs X are external
    assert waits[8] == {0, 1, 2, 3, 4, 5, 6, 7}  # the update writes the weights that others read
    in_turn = make_schedule(step, core, 2, queue=np.zeros(9, int))
    np.testing.assert_array_equal(in_turn.waits_for, np.tril(np.ones((9, 9), bool), -1))


def test_one_core_has_the_lives_of_slots_in_turn():
    for step in (two_layer_step(), *map(random_step, range(5))):
        schedule = make_schedule(step, [0] * step.num_slots, 1)
        np.testing.assert_array_equal(schedule.alive, step.alive())


def test_lives_grow_with_overlap():
    step = two_layer_step()
    alive = np.asarray(make_schedule(step, assign_passes(step, weight_grad=1), 2).alive)
    # Slot 4 reads the kept copy, and may still run when slots 5 and 6 do; slot 7 follows it on its core.
    assert np.flatnonzero(alive[KEPT]).tolist() == [3, 4, 5, 6]
    assert np.flatnonzero(alive[DX2]).tolist() == [4, 5, 6]  # slot 4 may still run when slot 5 has made it
    assert np.flatnonzero(alive[X2]).tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(10))
def test_what_is_resident_fits_at_any_time(x64, seed):
    """Tensors live in time from the start of their first to the end of their last slot, whatever slots take."""
    step, rng = random_step(seed, num_operations=12), np.random.default_rng(seed)
    core = rng.integers(0, 3, step.num_slots)
    schedule = make_schedule(step, core, 3)
    capacity, size = 120.0, 2.0 * np.asarray(step.tensor_elements)
    resident = residency(step, jnp.full(len(size), 2.0), jnp.array(capacity), schedule.alive)
    bits = np.asarray(resident) * size
    operands = np.asarray(step.operand_tensor)
    peaks = []
    for _ in range(20):
        duration = jnp.asarray(rng.uniform(0.1, 2.0, step.num_slots))
        timing = run(schedule.waits_for, duration, jnp.zeros((step.num_slots, 2)))
        start, end = np.asarray(timing.start), np.asarray(timing.end)
        for slot in range(step.num_slots):
            alive = [
                (start[(operands == t).any(1)].min(initial=np.inf) <= start[slot])
                & (end[(operands == t).any(1)].max(initial=-1.0) > start[slot] + 1e-9)
                for t in range(len(size))
            ]
            occupied = bits[np.asarray(alive)].sum()
            assert occupied <= (np.asarray(schedule.alive[:, slot]) * bits).sum() + 1e-9
            peaks.append(occupied)
    assert max(peaks) <= capacity + 1e-9
    assert max(peaks) > 0.5 * capacity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"core": [0, 1]}, "core to be 3 integers"),
        ({"core": [0.0, 1.0, 0.0]}, "core to be 3 integers"),
        ({"core": [0, 2, 0]}, "from 0 to 1"),
        ({"core": [0, -1, 0]}, "from 0 to 1"),
        ({"queue": [0, 1]}, "queue to be 3 integers"),
        ({"queue": [0, 1, 2]}, "one queue for each array"),
    ],
)
def test_bad_schedules_are_refused(change, message):
    step = make_step(stack_operations([make_operation(N=1)] * 3), [[0, 1, 2]] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match=message):
        make_schedule(step, **({"core": [0, 1, 0], "num_cores": 2} | change))
