"""Chips: validation, area, clock, leakage, and that every float of one can be optimised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hw.arithmetic import FLOAT_STYLES, INTEGER_STYLES, mac_area, make_mac
from hw.chip import make_chip
from hw.chips import CHIPS
from hw.technology import make_technology


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


@pytest.mark.parametrize("style", [*INTEGER_STYLES, *FLOAT_STYLES])
def test_every_style_of_mac_builds(style):
    chip = make_chip(mac=make_mac(style))
    assert chip.area().macs == pytest.approx(256 * float(mac_area(chip.mac, chip.technology)))


def test_wires_are_as_long_as_what_lies_below():
    chip = make_chip(rows=8, columns=4)
    area = chip.area()
    # Local SRAM to 32 MACs with their registers; 0.15 pJ per bit and mm at 1 V.
    side_mm = float(area.macs + area.memories[0]) ** 0.5 * 1e3
    assert chip.wire_energy_per_bit()[1] == pytest.approx(0.15e-12 * side_mm * float(chip.vdd) ** 2)
    assert (jnp.diff(chip.wire_energy_per_bit()) > 0).all()


def test_a_measured_clock_is_kept_and_scaled():
    chip = make_chip(vdd=1.0, node_nm=65, frequency_hz=250e6)
    assert chip.frequency() == pytest.approx(250e6)
    slower = dataclasses.replace(chip, vdd=jnp.array(0.7))
    law = make_chip(vdd=0.7, node_nm=65).frequency() / make_chip(vdd=1.0, node_nm=65).frequency()
    assert slower.frequency() == pytest.approx(250e6 * law)


def test_there_is_a_minimum_energy_supply_and_the_gradient_finds_it():
    chip = make_chip(technology=make_technology(28, device="lop"))

    def energy(vdd):
        """A vector operation per cycle, and what leaks meanwhile."""
        supplied = dataclasses.replace(chip, vdd=vdd)
        return 1e12 * (supplied.vector_energy() + supplied.leakage_power() / supplied.frequency())

    supplies = jnp.linspace(0.25, 0.9, 66)
    energies = jax.vmap(energy)(supplies)
    best = int(energies.argmin())
    assert 0 < best < 65
    slope = jax.vmap(jax.grad(energy))(supplies)
    assert (slope[:best] < 0).all() and (slope[best + 1 :] > 0).all()


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
        ({"resident_fraction": 1.0}, r"in \[0, 1\)"),
        ({"local_kib": 1, "local_banks": 32}, "local banks of 64 bytes or more"),
        ({"node_nm": 3}, "nearest is 7"),
        ({"node_nm": 65, "technology": make_technology(28)}, "either node_nm or technology"),
    ],
)
def test_misuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_chip(**arguments)


def test_a_chip_shows_itself():
    html = make_chip()._repr_html_()
    assert "16 x 16 MACs (slices), 28 nm, 0.9 V" in html and "<td>shared</td>" in html
