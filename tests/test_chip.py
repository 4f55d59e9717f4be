"""Chips: validation, area, clock, leakage, and that every float of one can be optimised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hw.arithmetic import FLOAT_STYLES, INTEGER_STYLES, cycle_energy, mac_area, make_mac
from hw.chip import make_chip
from hw.chips import CHIPS
from hw.technology import clock_frequency, make_technology


@pytest.mark.parametrize("name", CHIPS)
def test_presets_have_a_plausible_size_and_finite_gradients(name):
    chip = CHIPS[name]()
    area = chip.area()
    assert area.total == pytest.approx(area.macs + area.memories.sum() + area.vector + area.control)
    assert 0.2e-6 < area.total < 20e-6
    assert 1e8 < chip.frequency() < 2e9
    assert 0 < chip.leakage_power() < 0.1

    def everything(chip):
        return (
            chip.area().total * 1e6
            + chip.leakage_power()
            + chip.frequency() * 1e-9
            + chip.energy_per_bit().sum() * 1e12
        )

    value, gradient = jax.value_and_grad(everything)(chip)
    assert jax.jit(everything)(chip) == pytest.approx(float(value), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_area_by_hand():
    chip = make_chip(rows=8, columns=4, register_bits=128, node_nm=45, mac=make_mac("fixed", accumulator_bits=24.0))
    area = chip.area()
    # 32 MACs of 37.5 * 7.5 * 7.5 + 63.5 * 23 = 3569.875 transistors; 32 register files of 47.6 * 128 = 6092.8.
    assert area.macs == pytest.approx(32 * 3569.875 * 0.12e-12)
    assert area.memories[0] == pytest.approx(32 * 6092.8 * 0.12e-12)
    assert area.memories[3] == 0.0
    assert area.vector == pytest.approx(8 * 11884e-12)
    assert area.control == pytest.approx(0.4 * (area.macs + area.memories.sum() + area.vector))
    assert chip.instances().tolist() == [32, 1, 1, 1] and chip.num_macs() == 32


def test_clusters_feed_their_macs_over_shorter_wires():
    one = make_chip(rows=16, columns=24, local_kib=48, local_banks=12, local_bandwidth_bits=768)
    six = make_chip(rows=8, columns=8, local_kib=8, local_banks=2, local_bandwidth_bits=128, clusters=(3, 2))
    assert six.num_macs() == one.num_macs() and six.instances().tolist() == [384, 6, 1, 1]
    assert float(six.area().total) == pytest.approx(float(one.area().total), rel=1e-6)
    local, shared = (level.item() for level in (six.wire_energy_per_bit() / one.wire_energy_per_bit())[1:3])
    # 8 + 8 hops against 16 + 24; from the shared memory 3 + 2 hops to six clusters against one to the whole.
    assert local == pytest.approx(16 / 40) and shared == pytest.approx(2.5 / 6**0.5, rel=1e-6)


@pytest.mark.parametrize("style", [*INTEGER_STYLES, *FLOAT_STYLES])
def test_every_style_of_mac_builds(style):
    chip = make_chip(mac=make_mac(style))
    assert chip.area().macs == pytest.approx(256 * float(mac_area(chip.mac, chip.technology)))


def test_a_measured_clock_is_kept_and_scaled():
    chip = make_chip(vdd=1.0, node_nm=65, frequency_hz=250e6)
    assert chip.frequency() == pytest.approx(250e6)
    slower = dataclasses.replace(chip, vdd=jnp.array(0.7))
    law = make_chip(vdd=0.7, node_nm=65).frequency() / make_chip(vdd=1.0, node_nm=65).frequency()
    assert slower.frequency() == pytest.approx(250e6 * law)


def test_measured_pairs_are_met_and_joined(x64):
    # Eyeriss: 100, 200, 250 MHz at 0.82, 1.0, 1.17 V.
    pairs = ((0.82, 100e6), (1.0, 200e6), (1.17, 250e6))
    chip = make_chip(node_nm=65, vdd=1.0, frequency_hz=pairs)

    def frequency(vdd):
        return dataclasses.replace(chip, vdd=vdd).frequency()

    for vdd, hertz in pairs:
        assert frequency(jnp.array(vdd)) == pytest.approx(hertz)
    # Half-way from 0.82 to 1.0 V: the geometric mean.
    assert frequency(jnp.array(0.91)) == pytest.approx((100e6 * 200e6) ** 0.5)
    law = [clock_frequency(chip.technology, vdd) for vdd in (0.6, 0.82)]
    assert frequency(jnp.array(0.6)) == pytest.approx(100e6 * float(law[0] / law[1]))
    assert (jnp.diff(jax.vmap(frequency)(jnp.linspace(0.4, 1.3, 200))) > 0).all()


def test_the_clock_of_one_pair_moves_as_the_law_does(x64):
    law, measured = make_chip(vdd=0.8), make_chip(vdd=0.8, frequency_hz=50e6)
    slopes = [
        jax.grad(lambda vdd, chip=chip: jnp.log(dataclasses.replace(chip, vdd=vdd).frequency()))(jnp.array(0.8))
        for chip in (law, measured)
    ]
    assert slopes[0] == pytest.approx(float(slopes[1])) and slopes[0] > 0


def test_each_domain_pays_for_its_own_supply():
    one, two = make_chip(vdd=0.5), make_chip(vdd=0.5, local_vdd=0.63, shared_vdd=0.7)
    np.testing.assert_allclose(two.level_vdd(), [0.5, 0.63, 0.7, 0.5], rtol=1e-6)
    ratio = two.energy_per_bit() / one.energy_per_bit()
    np.testing.assert_allclose(ratio[:, 0], [1.0, (0.63 / 0.5) ** 2, (0.7 / 0.5) ** 2, 1.0], rtol=1e-5)
    assert two.leakage_power() > one.leakage_power()
    # Memories that are faster than the array do not speed it up; slower ones hold it back.
    assert two.frequency() == one.frequency()
    held = make_chip(vdd=0.9, shared_vdd=0.6)
    assert held.frequency() == pytest.approx(float(make_chip(vdd=0.6).frequency()))
    # Domains keep their ratio where the supply moves.
    moved = dataclasses.replace(two, vdd=jnp.array(1.0))
    np.testing.assert_allclose(moved.level_vdd(), [1.0, 1.26, 1.4, 1.0], rtol=1e-6)


def energy_per_cycle(chip):
    """Picojoules of a cycle in which all MACs and all ports on the chip are busy, and what leaks meanwhile."""
    macs = chip.num_macs() * cycle_energy(chip.mac, chip.technology, chip.vdd, 24.0)
    moved = (chip.instances() * chip.bits_per_cycle())[:-1] * (
        chip.energy_per_bit()[:, 0] + chip.wire_energy_per_bit()
    )[:-1]
    return 1e12 * (macs + moved.sum() + chip.leakage_power() / chip.frequency())


@pytest.mark.parametrize("local_vdd", [None, 0.63 / 0.5 * 0.9], ids=["one domain", "memories higher"])
def test_there_is_a_minimum_energy_supply_and_the_gradient_finds_it(local_vdd, x64):
    chip = make_chip(technology=make_technology(28, device="lop"), vdd=0.9, local_vdd=local_vdd, shared_vdd=local_vdd)
    logarithm = jax.jit(lambda vdd: jnp.log(energy_per_cycle(dataclasses.replace(chip, vdd=vdd))))
    supplies = jnp.linspace(0.2, 0.9, 141)
    energies = jax.vmap(logarithm)(supplies)
    best = int(energies.argmin())
    assert 0 < best < 140
    slopes = jax.vmap(jax.grad(logarithm))(supplies)
    assert (slopes[:best] < 0).all() and (slopes[best + 1 :] > 0).all()
    # Plain gradient descent from the nominal supply ends where the sweep has its minimum.
    supply = jnp.array(0.9)
    for _ in range(300):
        supply -= 0.01 * jax.grad(logarithm)(supply)
    assert supply == pytest.approx(float(supplies[best]), abs=0.005)
    assert abs(jax.grad(logarithm)(supply)) < 1e-4


def test_leakage_grows_as_the_clock_slows_and_moves_the_minimum_up(x64):
    fast = make_chip(technology=make_technology(28, device="lop"))
    slow = make_chip(technology=fast.technology, frequency_hz=0.1 * float(fast.frequency()))
    assert slow.leakage_power() / slow.frequency() == pytest.approx(10 * float(fast.leakage_power() / fast.frequency()))
    supplies = jnp.linspace(0.2, 0.9, 141)
    best = [
        int(jax.vmap(lambda vdd, chip=chip: energy_per_cycle(dataclasses.replace(chip, vdd=vdd)))(supplies).argmin())
        for chip in (fast, slow)
    ]
    assert 0 < best[0] < best[1] < 140


def test_gradients_in_every_float(x64):
    chip = make_chip()
    finite = dataclasses.replace(chip, size_bits=chip.size_bits.at[-1].set(1e12))
    leaves, structure = jax.tree.flatten(finite)

    def logarithms(scale):
        scaled = jax.tree.unflatten(structure, [leaf * scale[i] for i, leaf in enumerate(leaves)])
        area = jnp.stack([scaled.area().total, scaled.area().macs])
        return jnp.log(jnp.concatenate([area, scaled.energy_per_bit().ravel(), scaled.leakage_power()[None]]))

    check_grads(logarithms, (jnp.ones(len(leaves)),), order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows positive"),
        ({"vdd": -0.9}, "vdd positive"),
        ({"shared_kib": float("nan")}, "shared_kib positive and finite"),
        ({"frequency_hz": 0.0}, "frequency_hz positive"),
        ({"shared_vdd": 0.0}, "shared_vdd positive"),
        ({"frequency_hz": ((0.9, 1e8), (0.8, 2e8))}, "positive and rising"),
        ({"frequency_hz": ((0.8, 2e8), (0.9, 1e8))}, "positive and rising"),
        ({"frequency_hz": ()}, "rising pairs of"),
        ({"resident_fraction": 1.0}, r"in \[0, 1\)"),
        ({"local_kib": 1, "local_banks": 32}, "local banks of 64 bytes or more"),
        ({"clusters": (2, 0)}, "clusters_along_y positive"),
        ({"node_nm": 3}, "nearest is 7"),
        ({"node_nm": 65, "technology": make_technology(28)}, "either node_nm or technology"),
    ],
)
def test_misuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_chip(**arguments)


def test_a_chip_shows_itself():
    html = make_chip()._repr_html_()
    assert "16 x 16 MACs (slices), 28 nm, 0.9 V, " in html and "<td>shared</td>" in html
    assert "0.5 V (local 0.63 V)" in make_chip(vdd=0.5, local_vdd=0.63)._repr_html_()
