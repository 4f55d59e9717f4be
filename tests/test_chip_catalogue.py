"""The command `chips`: what it lists and explains, and how it refuses."""

import json

from codesign.cli import main
from hw.chips import CHIPS, PRESETS


def told(capsys, *arguments):
    assert main(["chips", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_chips_are_listed(capsys):
    rows = {row["name"]: row for row in told(capsys)["chips"]}
    assert set(rows) == set(CHIPS) | set(PRESETS)
    assert rows["unpu"]["num_assumed"] == len(PRESETS["unpu"].assumed()) and rows["unpu"]["node_nm"] == 65


def test_a_chip_is_explained_number_by_number(capsys):
    """Three facts are public, 768 MACs are assumed; its memories have a supply of their own."""
    found = told(capsys, "in_situ_trainer")
    assert {row["name"]: row["value"] for row in found["facts"]}["memory_vdd"] == 0.63
    assert all(row["source"] for row in found["facts"] + found["modes"])
    assert [row["name"] for row in found["mechanisms"]] == ["masks", "cores by pass", "update unit"]
    (macs,) = (row for row in found["assumptions"] if row["name"] == "num_macs")
    assert macs["low"] < macs["value"] < macs["high"] and found["chips"][0]["num_macs"] == macs["value"]
    chip = PRESETS["in_situ_trainer"].make("8 bit")
    assert [round(float(vdd), 4) for vdd in chip.level_vdd()] == [0.5, 0.63, 0.63, 0.5]
    assert told(capsys, "edge_trainer")["chips"][0]["num_macs"] == 256
    assert main(["chips", "lnpu"]) == 0 and "public facts" in capsys.readouterr().out


def test_all_facts_of_a_chip_are_told(capsys):
    facts = {row["name"]: row["value"] for row in told(capsys, "eyeriss")["facts"]}
    assert list(facts) == [
        "node_nm", "clock (V, Hz)", "sram_kib", "register_bits", "clusters", "aspect", "sum_bits", "dram",
    ]  # fmt: skip
    assert facts["sum_bits"] == 16 and facts["node_nm"] == 65


def test_an_unknown_chip_is_told_its_nearest(capsys):
    assert main(["chips", "eyeris"]) == 2
    assert capsys.readouterr().err == "error: expected a known chip, got 'eyeris'; the nearest is 'eyeriss'\n"
