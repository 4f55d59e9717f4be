"""MACs against synthesised units (switching energy in units of 0.24 fJ, transistors) and by hand."""

import jax
import jax.numpy as jnp
import pytest

from hw.arithmetic import cycle_energy, mac_area, make_mac, partial_sum_bits, product_cycles, transistors
from hw.technology import make_technology

TECHNOLOGY = make_technology(45)
NOMINAL = 0.9
UNIT = 0.24e-15

# Style, widths, slice, accumulator; units per cycle and transistors of the synthesised unit, zero-delay, uniform data.
SYNTHESISED = [
    ("fixed", (8.0, 8.0), 4.0, 24.0, 1257.2, 3552),
    ("fixed", (8.0, 8.0), 4.0, 32.0, 1400.8, 4058),
    ("fixed", (4.0, 4.0), 4.0, 16.0, 449.2, 1376),
    ("fixed", (16.0, 8.0), 4.0, 32.0, 2309.1, 6326),
    ("fixed", (16.0, 16.0), 4.0, 40.0, 4254.9, 11726),
    ("slices", (8.0, 8.0), 4.0, 32.0, 845.4, 2814),
    ("slices", (16.0, 16.0), 4.0, 40.0, None, 3636),
    ("serial", (8.0, 8.0), 4.0, 32.0, 780.0, 3934),
    ("serial", (16.0, 16.0), 4.0, 40.0, None, 5186),
]


@pytest.mark.parametrize(("style", "widths", "slice_bits", "accumulator", "units", "count"), SYNTHESISED)
def test_integer_units_match_synthesis(style, widths, slice_bits, accumulator, units, count):
    mac = make_mac(style, widths, slice_bits, accumulator)
    assert transistors(mac, TECHNOLOGY) == pytest.approx(count, rel=0.08)
    if units:
        energy = cycle_energy(mac, TECHNOLOGY, jnp.array(NOMINAL), accumulator)
        assert energy / UNIT == pytest.approx(units, rel=0.06)


def test_energy_and_area_by_hand():
    # 13.8 * 64 + 13.6 * 16 + 7.4 * 24 = 1278.4 units of 0.24 fJ.
    mac = make_mac("fixed", (8.0, 8.0), accumulator_bits=24.0)
    assert cycle_energy(mac, TECHNOLOGY, jnp.array(NOMINAL), 24.0) == pytest.approx(0.306816e-12)
    # 35.8 * 64 + 54.3 * 24 = 3594.4 transistors of 0.12 um2; 45 -> 65 nm grows area 1.515x.
    assert mac_area(mac, make_technology(65)) == pytest.approx(3594.4 * 0.12e-12 * 1.515)


@pytest.mark.parametrize(("style", "energy", "area"), [("fp32", 4.6, 11884), ("fp16", 2.0, 5824), ("fp8", 0.58, 1627)])
def test_float_units_are_horowitz_at_45_nm(style, energy, area):
    mac = make_mac(style)
    assert cycle_energy(mac, TECHNOLOGY, jnp.array(NOMINAL), 0.0) == pytest.approx(energy * 1e-12)
    assert mac_area(mac, TECHNOLOGY) == pytest.approx(area * 1e-12)


@pytest.mark.parametrize(
    ("style", "bits", "cycles"),
    [
        ("slices", (8.0, 8.0), 4),
        ("slices", (9.0, 4.0), 3),
        ("slices", (16.0, 16.0), 16),
        ("slices", (1.0, 5.0), 2),
        ("serial", (5.0, 8.0), 5),
        ("fixed", (3.0, 8.0), 1),
        ("fp32", (32.0, 32.0), 1),
    ],
)
def test_cycles_per_product(style, bits, cycles):
    assert product_cycles(make_mac(style), jnp.array(bits)) == cycles


def test_slices_pass_their_gradient_straight_through(x64):
    mac = make_mac("slices", slice_bits=4.0)
    # ceil(9/4) ceil(4/4) = 3 * 1; d/da = 1/4 * 1, d/db = 3 * 1/4.
    gradient = jax.grad(lambda bits: product_cycles(mac, bits))(jnp.array([9.0, 4.0]))
    assert gradient.tolist() == [0.25, 0.75]


def test_partial_sums_hold_every_product():
    # 8 + 6 bits and 1024 products.
    assert partial_sum_bits(make_mac("slices"), jnp.array([8.0, 6.0]), jnp.array(1024.0)) == 24.0
    assert partial_sum_bits(make_mac("bf16"), jnp.array([16.0, 16.0]), jnp.array(1024.0)) == 32.0


@pytest.mark.parametrize("style", ["fixed", "slices", "serial"])
def test_wider_is_never_cheaper(style):
    widths = jnp.arange(4.0, 17.0)

    def unit(width):
        mac = make_mac(style, (16.0, 16.0))
        mac = type(mac)(jnp.stack([width, width]), jnp.minimum(width, 4.0), 2 * width + 16.0, style)
        energy = cycle_energy(mac, TECHNOLOGY, jnp.array(NOMINAL), 2 * width + 10.0)
        return energy * product_cycles(mac, jnp.stack([width, width])), mac_area(mac, TECHNOLOGY)

    for quantity in jax.vmap(unit)(widths):
        assert (jnp.diff(quantity) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "slice"}, "nearest is 'slices'"),
        ({"style": "fp32", "widths": (8.0, 8.0)}, "brings its own"),
        ({"style": "fixed", "widths": (8.0, 0.0)}, "positive widths"),
        ({"style": "slices", "slice_bits": 32.0}, "at most 16.0"),
    ],
)
def test_misuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_mac(**arguments)
