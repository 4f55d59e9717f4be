"""Prices of counted accesses: by hand, invariants, gradients, transformations, explanations."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hw.accesses import count
from hw.arithmetic import make_mac
from hw.chip import make_chip
from hw.chips import CHIPS
from hw.cost import evaluate, excess, price
from hw.mapping import Mapping, make_mapping, outermost_mapping
from hw.operation import LOOPS, PASSES, make_operation
from hw.technology import sample_technologies

BITS = (8.0, 8.0, 8.0)
EVALUATE, COUNT, PRICE = map(jax.jit, (evaluate, count, price))


def convolution(pass_="forward"):
    return make_operation(N=4, K=32, C=16, P=8, Q=8, R=3, S=3, pass_=pass_)


def tiled(operation, keep=None):
    """K and C on the array, everything kept unless told otherwise; a tile of each level fits the default chip."""
    temporal, spatial = np.ones((4, 8)), np.ones((4, 2, 8))
    for level, factors in enumerate(({"P": 4}, {"P": 2, "Q": 8, "R": 3}, {"S": 3, "K": 2}, {"N": 4})):
        for loop, factor in factors.items():
            temporal[level, LOOPS.index(loop)] = factor
    spatial[1, 0, LOOPS.index("K")] = spatial[1, 1, LOOPS.index("C")] = 16
    return make_mapping(operation, temporal, spatial, keep=keep)


def cost(chip=None, operation=None, bits=BITS, **arguments):
    operation = convolution() if operation is None else operation
    chip = make_chip() if chip is None else chip
    arguments = {name: jnp.array(value) for name, value in arguments.items()}
    return EVALUATE(chip, operation, tiled(operation), jnp.array(bits), **arguments)


def counted(**words):
    """Accesses of a made-up nest on four levels; all zero but for what is given."""
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(count, convolution(), tiled(convolution())))
    slots = {"compute_cycles": jnp.array(1000.0), "macs": jnp.array(4000.0), "instances": jnp.array([4.0, 1, 1, 1])}
    return dataclasses.replace(nothing, **(slots | words))


def test_a_level_of_no_size_is_as_if_it_were_not_there():
    """Sixteen by sixteen MACs below the shared SRAM, once as a chip of three levels, once with a local SRAM of no size."""
    full = make_chip(rows=16, columns=16)
    without = dataclasses.replace(full, size_bits=full.size_bits.at[1].set(0.0))
    there = np.array([0, 2, 3])
    fields = {name: getattr(full, name)[there] for name in ("size_bits", "bandwidth_bits", "banks", "relative_vdd")}
    tags = {name: tuple(np.array(getattr(full, name))[there]) for name in ("kinds", "ports", "names")}
    three = dataclasses.replace(full, fanout=full.fanout[jnp.array([0, 1, 3])], **fields, **tags)
    assert float(without.area().total) == pytest.approx(float(three.area().total), rel=1e-6)
    assert float(without.leakage_power()) == pytest.approx(float(three.leakage_power()), rel=1e-6)

    operation = convolution()
    keep = np.ones((4, 3))
    keep[1] = 0.0
    mapping, temporal = tiled(operation, keep), np.ones((3, 8))
    temporal[0], temporal[2] = mapping.temporal[0], mapping.temporal[3]
    temporal[1] = mapping.temporal[1] * mapping.temporal[2]
    # The loops in time of the missing level run inside those of the next.
    order = jnp.stack([mapping.order[0], jnp.where(mapping.temporal[1] > 1, 0, 8) + mapping.order[2], mapping.order[3]])
    other = Mapping(jnp.asarray(temporal), mapping.spatial[:3], jnp.argsort(jnp.argsort(order)), jnp.ones((3, 3)))
    ours, theirs = (EVALUATE(c, operation, m, jnp.array(BITS)) for c, m in ((without, mapping), (three, other)))
    assert float(ours.violation.max()) == float(theirs.violation.max()) == 0.0
    for name in ("energy", "cycles", "latency"):
        assert float(getattr(ours, name)) == pytest.approx(float(getattr(theirs, name)), rel=1e-5), name
    np.testing.assert_allclose(np.asarray(ours.access_energy)[there], theirs.access_energy, rtol=1e-5)
    kept = EVALUATE(without, operation, tiled(operation), jnp.array(BITS))
    assert float(kept.violation[1]) > 1e3  # and nothing can be kept there


def test_price_by_hand():
    chip = make_chip(rows=2, columns=2, node_nm=45, mac=make_mac("fixed"))
    operation = make_operation(K=8, C=16)
    dram_reads = jnp.zeros((4, 3)).at[3, 0].set(1000.0)
    dram_updates = jnp.zeros((4, 3)).at[3, 2].set(500.0)
    accesses = counted(reads=dram_reads, updates=dram_updates, finals=dram_updates.at[3, 2].set(300.0))
    result = price(chip, operation, accesses, jnp.array([8.0, 4.0, 16.0]), jnp.ones(2), jnp.zeros(3))
    # Partial sums of 8 x 4 bit products over C = 16: 16 bits. DRAM: 1000 * 8 bits read; 300 * 16 + 200 * 16 written.
    # The bits cross the chip: a square of the area below DRAM, 0.15 pJ per bit, mm and V^2.
    area = chip.area()
    side_mm = float(area.macs + area.memories.sum()) ** 0.5 * 1e3
    per_bit = 8e-12 + 0.15e-12 * float(chip.vdd) ** 2 * side_mm
    assert result.access_energy[3].tolist() == pytest.approx([8000 * per_bit, 0.0, 8000 * per_bit])
    # One bus for reads and writes, 64 bits per cycle: 250 cycles; 1000 product slots bind.
    assert result.level_cycles[3] == pytest.approx(250.0) and result.cycles == 1000.0
    # 13.8 * 64 + 13.6 * 16 + 7.4 * 16 = 1219.2 units of 0.24 fJ at 45 nm, 1.0 V nominal against 0.9 V.
    vdd = float(chip.vdd)
    assert result.mac_energy == pytest.approx(4000 * 1219.2 * 0.24e-15 * (vdd / 0.9) ** 2)
    assert result.control_energy == pytest.approx(0.3 * float(result.mac_energy))  # DRAM pays none
    assert result.latency == pytest.approx(1000 / float(chip.frequency()))
    assert result.macs == 4000


def register_energy_of_outputs(mac, temporal, spatial=None, bits=4.0, order=None, **sizes):
    """Joules of the outputs at the registers of four MACs in a column; those of a bit read, written and filled there."""
    chip = make_chip(rows=4, columns=1, mac=mac)
    operation = make_operation(**sizes)
    factors, fan_out = np.ones((4, 8)), np.ones((4, 2, 8))
    for level, loops in enumerate(temporal):
        for loop, factor in loops.items():
            factors[level, LOOPS.index(loop)] = factor
    for loop, factor in (spatial or {}).items():
        fan_out[1, 1, LOOPS.index(loop)] = factor
    mapping = make_mapping(operation, factors, fan_out, order)
    result = PRICE(chip, operation, COUNT(operation, mapping), jnp.full(3, bits), jnp.ones(2), jnp.zeros(3))
    wire = float(chip.wire_energy_per_bit()[0])
    read, write = map(float, chip.energy_per_bit()[0])
    return result.access_energy[0, 2], read + wire, write + wire, write


def test_products_that_share_a_cycle_are_one_partial_sum():
    # 16 products of 4 x 4 bits. Sums have 8 + log2 16 = 12 bits, the last one is stored in 4.
    apart, read, write, _ = register_energy_of_outputs(make_mac("fixed"), [{"C": 16}], C=16)
    assert apart == pytest.approx(15 * 12 * read + (15 * 12 + 4) * write)
    # Two by two products of two bricks each share a cycle: 4 sums reach the register, 3 are added to what is there.
    bricks, *_ = register_energy_of_outputs(make_mac("fusion", slice_bits=2.0), [{"C": 16}], C=16)
    assert bricks == pytest.approx(3 * 12 * read + (3 * 12 + 4) * write)
    # Three products share a table: 16 / 3 sums.
    table, read, write, _ = register_energy_of_outputs(make_mac("lut"), [{"C": 16}], C=16)
    assert table == pytest.approx((16 / 3 - 1) * 12 * read + ((16 / 3 - 1) * 12 + 4) * write)
    # C 2 inside K 8 inside C 8: every sum has two products a visit, so each of its 8 visits is one access.
    order = np.tile(np.arange(8), (4, 1))
    order[1, [LOOPS.index("K"), LOOPS.index("C")]] = 2, 3
    visits, read, write, fill = register_energy_of_outputs(
        make_mac("fusion", slice_bits=2.0), [{"C": 2}, {"K": 8, "C": 8}], C=16, K=8, order=order
    )
    # 64 updates, 8 of them first; a visit that goes on fetches what it left, 56 fills.
    assert visits == pytest.approx(56 * 12 * (read + write + fill) + 8 * 4 * write)


def test_units_behind_an_adder_tree_hold_one_copy_of_a_sum():
    # 16 products on 4 MACs: apart each adds up 4 of its own, 4 updates and 3 reads. Behind one tree 4 sums of 4.
    apart, read, write, _ = register_energy_of_outputs(make_mac("fixed"), [{"C": 4}], {"C": 4}, C=16)
    assert apart == pytest.approx(4 * 12 * (3 * read + 4 * write))
    tree, read, write, _ = register_energy_of_outputs(make_mac("fixed", tree=4), [{"C": 4}], {"C": 4}, C=16)
    assert tree == pytest.approx(12 * (3 * read + 4 * write))
    # MACs that make different outputs have nothing to add up.
    apart, *_ = register_energy_of_outputs(make_mac("fixed"), [{"C": 4}], {"K": 4}, C=4, K=4)
    tree, *_ = register_energy_of_outputs(make_mac("fixed", tree=4), [{"C": 4}], {"K": 4}, C=4, K=4)
    assert tree == pytest.approx(float(apart), rel=0.05)  # a MAC with a tree is larger, and so its wires longer


def test_slices_multiply_cycles_and_density_divides_them():
    four, one = cost(bits=(8.0, 8.0, 8.0)), cost(bits=(4.0, 4.0, 4.0))
    assert four.compute_cycles == pytest.approx(4 * float(one.compute_cycles))
    assert four.mac_cycles == 4 * one.macs
    sparse = cost(density=(0.5, 0.25))
    assert sparse.compute_cycles == pytest.approx(float(four.compute_cycles) / 8)
    assert sparse.mac_energy == pytest.approx(float(four.mac_energy) / 8)


@pytest.mark.parametrize("pass_", PASSES)
def test_total_is_the_sum_of_its_parts(pass_):
    result = cost(operation=convolution(pass_))
    parts = result.mac_energy + result.access_energy.sum() + result.control_energy
    assert result.energy == pytest.approx(float(parts))
    assert result.latency == pytest.approx(float(result.cycles / make_chip().frequency()))
    assert result.cycles == max(float(result.compute_cycles), float(result.level_cycles.max()))


def test_gated_zeros_save_energy_but_no_cycles():
    mac = make_mac("fixed", (16.0, 16.0), gates=True)
    dense, gated = (cost(make_chip(mac=mac), density=density) for density in ((1.0, 1.0), (0.5, 0.25)))
    assert gated.mac_energy == pytest.approx(float(dense.mac_energy) / 8)
    assert gated.compute_cycles == dense.compute_cycles and gated.latency == dense.latency


def test_read_operands_follow_the_pass():
    mac = make_mac("slices", widths=(4.0, 12.0))
    # The accumulated operand is not multiplied: 12 bits fit where they are second, and 4 where they are first.
    fits = {"forward": (4.0, 12.0, 99.0), "input_grad": (4.0, 99.0, 12.0), "weight_grad": (99.0, 4.0, 12.0)}
    for pass_, bits in fits.items():
        result = cost(make_chip(mac=mac), convolution(pass_), bits)
        assert result.violation[-3:-1].tolist() == [0.0, 0.0]
        assert result.compute_cycles == 3 * result.macs / 256


def test_wider_operands_and_narrower_memories_never_help():
    widths = jnp.arange(2.0, 17.0)
    mapping = tiled(convolution())
    by_bits = jax.vmap(lambda bits: EVALUATE(make_chip(), convolution(), mapping, jnp.stack([bits] * 3)))(widths)
    for quantity in (by_bits.energy, by_bits.latency, by_bits.violation.sum(axis=1)):
        assert (jnp.diff(quantity) >= 0).all()
    assert (jnp.diff(by_bits.energy) > 0).all()

    def at(level, scale):
        chip = make_chip(mac=make_mac("fixed"))
        return cost(dataclasses.replace(chip, bandwidth_bits=chip.bandwidth_bits.at[level].multiply(scale)))

    for level in range(4):
        latency = [float(at(level, 2.0**i).latency) for i in range(-6, 3)]
        assert latency == sorted(latency, reverse=True) and latency[0] > latency[-1]


def test_misfits_are_relative_excess_by_name():
    chip = make_chip(rows=8, columns=16, register_bits=64, mac=make_mac("fixed", accumulator_bits=20.0))
    excess = dict(zip(chip.limit_names(), cost(chip, bits=(8.0, 10.0, 8.0)).violation.tolist(), strict=True))
    # Register: 1 weight, 4 inputs, 4 partial sums of 18 + log2(144) bits. C = 16 on 8 rows. 10 bits on 8.
    partial = 18 + np.log2(144)
    expected = {
        "capacity register": (8 + 4 * 10 + 4 * partial) / 64 - 1,
        "fan-out local Y": 1.0,
        "second operand width": 0.25,
        "accumulator width": partial / 20 - 1,
    }
    assert {name: over for name, over in excess.items() if over} == pytest.approx(expected)


def test_sums_that_are_rounded_move_and_fit_as_their_accumulator_is_wide():
    def at(rounds):
        mac = make_mac("fixed", accumulator_bits=16.0, rounds=rounds)
        return cost(make_chip(rows=8, columns=16, register_bits=64, mac=mac))

    exact, rounded = at(rounds=False), at(rounds=True)
    width = 16 + np.log2(144)
    # Sums alone rest in the registers; what else they hold is not rounded.
    assert rounded.access_energy[0, 2] / exact.access_energy[0, 2] == pytest.approx(16 / width, rel=1e-6)
    assert (rounded.access_energy[0, :2] == exact.access_energy[0, :2]).all()
    assert rounded.mac_energy < exact.mac_energy and rounded.violation[-1] == 0.0 < exact.violation[-1]


@pytest.mark.parametrize("side", [6, 7, 11, 12, 14])
def test_what_just_fits_is_no_violation_in_a_batch_either(side):
    """A quotient by a limit that a batch shares is a product with its inverse in XLA: 14 / 14 would exceed 1."""
    operation = make_operation(K=side, C=side, P=5)
    spatial = np.ones((4, 2, 8))
    spatial[1, 0, LOOPS.index("K")] = spatial[1, 1, LOOPS.index("C")] = side
    temporal = np.ones((4, 8))
    temporal[3, LOOPS.index("P")] = 5
    mapping = make_mapping(operation, temporal, spatial)
    chip = make_chip(rows=side, columns=side, register_bits=24.0 * 3)  # a weight, an input, a partial sum
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 16), mapping)
    arguments = chip, operation, batch, jnp.full(3, 24.0)
    lowered = jax.jit(jax.vmap(evaluate, (None, None, 0, None))).lower(*arguments)
    many = lowered.compile({"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False})(
        *arguments
    )
    assert many.violation[:, 4:12].max() == 0.0
    assert excess(jnp.arange(1.0, 65.0), jnp.arange(1.0, 65.0)).max() == 0.0
    assert excess(jnp.array([3.0, 6.0]), jnp.array([4.0, 4.0])).tolist() == [0.0, 0.5]


def test_resident_tensors_leave_dram():
    alone, resident = cost(), cost(resident=(1.0, 1.0, 1.0))
    assert alone.access_energy[3].min() > 0 and (resident.access_energy[3] == 0).all()
    # Weights and inputs are no longer filled; outputs, complete when they leave the shared level, never were.
    filled = alone.access_energy[2] - resident.access_energy[2]
    assert (filled[:2] > 0).all() and filled[2] == 0
    assert (resident.access_energy[:2] == alone.access_energy[:2]).all()
    half = cost(resident=(0.5, 0.5, 0.5))
    assert half.access_energy.ravel().tolist() == pytest.approx(
        ((alone.access_energy + resident.access_energy) / 2).ravel().tolist()
    )


def test_a_resident_tensor_that_bypasses_the_shared_memory_is_served_by_it():
    operation, chip = convolution(), make_chip()
    keep = np.ones((4, 3))
    keep[2, 0] = 0
    mapping = tiled(operation, keep)
    alone = EVALUATE(chip, operation, mapping, jnp.array(BITS))
    resident = EVALUATE(chip, operation, mapping, jnp.array(BITS), resident=jnp.array([1.0, 0.0, 0.0]))
    assert alone.access_energy[2, 0] == 0 and resident.access_energy[3, 0] == 0
    dram, shared = (chip.energy_per_bit()[level, 0] + chip.wire_energy_per_bit()[level] for level in (3, 2))
    assert resident.access_energy[2, 0] == pytest.approx(float(alone.access_energy[3, 0] * shared / dram))


@pytest.mark.parametrize(("style", "pass_"), [("fixed", "forward"), ("slices", "input_grad"), ("bf16", "weight_grad")])
def test_gradients_in_chip_bits_density_and_residency(style, pass_, x64):
    operation = convolution(pass_)
    accesses = jax.jit(count)(operation, tiled(operation))
    chip = make_chip(mac=make_mac(style), vdd=0.8)
    # Scaling an infinite size has no finite differences.
    chip = dataclasses.replace(chip, size_bits=chip.size_bits.at[-1].set(1e12))

    @jax.jit
    def logarithms(size, bandwidth, banks, vdd, resident_fraction, bits, density, resident):
        scaled = dataclasses.replace(
            chip,
            size_bits=chip.size_bits * size,
            bandwidth_bits=chip.bandwidth_bits * bandwidth,
            banks=chip.banks * banks,
            vdd=vdd,
            resident_fraction=resident_fraction,
        )
        # Slices round up, with a gradient that does not: they hold still for finite differences.
        bits = jnp.array([8.0, 4.0, 8.0]) if style == "slices" else bits
        result = price(scaled, operation, accesses, bits, density, resident)
        return jnp.log(jnp.stack([result.energy, result.latency])), jnp.log(result.access_energy), result.violation

    arguments = (
        jnp.ones(4),
        jnp.ones(4),
        jnp.ones(4),
        jnp.array(0.8),
        jnp.array(0.4),
        jnp.array([7.3, 6.4, 5.6]),
        jnp.array([0.7, 0.8]),
        jnp.array([0.2, 0.3, 0.4]),
    )
    check_grads(logarithms, arguments, order=1, modes=["rev"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": (8.0, -8.0, 8.0)}, r"expected bits positive and finite, got \[8.0, -8.0, 8.0\]"),
        ({"bits": (8.0, 8.0, float("nan"))}, "expected bits positive and finite"),
        ({"density": (1.0, 1.5)}, r"expected density in \[0, 1\], got \[1.0, 1.5\]"),
        ({"resident": (0.0, float("nan"), 0.0)}, r"expected resident in \[0, 1\]"),
        ({"bits": (8.0, 8.0)}, r"expected bits of shape \(3,\), got \(2,\)"),
        ({"density": 1.0}, r"expected density of shape \(2,\), got \(\)"),
        ({"size_bits": (64.0, 0.0, 64.0, float("inf"))}, "expected the chip's size_bits positive, got"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    operation = make_operation(K=2)
    numbers = {name: jnp.array(value) for name, value in ({"bits": BITS} | arguments).items()}
    chip = make_chip()
    if "size_bits" in numbers:
        chip = dataclasses.replace(chip, size_bits=numbers.pop("size_bits"))
    with pytest.raises(ValueError, match=message):
        evaluate(chip, operation, outermost_mapping(operation, 4), **numbers)


def test_a_mapping_over_other_levels_is_an_error():
    operation = make_operation(K=2)
    with pytest.raises(ValueError, match="expected a mapping over the chip's 4 levels, got 3"):
        evaluate(make_chip(), operation, outermost_mapping(operation, 3), jnp.array(BITS))


def random_designs(num, seed=0):
    """Random chips, mappings that cover the convolution (and may not fit), bits, densities; with a leading axis."""
    random = np.random.default_rng(seed)
    chip = make_chip()

    def around(array, decades):
        shape = (num, *np.shape(array))
        return jnp.asarray(np.asarray(array) * 10 ** random.uniform(-decades, decades, shape), jnp.float32)

    chips = dataclasses.replace(
        jax.tree.map(lambda leaf: around(leaf, 0.0), chip),
        fanout=around(chip.fanout, 1.0),
        size_bits=around(chip.size_bits, 2.0),
        bandwidth_bits=around(chip.bandwidth_bits, 1.0),
        vdd=jnp.asarray(random.uniform(0.35, 1.2, num), jnp.float32),
        resident_fraction=jnp.asarray(random.uniform(0.0, 0.99, num), jnp.float32),
    )
    factors = np.ones((num, 12, 8), np.float32)  # four levels in time, then four levels of two axes in space
    for loop, primes in {
        "N": (2, 2),
        "K": (2,) * 5,
        "C": (2,) * 4,
        "P": (2, 4),
        "Q": (8,),
        "R": (3,),
        "S": (3,),
    }.items():
        for prime in primes:
            factors[np.arange(num), random.integers(0, 12, num), LOOPS.index(loop)] *= prime
    mappings = Mapping(
        temporal=jnp.asarray(factors[:, :4]),
        spatial=jnp.asarray(factors[:, 4:].reshape(num, 4, 2, 8)),
        order=jnp.asarray(random.permuted(np.tile(np.arange(8), (num, 4, 1)), axis=2), jnp.int32),
        keep=jnp.asarray(random.integers(0, 2, (num, 4, 3)), jnp.float32).at[:, 3].set(1.0),
    )
    bits = jnp.asarray(random.uniform(1.0, 32.0, (num, 3)), jnp.float32)
    return chips, mappings, bits, jnp.asarray(random.uniform(0.0, 1.0, (num, 2)), jnp.float32)


@pytest.mark.parametrize("pieces", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_gradients_of_random_designs_are_finite(pieces):
    """10 000 designs a piece, most of which do not fit."""
    operation = convolution()

    @jax.jit
    @jax.vmap
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def gradients(chip, bits, density, mapping):
        result = evaluate(chip, operation, mapping, bits, density)
        leakage = chip.leakage_power() * result.latency
        metrics = jnp.stack([result.energy + leakage, result.latency, chip.area().total])
        return jnp.log(metrics).sum() + jnp.log1p(result.violation).sum()

    for seed in range(pieces):
        chips, mappings, bits, density = random_designs(10_000, seed)
        for path, leaf in jax.tree.leaves_with_path(gradients(chips, bits, density, mappings)):
            assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def test_transformations_agree():
    operation = convolution()
    chips, mappings, bits, density = random_designs(3)

    def one(chip, mapping, bits, density):
        return evaluate(chip, operation, mapping, bits, density)

    batched = jax.jit(jax.vmap(one))(chips, mappings, bits, density)
    compiled = jax.jit(one)
    for i in range(3):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], (chips, mappings, bits, density))
        for way in (compiled, one) if i == 0 else (compiled,):
            for leaf, expected in zip(jax.tree.leaves(batched), jax.tree.leaves(way(*single)), strict=True):
                np.testing.assert_allclose(leaf[i], expected, rtol=2e-5, atol=1e-30)


def test_error_bars_enclose_the_value_and_rank_designs():
    operation, bits = convolution(), jnp.array(BITS)
    samples = sample_technologies(jax.random.key(1), 200)

    @jax.jit
    @jax.vmap
    def energies(technology):
        def energy(chip):
            return evaluate(dataclasses.replace(chip, technology=technology), operation, tiled(operation), bits).energy

        return energy(make_chip()), energy(make_chip(register_bits=288))

    small, large = energies(samples)
    low, high = jnp.quantile(small, jnp.array([0.05, 0.95]))
    assert low < cost().energy < high and high / low > 1.3
    # Constants are shared: a larger register file costs more in every sample, though the intervals overlap.
    assert (large > small).all() and high > large.min()


@pytest.mark.parametrize("name", CHIPS)
def test_explanation_names_what_binds_and_what_does_not_fit(name):
    chip, operation = CHIPS[name](), convolution()
    chip = dataclasses.replace(chip, size_bits=chip.size_bits.at[1].set(4096.0))
    bits = 32.0 if "fp32" in name else 8.0
    result = EVALUATE(chip, operation, tiled(operation), jnp.full(3, bits))
    text = result.explain(operation, tiled(operation), chip, jnp.full(3, bits))
    for part in ("for N in 4", "parallel C in 16 on Y", "accumulates outputs", "utilisation", "dram.energy = 8 pJ/bit"):
        assert part in text
    assert "bound by " + ("local" if "fp32" in name else "MACs") in text
    names = chip.limit_names()
    over = float(result.violation[names.index("capacity local")]) * 4096
    assert f"does not fit: capacity local 4096, too much by {over:.4g}" in text
    assert "level 3" in result._repr_html_() and "does not fit" in result._repr_html_()
