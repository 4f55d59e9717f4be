"""The table of published chips: its workload and arithmetic by hand, its statistics, its program end to end."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import table_silicon
from experiments.silicon.page import replace_between
from experiments.silicon.peak import PARTS_OF_ENERGY, evaluate_peak, make_tilings, measure, supplies
from experiments.silicon.whole_networks import convolutions, dram_words, run_network
from experiments.table_silicon import MARKS, Row, calibrate, family, main, make_row, read_headlines, summarise
from hw.accesses import no_accesses
from hw.arithmetic import product_energy
from hw.chips import PRESETS
from hw.chips.preset import Assumption
from hw.mapping import make_mapping
from hw.operation import make_operation

SAMPLES = 3


def efficiency(published, ours, low=0.0, high=0.0, **changes):
    fields = {
        "kind": "efficiency", "name": "", "published": published, "ours": ours, "low": low, "high": high, "unit": "TOPS/W",
        "inside": low <= published <= high, "compared": True, "confidence": "high", "source": "", "energy_pj": {},
        "family": "65 nm, integer",
    }  # fmt: skip
    return Row(**fields | changes)


def test_every_tiling_covers_the_workload_and_no_two_are_alike():
    side = 8
    operation = make_operation(K=4 * side, C=4 * side, P=32, Q=32, R=3, S=3)
    factors, ranks, keeps = make_tilings()
    spatial = np.ones((4, 2, 8))
    spatial[1, 0, 2] = spatial[1, 1, 3] = side
    for temporal, order, keep in zip(factors[::7], ranks[::7], keeps[::7], strict=True):
        mapping = make_mapping(operation, temporal, spatial, order, keep)
        covered = np.asarray(mapping.temporal).prod(0) * spatial.prod((0, 1))
        np.testing.assert_array_equal(covered, operation.bounds)
    rows = np.concatenate([factors.reshape(len(factors), -1), ranks.reshape(len(ranks), -1)], axis=1)
    assert len(np.unique(np.concatenate([rows, keeps.reshape(len(keeps), -1)], axis=1), axis=0)) == len(factors)


def test_throughput_of_unpu_by_hand():
    """4608 look-ups a cycle at 200 MHz: three products each in as many cycles as weight bits, four of one bit."""
    for mode, products in (("16 bit", 3 / 16), ("1 bit", 4.0)):
        peak = measure("unpu", mode, 1.1, SAMPLES)
        np.testing.assert_allclose(peak.throughput, 2 * 4608 * 0.2 * products, rtol=1e-5)


def test_supply_acts_as_its_square_where_nothing_leaks():
    """DNPU's memories and logic share one supply and leak next to nothing: (1.1 / 0.77)^2 = 2.04."""
    slow, fast = (measure("dnpu", "4 bit", vdd, SAMPLES) for vdd in (0.77, 1.1))
    assert slow.efficiency[0] / fast.efficiency[0] == pytest.approx((1.1 / 0.77) ** 2, rel=2e-3)


@pytest.mark.parametrize(("name", "mode"), [("dnpu", "4 bit"), ("unpu", "8 bit")])
def test_all_clusters_and_trees_are_full(name, mode):
    """Leakage runs for the cycles of a product: no more of them than all MACs together take."""
    peak, chip = measure(name, mode, 1.1, SAMPLES), PRESETS[name].make(mode, 1.1)
    seconds = 2e-9 / peak.throughput[0]
    assert peak.energy[PARTS_OF_ENERGY.index("leakage")] == pytest.approx(
        float(chip.leakage_power()) * seconds, rel=1e-4
    )


def test_a_supply_is_known_to_its_last_digit():
    told, other = supplies(0.77, 20, 2), supplies(0.78, 20, 2)
    assert told[0] == 0.77 and told[-2:].tolist() == [0.77] * 2
    assert np.all(np.abs(told - 0.77) <= 0.005) and len(np.unique(told)) == 21
    assert not np.allclose(told - 0.77, other - 0.78), "two operating points are measured apart"


