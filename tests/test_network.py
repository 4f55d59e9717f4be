"""The on-chip network: lengths from areas, hops by enumeration, energy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hw.arithmetic import mac_area
from hw.chip import make_chip
from hw.network import delivery_energy, hop_energy, hop_length, mean_hops
from hw.technology import make_technology

TECHNOLOGY = make_technology(40)


def test_wires_cost_what_was_measured():
    # Keckler et al. 2011: 310 pJ for 256 bits over 10 mm at 40 nm, 0.9 V; the value per millimetre has two digits.
    energy = 256 * hop_energy(TECHNOLOGY, jnp.array(0.9), jnp.array(10e-3) ** 2)
    assert energy == pytest.approx(310e-12, rel=0.01)


def test_a_hop_is_the_side_of_a_tile_and_costs_its_length():
    # 0.04 mm2: 0.2 mm; 0.15 pJ per bit and mm at 1 V, a quarter of it at 0.5 V.
    assert hop_length(jnp.array(0.04e-6)) == pytest.approx(0.2e-3)
    assert hop_energy(TECHNOLOGY, jnp.array(0.5), jnp.array(0.04e-6)) == pytest.approx(0.15e-12 * 0.2 * 0.25)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (1, 7), (4, 4), (16, 3), (5, 12)])
def test_mean_hops_are_those_to_all_tiles(columns, rows):
    # From the corner of the array to the middle of every tile, along columns and rows.
    distances = [(x + 0.5) + (y + 0.5) for x in range(columns) for y in range(rows)]
    assert mean_hops(jnp.array([columns, rows], dtype=float)) == pytest.approx(np.mean(distances))


def test_wires_of_a_chip_follow_array_and_buffers():
    chip = make_chip(rows=8, columns=4, vdd=0.8, shared_vdd=1.0)
    area = chip.area()
    millimetres = [
        float(mac_area(chip.mac, chip.technology)) ** 0.5,
        6 * float((area.macs + area.memories[0]) / 32) ** 0.5,  # 2 columns and 4 rows on average
        float(area.macs + area.memories[:2].sum()) ** 0.5,
        float(area.macs + area.memories.sum()) ** 0.5,
    ]
    expected = 0.15e-9 * np.array(millimetres) * np.array([0.8, 0.8, 1.0, 0.8]) ** 2
    np.testing.assert_allclose(chip.wire_energy_per_bit(), expected, rtol=1e-5)


def test_larger_buffers_and_longer_arrays_lengthen_the_wires():
    def wires(**arguments):
        return np.asarray(make_chip(**arguments).wire_energy_per_bit())

    base = wires()
    assert (wires(register_bits=512) > base)[1:].all() and wires(register_bits=512)[0] == base[0]
    assert (wires(local_kib=64) > base)[2:].all() and (wires(local_kib=64) == base)[:2].all()
    # As many MACs in a line are further away than in a square.
    assert wires(rows=64, columns=4)[1] > base[1] and wires(rows=64, columns=4)[2] == pytest.approx(base[2])


def test_transformations_and_gradients(x64):
    arguments = (jnp.array(0.8), jnp.array(0.1), jnp.array([6.0, 3.0]))

    def logarithm(vdd, area_mm2, fanout):
        return jnp.log(delivery_energy(TECHNOLOGY, vdd, area_mm2 * 1e-6, fanout))

    check_grads(logarithm, arguments, order=1, modes=["rev"], rtol=1e-6)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2.0 * x]), arguments)
    mapped = jax.vmap(logarithm)(*stacked)
    assert mapped[1] == pytest.approx(float(jax.jit(logarithm)(*(2.0 * x for x in arguments))))
    # Twice the supply, twice the area, twice the tiles: 2 ** (2 + 1/2 + 1).
    assert mapped[1] - mapped[0] == pytest.approx(3.5 * np.log(2.0))
