"""Constants with sources, and how they scale with node and supply."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import hw
from hw.technology import (
    Technology,
    clock_frequency,
    drive_current,
    leakage_scale,
    load_constants,
    logic_energy_scale,
    make_technology,
    sample_technologies,
)
from hw.units import UNITS

PROCESSES = [(65, "low_power", "lstp", "LPDDR3"), (40, "general", "lop", "DDR4"), (28, "general", "lstp", "LPDDR4")]


@pytest.mark.parametrize(("node", "process", "device", "dram"), [*PROCESSES, (7, "general", "hp", "HBM3")])
def test_every_constant_has_bounds_unit_range_and_source(node, process, device, dram):
    for name, constant in load_constants(node, process, device, dram).items():
        assert 0.0 < constant.low <= constant.value <= constant.high, name
        assert constant.unit in UNITS and constant.range and constant.source, name


def entries(name, entry, inherited):
    """Every entry of a data file, with what it inherits from those around it: dotted name and fields."""
    fields = inherited | {key: value for key, value in entry.items() if key not in ("by", "options")}
    if "by" not in entry:
        yield name, fields
        return
    for option, inner in entry["options"].items():
        yield from entries(f"{name}[{option}]", inner, fields)


FILES = sorted((Path(hw.__file__).parent / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_entry_of_the_data_files_is_complete(path):
    leaves = [leaf for name, entry in yaml.safe_load(path.read_text()).items() for leaf in entries(name, entry, {})]
    assert len(leaves) > 30
    for name, fields in leaves:
        assert set(fields) == {"value", "low", "high", "unit", "range", "source"}, name
        assert 0.0 < fields["low"] <= fields["value"] <= fields["high"] < math.inf, name
        assert fields["unit"] in UNITS and len(fields["range"]) > 5 and len(fields["source"]) > 3, name
        assert "from memory" not in fields["source"].lower(), name
        # What nobody measured has error bars, or is a choice that is not sampled, and says so.
        if "assumption" in fields["source"].lower() and "sampled" not in fields["source"].lower():
            assert fields["low"] < fields["value"] < fields["high"], name


def test_names_are_unique_and_all_of_them_are_loaded():
    names = [name for path in FILES for name in yaml.safe_load(path.read_text())]
    assert len(names) == len(set(names))
    assert set(names) == set(load_constants(28, "general", "lstp", "LPDDR4")) - {"node.nm"}


def test_constants_are_in_si():
    technology = make_technology(45)
    assert technology["gate.energy"] == pytest.approx(0.24e-15)
    assert technology["dram.energy"] == pytest.approx(8e-12)
    assert technology["dram.bandwidth"] == pytest.approx(102.4e9)
    assert "Horowitz" in technology.source("gate.energy")
    assert technology.constant("gate.energy").unit == "fJ"


def test_node_energy_is_the_published_polynomial_at_nominal_voltage():
    # Stillmaker & Baas 2017: e2 V^2 + e1 V + e0.
    e45 = 1.018 * 0.9**2 - 0.3107 * 0.9 + 0.1539
    e65 = 3.755 * 1.0**2 - 4.398 * 1.0 + 1.975
    e32 = 0.8367 * 0.9**2 - 0.4341 * 0.9 + 0.1701
    e20 = 0.373 * 0.9**2 - 0.1582 * 0.9 + 0.04104
    for node, energy in ((65, e65), (45, e45), (32, e32), (20, e20)):
        assert make_technology(node)["node.energy"] == pytest.approx(energy / e45, rel=2e-3)
    share = math.log(32 / 28) / math.log(32 / 20)
    between = (e32 / e45) ** (1 - share) * (e20 / e45) ** share
    assert make_technology(28)["node.energy"] == pytest.approx(between, rel=2e-3)


def test_energy_at_7_nm_is_the_mean_of_two_sources_and_its_bounds_hold_both():
    """The polynomial as above, and the operators of Jouppi et al., ISCA 2021, over those of Horowitz, ISSCC 2014."""
    at_45 = np.array([0.03, 0.1, 0.4, 0.9, 0.2, 3.1, 1.1, 3.7])  # int8, int32, fp16 and fp32 additions, then products
    at_7 = np.array([0.007, 0.03, 0.16, 0.38, 0.07, 1.48, 0.34, 1.31])
    operators = float(np.exp(np.mean(np.log(at_7 / at_45))))
    gates = (0.1776 * 0.7**2 - 0.09097 * 0.7 + 0.02447) / (1.018 * 0.9**2 - 0.3107 * 0.9 + 0.1539)
    energy = make_technology(7).constant("node.energy")
    assert energy.value == pytest.approx(math.sqrt(operators * gates), rel=2e-3)
    assert energy.low < gates and operators < energy.high
    nodes = [float(make_technology(node)["node.energy"]) for node in (20, 16, 14, 10, 7)]
    assert nodes == sorted(nodes, reverse=True)


def test_a_constant_that_was_changed_takes_its_bounds_with_it():
    technology = make_technology(28)
    halved = dataclasses.replace(technology, values=technology.values | {"gate.energy": technology["gate.energy"] / 2})
    drawn, of_halved = (sample_technologies(jax.random.key(0), 5, its) for its in (technology, halved))
    np.testing.assert_allclose(of_halved["gate.energy"], drawn["gate.energy"] / 2, rtol=1e-6)
    np.testing.assert_array_equal(of_halved["wire.energy"], drawn["wire.energy"])


def test_dynamic_energy_goes_with_voltage_squared():
    technology = make_technology(45)
    assert logic_energy_scale(technology, jnp.array(0.9)) == pytest.approx(1.0)
    assert logic_energy_scale(technology, jnp.array(0.45)) == pytest.approx(0.25)


def test_clock_at_nominal_supply():
    # 230 gate delays of 21.8 ps are 5.014 ns.
    technology = make_technology(65)
    assert clock_frequency(technology, jnp.array(1.0)) == pytest.approx(199.4e6, rel=1e-3)


def test_current_is_subthreshold_below_and_a_power_law_above(x64):
    technology = make_technology(28)
    slope = jax.grad(lambda vdd: jnp.log(drive_current(technology, vdd)))
    # Below threshold: 1.1 / (1.4 * 25.85 mV) = 30.40 per volt.
    assert slope(jnp.array(0.05)) == pytest.approx(1.1 / (1.4 * 0.02585), rel=1e-3)
    # Far above: alpha / (vdd - vth / 1.1).
    assert slope(jnp.array(2.0)) == pytest.approx(1.37 / (2.0 - 0.38 / 1.1), rel=1e-3)
    supply = jnp.linspace(0.2, 1.2, 101)
    assert (jnp.diff(jax.vmap(lambda vdd: clock_frequency(technology, vdd))(supply)) > 0).all()


def test_leakage_is_relative_to_nominal_and_grows_with_supply():
    technology = make_technology(28)
    assert leakage_scale(technology, jnp.array(0.9), 0.9) == pytest.approx(1.0)
    # 0.9 -> 1.0 V: 1.111 * exp(0.1 * 0.1 / (1.4 * 25.85 mV)) = 1.111 * 1.3183
    assert leakage_scale(technology, jnp.array(1.0), 0.9) == pytest.approx(1.4648, rel=1e-3)


def test_samples_lie_between_low_and_high_with_the_mean_of_a_triangle():
    samples = sample_technologies(jax.random.key(0), 2000, make_technology(28))
    assert isinstance(samples, Technology)
    for name, constant in load_constants(28, "general", "lstp", "LPDDR4").items():
        values, (low, mode, high) = samples[name], (constant.low, constant.value, constant.high)
        assert values.shape == (2000,)
        assert (values >= low * (1 - 1e-5)).all() and (values <= high * (1 + 1e-5)).all(), name
        # A triangle on [l, h] with mode m has mean (l + m + h) / 3, here of logarithms.
        width = math.log(high / low)
        mean = sum(math.log(bound) for bound in (low, mode, high)) / 3
        assert jnp.mean(jnp.log(values)) == pytest.approx(mean, abs=0.03 * width + 1e-4), name
        assert low == high or jnp.std(jnp.log(values)) > 0.1 * width, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"node_nm": 90}, "nearest is 65"),
        ({"node_nm": 5}, "nearest is 7"),
        ({"dram": "LPDR4"}, "nearest is 'LPDDR4'"),
        ({"device": "lst"}, "nearest is 'lstp'"),
        ({"process": "genral"}, "nearest is 'general'"),
    ],
)
def test_unknown_process_names_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_technology(**arguments)


def test_unknown_constant_names_the_nearest():
    with pytest.raises(ValueError, match=r"nearest is 'sram\.energy\.k'"):
        make_technology()["sram.energy.kk"]
    with pytest.raises(ValueError, match="known constant"):
        make_technology().source("sram")
