"""Presets of published chips: complete, runnable, and ignorant of what the chips report."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

import hw
from hw.chips import PRESETS
from hw.chips.mechanisms import MECHANISMS
from hw.chips.preset import COMMON, SWITCHING

FOLDER = Path(hw.__file__).parent
HEADLINES = yaml.safe_load((FOLDER / "chips" / "headlines.yaml").read_text())
SYSTEMS = yaml.safe_load((FOLDER / "chips" / "systems.yaml").read_text())
FIELDS = {"kind", "mode", "vdd", "published", "confidence", "source"}
READING = ("import yaml", "read_text", "open(", "import json", "importlib.resources")
OPTIONAL = {"base_mode", "base_vdd", "sparsity", "derived", "network"}


def input_numbers(preset):
    """Every number that a preset gives to the cost model, from memory sizes to clocks."""
    facts = [
        getattr(preset, name)
        for name in ("node_nm", "clock", "sram_kib", "register_bits", "aspect", "sum_bits", "memory_vdd")
    ]
    numbers = [np.ravel(fact.value) for fact in facts if fact is not None]
    numbers += [[it.value, it.low, it.high] for it in preset.assumptions.values()]
    numbers += [[mode.num_macs] for mode in preset.modes.values() if mode.num_macs]
    return {float(number) for number in np.concatenate(numbers)}


def test_the_only_file_of_hw_that_opens_data_reads_another_folder():
    readers = [path.name for path in FOLDER.rglob("*.py") if any(word in path.read_text() for word in READING)]
    assert readers == ["technology.py"]
    assert '/ "data"' in (FOLDER / "technology.py").read_text()


@pytest.mark.parametrize("name", PRESETS)
def test_no_headline_is_an_input(name):
    """Areas apart, which are no argument of a chip: 16 mm2 may stand beside 16 bits."""
    published = {float(row["published"]) for row in HEADLINES.get(name, ()) if row["kind"] != "area"}
    rows = [row for system in SYSTEMS.values() if system["preset"] == name for row in system["headlines"]]
    published |= {float(row["published"]) for row in rows if row["published"] is not None}
    assert not input_numbers(PRESETS[name]) & published


@pytest.mark.parametrize("name", PRESETS)
def test_headlines_are_complete(name):
    for row in HEADLINES.get(name, ()):
        assert set(row) - OPTIONAL == FIELDS, row
        assert (
            row["mode"] in PRESETS[name].modes
            and row["published"] > 0
            and row["confidence"] in ("high", "medium", "low")
        )
        assert ("base_mode" in row) == ("base_vdd" in row) == (row["kind"] in ("ratio", "speedup"))
        assert "network" in row or row["kind"] not in ("dram", "frames")
        if row["vdd"] is None:
            assert "vdd" in PRESETS[name].assumptions, "an untold supply is an assumption"


def test_every_headline_belongs_to_a_preset():
    assert set(HEADLINES) | {system["preset"] for system in SYSTEMS.values()} == set(PRESETS) | {None}
    assert set(HEADLINES) <= set(PRESETS) and list(SYSTEMS) == [f"S{i}" for i in range(1, 9)]
    for row in (row for system in SYSTEMS.values() for row in system["headlines"]):
        assert set(row) - {"baseline", "limit"} == {"name", "published", "unit", "source"}, row


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_holds_is_sourced_and_what_it_assumes_has_a_range(name):
    preset = PRESETS[name]
    for field in dataclasses.fields(preset):
        value = getattr(preset, field.name)
        if hasattr(value, "source"):
            assert len(value.source) > 5, field.name
    assert all(len(mode.source) > 5 for mode in preset.modes.values())
    for assumption in preset.assumed().values():
        assert 0 < assumption.low <= assumption.value <= assumption.high and assumption.low < assumption.high
        assert len(assumption.reason) > 10


def test_mechanisms_are_switches_of_the_model_with_a_source():
    used = {mechanism for preset in PRESETS.values() for mechanism in preset.mechanisms}
    assert used == set(MECHANISMS), "a mechanism that no chip has, or one that the model does not have"
    assert all(len(source) > 5 for preset in PRESETS.values() for source in preset.mechanisms.values())
    PRESETS["lnpu"].require_one("slice skipping", "zero skipping")
    with pytest.raises(
        ValueError, match=r"expected a chip with masks or freezing, got HNPU.*its mechanisms: slice skipping"
    ):
        PRESETS["hnpu"].require_one("masks", "freezing")
    with pytest.raises(ValueError, match="expected a known mechanism, got 'mask'; the nearest is 'masks'"):
        PRESETS["hnpu"].require_one("mask")


def test_the_mode_for_some_bits_is_the_narrowest_that_holds_them():
    assert [PRESETS["dnpu"].mode_for(bits) for bits in (3, 4, 5, 16, 32)] == [
        "4 bit",
        "4 bit",
        "8 bit",
        "16 bit",
        "16 bit",
    ]
    assert PRESETS["lnpu"].mode_for(9) == "fp16" and PRESETS["cnnp_v2"].mode_for(9) == "full"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_chips_at_the_clocks_they_report(name):
    preset = PRESETS[name]
    for mode, choice in preset.modes.items():
        for vdd, frequency in preset.clock.value:
            chip = preset.make(mode, vdd)
            assert float(chip.frequency()) == pytest.approx(frequency, rel=1e-5)
            expected = choice.num_macs or preset.assumptions["num_macs"].value
            assert float(chip.num_macs()) == pytest.approx(expected, rel=1e-6)
            assert chip.technology.node_nm == preset.node_nm.value
        if preset.clusters is not None:
            assert float(chip.instances()[chip.array_level]) == preset.clusters.value
        if preset.sram_kib is not None:
            kib = float((chip.instances() * chip.size_bits)[1:3].sum()) / 8192
            assert kib == pytest.approx(preset.sram_kib.value, rel=1e-5)


def test_an_assumption_moves_the_chip_and_a_fact_cannot_be_assumed_away():
    unpu = PRESETS["unpu"]
    assert float(unpu.make("4 bit", values={"register_bits": 64, "tree": 2}).size_bits[0]) == 128
    assert float(unpu.make("4 bit").vdd) == pytest.approx(0.63)
    assert unpu.bits("4 bit") == (4, 16)
    assert PRESETS["cnnp_v2"].bits("full", {"operand_bits": 12.0}) == (12.0, 12.0)
    with pytest.raises(ValueError, match=r"expected a known assumption of UNPU.*'sram_kib'"):
        unpu.make("4 bit", values={"sram_kib": 1000})
    with pytest.raises(ValueError, match=r"expected a known mode of UNPU.*the nearest is '4 bit'"):
        unpu.make("4bit")


def test_data_scale_what_switches_and_nothing_else():
    uniform, quiet = (PRESETS["dnpu"].make("4 bit", values={"activity": it}).technology for it in (1.0, 0.5))
    ratios = {name: float(quiet[name] / uniform[name]) for name in uniform.values}
    assert {name for name, ratio in ratios.items() if ratio != 1.0} == set(SWITCHING)
    assert all(math.isclose(ratios[name], 0.5) for name in SWITCHING)


def test_only_what_a_chip_leaves_open_is_assumed():
    assert set(PRESETS["eyeriss"].assumed()) == {"local_share", "port_bits", "tree", "activity", "density"}
    assert set(PRESETS["pnpu"].assumed()) == set(COMMON) - {"tree", "sum_bits", "table_sharing"} | {"num_macs"}
    assert math.isclose(float(PRESETS["pnpu"].make("fp8", values={"num_macs": 512.0}).num_macs()), 512, rel_tol=1e-6)


def test_macs_behind_one_tree_share_their_registers_and_nothing_is_lost():
    """One accumulator for eight look-up units: registers of eight in one file, an array an eighth as long."""
    shared, alone = (PRESETS["unpu"].make("4 bit", values={"tree": tree}) for tree in (8.0, 1.0))
    assert float(shared.mac.tree) == 8 and shared.fanout[0].tolist() == [1, 8]
    for total in (lambda c: c.num_macs(), lambda c: c.instances()[0] * c.size_bits[0], lambda c: c.area().memories[0]):
        assert float(total(shared)) == pytest.approx(float(total(alone)), rel=1e-6)
