"""Summaries: units by hand, what is written of a design and read back, tables of figures that add up."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import mapper
from codesign.design import physical_values, with_values
from codesign.summary import (
    area_parts,
    chip_values,
    describe_bits,
    describe_chip,
    describe_mappings,
    energy_intervals,
    energy_table,
    read_bits,
    read_mapping,
    roofline_data,
)
from hw.arithmetic import make_mac
from hw.chip import make_chip
from hw.mapping import Mapping
from hw.operation import LOOPS

LEVELS = ("register", "local", "shared", "dram")


def test_bits_of_passes_that_do_not_exist_are_left_out_and_read_back():
    workload = SimpleNamespace(
        product=np.array([0, 1, 1, 0, 1]), passes=("forward", "forward", "input_grad", "weight_grad", "weight_grad")
    )
    bits = jnp.array([[4.0, 5.0, 6.0, 7.0], [4.5, 8.0, 9.0, 10.0]])
    described = describe_bits(workload, bits, ["first", "second"])
    assert described["first"] == {"weights": 4, "inputs": 5, "weight_grad": 7}
    assert described["second"] == {"weights": 4.5, "inputs": 8, "input_grad": 9, "weight_grad": 10}
    assert [type(width) for width in described["second"].values()] == [float, int, int, int]
    np.testing.assert_array_equal(read_bits(described), bits.at[0, 2].set(jnp.nan))


def test_chip_is_described_with_units_and_read_back():
    chip = make_chip(
        rows=12, columns=7, register_bits=8 * 36, local_kib=17, shared_kib=104, local_bandwidth_bits=96,
        shared_bandwidth_bits=160, vdd=0.81, resident_fraction=5 / 16, mac=make_mac("slices", slice_bits=4),
    )  # fmt: skip
    described = describe_chip(chip)
    assert (described["rows"], described["columns"], described["register_bytes"]) == (12, 7, 36)
    assert (described["local_kib"], described["vdd_v"], described["resident_fraction"]) == (17, 0.81, 0.3125)
    assert described["mac"] == "slices" and described["node_nm"] == 28
    whole = [name for name, value in described.items() if isinstance(value, int)]
    assert set(whole) >= {"rows", "columns", "register_bytes", "local_kib", "local_bandwidth_bits", "node_nm"}
    assert described["frequency_mhz"] == pytest.approx(float(chip.frequency()) / 1e6)
    assert described["area_mm2"] == pytest.approx(float(chip.area().total) * 1e6)
    again = with_values(make_chip(mac=chip.mac), chip_values(described))
    assert physical_values(again) == pytest.approx(physical_values(chip), rel=1e-6)


def stacked(mapping):
    """Candidates (1, 1) of one mapping."""
    return mapper.Candidates(jax.tree.map(lambda x: jnp.asarray(x)[None, None], mapping), None, None)


def test_mapping_is_described_by_hand():
    temporal, spatial, keep = np.ones((4, 8)), np.ones((4, 2, 8)), np.zeros((4, 3))
    order = np.tile(np.arange(8, dtype=np.int32), (4, 1))
    n, k, c = (LOOPS.index(loop) for loop in "NKC")
    temporal[1, [n, k, c]] = 2, 3, 4
    order[1, [n, k, c]] = order[1, [c, n, k]]  # ranks: K 1, C 2, N 3
    spatial[1, 0, k], spatial[1, 1, c] = 16, 8
    keep[1, 1], keep[3] = 1, 1
    described = describe_mappings(["layer (forward)"], stacked(Mapping(temporal, spatial, order, keep)), LEVELS)
    levels = described["layer (forward)"]
    assert list(levels) == ["dram", "shared", "local", "register"]
    assert levels["local"] == {
        "temporal": [["K", 3], ["C", 4], ["N", 2]],  # innermost first
        "columns": {"K": 16},
        "rows": {"C": 8},
        "keeps": ["inputs"],
    }
    assert levels["dram"]["keeps"] == ["weights", "inputs", "outputs"]
    assert levels["shared"] == {"temporal": [], "columns": {}, "rows": {}, "keeps": []}


@pytest.mark.parametrize("seed", range(5))
def test_mapping_read_back_runs_the_same_nest(seed):
    rng = np.random.default_rng(seed)
    mapping = Mapping(
        rng.choice([1.0, 1.0, 2.0, 3.0, 5.0], (4, 8)),
        rng.choice([1.0, 1.0, 4.0], (4, 2, 8)),
        np.argsort(rng.random((4, 8)), axis=1).astype(np.int32),
        rng.choice([0.0, 1.0], (4, 3)),
    )
    again = read_mapping(describe_mappings(["one"], stacked(mapping), LEVELS)["one"], LEVELS)
    for name in ("temporal", "spatial", "keep"):
        np.testing.assert_array_equal(getattr(again, name), getattr(mapping, name), err_msg=name)
    for level in range(4):  # loops of one iteration may stand anywhere
        loops = np.flatnonzero(mapping.temporal[level] > 1)
        nest, nest_again = (loops[np.argsort(np.asarray(one.order)[level, loops])] for one in (mapping, again))
        np.testing.assert_array_equal(nest, nest_again)
        assert sorted(np.asarray(again.order)[level]) == list(range(8))


def small_cost():
    """A step of three operations on four levels, one piece of vector work, one transfer."""
    mac, access = np.array([1.0, 2.0, 4.0]), np.arange(36.0).reshape(3, 4, 3)
    control = np.array([0.5, 0.25, 0.125])
    return SimpleNamespace(
        components=("mac", *LEVELS, "control", "vector", "leakage"),
        mac_energy=mac,
        access_energy=access,
        operation_energy=mac + access.sum((1, 2)) + control,
        operation_latency=np.array([1e-6, 2e-6, 4e-6]),
        vector_energy=np.array([7.0]),
        transfer_energy=np.array([3.0]),
        leakage_energy=np.array(11.0),
        # 7 J of vector arithmetic and 3 J of DRAM traffic beside the operations.
        breakdown=np.array([mac.sum(), *access.sum((0, 2))[:3], access[:, 3].sum() + 3.0, control.sum(), 7.0, 11.0]),
    )


def small_workload():
    step = SimpleNamespace(
        operations=SimpleNamespace(macs=np.array([1e3, 1e3, 4e3])), multiplicity=np.array([1.0, 2.0, 1.0])
    )
    return SimpleNamespace(
        step=step, product=np.array([0, 1, 1]), names=("conv1", "conv2", "conv2"),
        passes=("forward", "forward", "weight_grad"),
    )  # fmt: skip


def test_energy_table_puts_every_joule_in_its_place():
    table = energy_table(small_workload(), small_cost(), ["conv1", "conv2"])
    energy = table["energy_j"]
    cell = {name: table[name].index for name in ("layers", "passes", "components")}

    def at(layer, pass_, component):
        return energy[cell["layers"](layer), cell["passes"](pass_), cell["components"](component)]

    assert at("conv1", "forward", "mac") == 1.0 and at("conv1", "forward", "register") == 0 + 1 + 2
    assert at("conv2", "forward", "dram") == 21 + 22 + 23  # second operation, fourth level
    assert at("conv2", "weight_grad", "control") == 0.125
    assert at("conv1", "weight_grad", "mac") == 0.0
    assert at("leakage", "other", "leakage") == 11.0
    assert at("vector unit and I/O", "other", "vector") == 7.0 and at("vector unit and I/O", "other", "dram") == 3.0
    cost = small_cost()
    assert energy.sum() == cost.operation_energy.sum() + 7.0 + 3.0 + 11.0


def test_intervals_of_the_energy_table_are_those_of_its_bars():
    """Samples that are the cost times 1, 2, ..., 101: the bars' quantiles are 6 and 96 times them."""
    cost, times = small_cost(), np.arange(1.0, 102.0)
    drawn = SimpleNamespace(
        operation_energy=times[:, None] * cost.operation_energy,
        leakage_energy=times * cost.leakage_energy,
        energy=times * cost.breakdown.sum(),
    )
    layers = ["conv1", "conv2"]
    bars = energy_table(small_workload(), cost, layers)["energy_j"].sum(axis=2)
    low, high = energy_intervals(small_workload(), drawn, layers)
    np.testing.assert_allclose(low, 6 * bars, atol=1e-9)
    np.testing.assert_allclose(high, 96 * bars, atol=1e-9)


def test_roofline_speeds_and_peaks():
    chip = make_chip(rows=4, columns=8, mac=make_mac("slices", slice_bits=4))
    data = roofline_data(small_workload(), chip, small_cost())
    # Two operations per MAC: 2e3 in 1 us, twice 2e3 in 2 us, 8e3 in 4 us.
    assert [point["operations_per_second"] for point in data["points"]] == pytest.approx([2e9] * 3)
    assert [(point["name"], point["pass"]) for point in data["points"]][1:] == [
        ("conv2", "forward"),
        ("conv2", "weight_grad"),
    ]
    full = 2 * 32 * float(chip.frequency())
    # Eight bits are two slices of four for each operand, hence four cycles.
    assert data["peaks"] == pytest.approx({"4 x 4 bits": full, "8 x 8 bits": full / 4}, rel=1e-5)


def test_area_parts_add_up_and_leave_dram_out():
    chip = make_chip()
    parts = area_parts(chip)
    assert set(parts) == {"mac", "register", "local", "shared", "vector", "control"}
    assert sum(parts.values()) == pytest.approx(float(chip.area().total) * 1e6, rel=1e-5)
