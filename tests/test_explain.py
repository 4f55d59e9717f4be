"""Explanations: every number in the text again by hand or by perturbing the price."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hw.accesses import count
from hw.chip import make_chip
from hw.cost import evaluate
from hw.explain import DIRECTIONS, _details, quantity
from hw.mapping import make_mapping
from hw.operation import LOOPS, make_operation, stack_operations
from hw.schedule import evaluate_step, make_step

BITS = jnp.array([8.0, 4.0, 16.0])
OPERATION = make_operation(N=4, K=6, C=5)
CHIP = make_chip(rows=5, columns=3)


def product_mapping():
    """C across the rows, K across the columns and then in time in DRAM, N in the local SRAM; nothing in the registers."""
    temporal, spatial, keep = np.ones((4, 8)), np.ones((4, 2, 8)), np.ones((4, 3))
    n, k, c = (LOOPS.index(loop) for loop in "NKC")
    temporal[1, n], temporal[3, k] = 4, 2
    spatial[1, 0, k], spatial[1, 1, c] = 3, 5
    keep[0] = 0
    return make_mapping(OPERATION, temporal, spatial, keep=keep)


@pytest.fixture(scope="module")
def explained():
    cost = jax.jit(evaluate)(CHIP, OPERATION, product_mapping(), BITS)
    return cost, cost.explain(OPERATION, product_mapping(), CHIP, BITS)


def rows_of(text, level):
    """direction -> its cells, of one level of the energy table."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"{level} +[\d.]+ \w*J +[\d.]+%", line))
    found = {}
    for line in lines[start + 1 :]:
        if not line.startswith("          "):
            break
        direction, *cells = re.split(r"\s{2,}", line.strip())
        found[direction] = cells
    return found


def test_words_and_joules_by_direction_by_hand(explained):
    _, text = explained
    per_bit, wire = CHIP.energy_per_bit(), CHIP.wire_energy_per_bit()
    # DRAM: every weight is read once, K is outermost: 30. Inputs fit the local SRAM and are read once: 20. Outputs: 24.
    dram = rows_of(text, "dram")
    read = float(per_bit[3, 0] + wire[3])
    assert dram["reads"] == ["30", quantity(30 * 8 * read, "J"), "20", quantity(20 * 4 * read, "J"), "-"]
    written = float(per_bit[3, 1] + wire[3])
    assert dram["updates"] == ["-", "-", "24", quantity(24 * 16 * written, "J")]
    # The local SRAM: weights are filled once and read once per N; an input is read once for all three columns.
    local = rows_of(text, "local")
    assert local["fills"][:2] == ["30", quantity(30 * 8 * float(per_bit[1, 1]), "J")]
    assert local["reads"][0] == "120" and local["reads"][2] == "40"
    assert "register  0 J" in text


def test_directions_add_up_to_the_access_energy(explained):
    cost, _ = explained
    resident = jnp.array([0.25, 1.0, 0.0])
    for rho in (jnp.zeros(3), resident):
        cost = jax.jit(evaluate)(CHIP, OPERATION, product_mapping(), BITS, jnp.ones(2), rho)
        _, joules, _ = _details(CHIP, OPERATION, product_mapping(), BITS, jnp.ones(2), rho)
        assert joules.shape[0] == len(DIRECTIONS)
        np.testing.assert_allclose(joules.sum(axis=0), cost.access_energy, rtol=1e-5)
    assert "resident in shared: weights 25%, inputs 100%" in cost.explain(
        OPERATION, product_mapping(), CHIP, BITS, None, resident
    )


def test_constants_are_those_that_move_the_joules(explained):
    """Raise one constant by a thousandth: a component's joules rise by its share of that."""
    cost, text = explained
    *_, shares = _details(CHIP, OPERATION, product_mapping(), BITS, jnp.ones(2), jnp.zeros(3))
    for name in ("dram.energy", "sram.energy.k", "gate.energy", "wire.energy", "clock.energy"):
        values = CHIP.technology.values | {name: CHIP.technology[name] * 1.01}
        raised = dataclasses.replace(CHIP, technology=dataclasses.replace(CHIP.technology, values=values))
        after = jax.jit(evaluate)(raised, OPERATION, product_mapping(), BITS)

        def components(one):
            return np.array([*one.access_energy.sum(axis=1), one.mac_energy, one.control_energy], float)

        before = components(cost)
        rise = (components(after) - before)[1:] / before[1:] / 0.01  # nothing is in the registers
        np.testing.assert_allclose(shares[name][1:], rise, atol=2e-3, err_msg=name)
    assert re.search(r"^dram +dram\.energy 100%|^dram +dram\.energy 99%", text, re.M)
    constant = CHIP.technology.constant("dram.energy")
    low, high = constant.low * 1e12, constant.high * 1e12
    stated = f"dram.energy = {constant.value * 1e12:.4g} pJ/bit ({low:.3g} to {high:.3g}): {constant.source}"
    assert " ".join(stated.split()) in " ".join(text.split())


def test_what_bounds_latency_and_lost_utilisation(explained):
    cost, text = explained
    # 15 of 15 MACs are busy: 120 products in 8 slots of 2 cycles each (8 b x 4 b in slices of 4 b).
    assert "100.0% spatial (15 of 15 MACs) x 100.0% temporal" in text
    cycles = {"MACs": float(cost.compute_cycles)} | dict(zip(CHIP.names, map(float, cost.level_cycles), strict=True))
    assert f"bound by {max(cycles, key=cycles.get)}" in text
    assert cycles["MACs"] == 8 * 2


def test_overflow_is_told_in_bits():
    small = dataclasses.replace(CHIP, size_bits=CHIP.size_bits.at[1].set(100.0))
    cost = jax.jit(evaluate)(small, OPERATION, product_mapping(), BITS)
    # A tile of 3 x 5 weights, 4 x 5 inputs and 4 x 3 outputs; they leave complete, at their own width.
    over = 15 * 8 + 20 * 4 + 12 * 16 - 100
    assert f"capacity local 100, too much by {over} bits" in cost.explain(OPERATION, product_mapping(), small, BITS)


def test_step_cost_shows_its_components():
    step = make_step(stack_operations([OPERATION]), [[0, 1, 2]], [30.0, 20.0, 24.0])
    accesses = jax.jit(jax.vmap(count))(step.operations, stack_operations([product_mapping()]))
    whole = jax.jit(evaluate_step)(CHIP, step, accesses, BITS[None], jnp.array([8.0, 4.0, 16.0]), jnp.ones((1, 2)))
    page = whole._repr_html_()
    for name, joules in zip(whole.components, whole.breakdown, strict=True):
        assert f"<td>{name}</td><td>{quantity(joules, 'J')}</td>" in page
    assert "every operation fits" in page and "forward" in page