def test_parts_of_the_energy():
    """The MACs' part is the price of a product, clock and control a share of all that switches, the sum what is told."""
    peak = measure("pnpu", "fp8", 0.78, SAMPLES)
    chip = PRESETS["pnpu"].make("fp8", 0.78)
    parts = dict(zip(PARTS_OF_ENERGY, peak.energy, strict=True))
    product = product_energy(chip.mac, chip.technology, chip.vdd, jnp.array([8.0, 8.0]), 16.0)
    assert parts["MACs"] == pytest.approx(float(product), rel=1e-5)
    switching = sum(parts[name] for name in ("MACs", "registers", "local", "shared"))
    assert parts["clock and control"] == pytest.approx(0.3 * switching, rel=1e-5)
    assert min(peak.energy) > 0
    assert peak.efficiency[0] == pytest.approx(2e-12 / sum(peak.energy), rel=1e-6)
    # 1024 products a cycle at 50 MHz.
    assert peak.power[0] == pytest.approx(1e3 * sum(peak.energy) * 1024 * 50e6, rel=1e-5)


def test_the_number_of_macs_that_two_chips_do_not_tell_hardly_matters():
    """A quarter as many or four times as many, memories in proportion, moves the efficiency by less than 20 %."""
    few, many = (PRESETS["pnpu"].make("fp8", 0.78, {"num_macs": number}) for number in (512.0, 2048.0))
    chips = jax.tree.map(lambda *leaves: jnp.stack([jnp.float32(leaf) for leaf in leaves]), *[few, many] * 8)
    joules = np.asarray(evaluate_peak(chips, jnp.full((16, 3), 8.0, jnp.float32))).sum(axis=1)
    assert abs(joules[1] / joules[0] - 1) < 0.2


def test_convolutions_of_two_networks_by_their_known_macs():
    """666 and 15 347 million for an image, batches of 4 and 3."""
    for network, images, millions in (("AlexNet", 4, 665.8), ("VGG-16", 3, 15346.6)):
        macs = convolutions(network).inference.operations.macs
        assert float(np.asarray(macs, float).sum()) == pytest.approx(images * millions * 1e6, rel=1e-4)


def test_words_between_chip_and_dram_by_hand():
    """Two layers of 10 weights, 20 inputs, 3 partial sums read, 9 written, of which 5 finished: 42 words each.

    With half of a map stored the first layer, whose image is dense, saves 2.5, the second 12.5.
    """
    counts = no_accesses(2, 2, float)
    for words, of_operands in ((counts.reads, (10, 20, 3)), (counts.updates, (0, 0, 9)), (counts.finals, (0, 0, 5))):
        words[:, -1] = of_operands
    counts.instances[:] = 1.0
    counts = jax.tree.map(lambda x: jnp.asarray(x)[None], counts)
    assert dram_words(counts, None).tolist() == [84.0]
    assert dram_words(counts, jnp.array([0.5])).tolist() == [69.0]


@pytest.mark.slow
def test_a_network_on_a_chip():
    """Power, speed and efficiency tell the same energy, and the array is never more than full."""
    run = run_network("eyeriss", "16 bit", 1.0, "AlexNet", SAMPLES)
    products = 0.5e9 * run.throughput
    np.testing.assert_allclose(run.power, 1e3 * 2e-12 * products / run.efficiency, rtol=1e-5)
    np.testing.assert_allclose(run.frames * 665.8e6, products, rtol=1e-3)
    assert np.all(products <= 168 * 200e6) and run.energy.sum() == pytest.approx(2e-12 / run.efficiency[0], rel=1e-5)


@pytest.mark.slow
def test_no_dram_traffic_below_what_is_compulsory():
    """AlexNet's weights once, images and outputs of every layer once, zeros compressed to a third: 0.0014 of its MACs."""
    row = make_row("eyeriss", next(row for row in read_headlines()["eyeriss"] if row["kind"] == "dram"), SAMPLES)
    assert 0.0014 < row.low <= row.high < 0.014 and row.unit == "words/MAC"


def test_rows():
    headline = {"kind": "ratio", "mode": "4 bit", "vdd": 0.77, "base_mode": "4 bit", "base_vdd": 1.1, "published": 2.04}
    row = make_row("dnpu", headline | {"confidence": "high", "source": "by hand"}, SAMPLES)
    assert row.name == "efficiency, 4 bit, 0.77 V over 4 bit, 1.1 V" and row.inside and row.compared
    assert row.ratio == pytest.approx(1.0, rel=3e-3)
    sparse = make_row("dnpu", headline | {"confidence": "high", "source": "by hand", "sparsity": 0.5}, SAMPLES)
    assert not sparse.compared


def test_statistics_by_hand():
    rows = [efficiency(1.0, 0.5, 0.4, 0.8), efficiency(2.0, 2.2, 1.1, 4.4), efficiency(1.0, 1.3, 0.5, 1.5)]
    found = summarise(rows)  # errors 50, 10 and 30 %; factors 2, 1.1 and 1.3; widths 2, 4 and 3
    assert found == pytest.approx(
        {"n": 3, "median_error": 0.3, "worst_ratio": 2.0, "inside_interval": 2 / 3, "median_interval_ratio": 3.0}
    )
    assert summarise([])["n"] == 0 and summarise([])["median_error"] is None


def test_a_chip_is_calibrated_on_the_others_of_its_family_alone():
    rows = {
        "one": [efficiency(3.0, 1.0)],
        "two": [efficiency(2.0, 1.0), efficiency(8.0, 1.0), efficiency(50.0, 1.0, family="7 nm, integer")],
        "three": [efficiency(1.0, 1.0), efficiency(100.0, 1.0, compared=False)],
        "other": [efficiency(50.0, 1.0, family="65 nm, floating point")],
    }
    found = calibrate(rows)
    assert set(found) == {"one", "two", "three"}, "one chip alone has nothing to be fitted on"
    assert [row.ours for row in found["one"]] == pytest.approx([2.0])  # of the second's 4 and the third's 1
    assert [row.ours for row in found["two"]] == pytest.approx([3.0**0.5] * 2)
    assert [row.ours for row in found["three"]] == pytest.approx([12.0**0.5])


def test_families_tell_kinds_of_arithmetic_apart():
    assert [family("rapid", mode) for mode in ("fp8", "int4")] == ["7 nm, floating point", "7 nm, integer"]
    assert family("unpu", "1 bit") == family("eyeriss", "16 bit") == "65 nm, integer"


def test_program(capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    main(only=("pnpu", "tsunami"), samples=SAMPLES, plot=tmp_path / "plot.svg", page=page, as_json=True)
    table = json.loads(capsys.readouterr().out)
    for part in ("uncalibrated", "calibrated"):
        assert set(table[part]) == {"n", "median_error", "worst_ratio", "inside_interval", "median_interval_ratio"}
        assert table[part]["n"] == 2
    (row,) = table["chips"]["pnpu"]["rows"]
    assert row["published"] == 3.14 and row["low"] < row["high"] and table["chips"]["pnpu"]["num_assumed"] == 8
    # Alike but for the names, so that one calibrates the other: 3.14 against 3.42.
    assert table["calibrated"]["worst_ratio"] == pytest.approx(3.42 / 3.14)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "3.14 TOPS/W" in text
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    main(only=("pnpu",), samples=SAMPLES)
    assert "PNPU" in capsys.readouterr().out


def test_a_chip_that_no_mapping_fits_is_named(monkeypatch):
    """Of 8 KiB, 2 KiB are local: a row of 32 outputs of 32 channels and 16 bits alone takes them."""
    sizes = {"port_bits": 128.0, "local_share": 0.25, "kib_per_mac": 8.0 / 1024.0, "cluster_macs": 1024.0}
    own = {name: Assumption(it, it * 0.99, it * 1.01, "by hand") for name, it in sizes.items()}
    tiny = dataclasses.replace(PRESETS["pnpu"], title="Tiny", assumptions={**PRESETS["pnpu"].assumptions, **own})
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    with pytest.raises(ValueError, match="Tiny, fp8: no mapping of the workload fits"):
        measure("tiny", "fp8", 0.78, SAMPLES)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="expected a known chip, got 'eyeris'; the nearest is 'eyeriss'"):
        main(only=("eyeris",))
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="once each; add them"):
        replace_between(page, MARKS, "")


def test_the_page_of_the_repository_has_the_marks():
    text = (Path(table_silicon.__file__).parents[1] / "docs" / "systems.md").read_text()
    assert all(text.count(mark) == 1 for mark in MARKS)
