"""The mapper on the chips of reference files: never worse than any mapping in them, under their conventions."""

import json
from pathlib import Path

import jax
import pytest

from experiments import command_line
from experiments.check_accesses import count_all
from experiments.search_references import main, search_timeloop, search_zigzag
from experiments.zigzag_points import WIRES, read_zigzag
from experiments.zigzag_search import _widths, nested_loops, recount, search_layer
from hw.accesses import ZIGZAG
from tests.test_check_accesses import point as worked_point

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="no ../shared/reference beside the repository")


@needs_reference
def test_no_mapping_of_timeloop_takes_less_energy():
    rows = search_timeloop(REFERENCE / "timeloop" / "points.jsonl", limit=10)
    assert len(rows) == 10 and max(row.ratio for row in rows) <= 1.0


@needs_reference
@pytest.mark.slow
def test_no_mapping_of_either_file_takes_less_energy():
    rows = search_timeloop(REFERENCE / "timeloop" / "points.jsonl")
    rows += search_zigzag(REFERENCE / "zigzag" / "points.json")
    assert len(rows) > 600 and max(row.ratio for row in rows) <= 1.0 + 1e-9


@needs_reference
@pytest.mark.slow
def test_zigzags_best_is_met_and_its_energy_is_counted_the_same_way_twice():
    """A strided layer whose 720 orders leave half of the energy on the table; the energy again from ZigZag's own notation."""
    points = [p for p in read_zigzag(REFERENCE / "zigzag" / "points.json") if p.name.startswith("D_tree r18_l2_3x3s2")]
    energy, mapping = search_layer(jax.random.key(0), points[0], iterations=200, rounds=2)
    assert recount(points[0], mapping) == pytest.approx(energy, rel=1e-5)
    assert energy < min(p.record.number("linear_energy_total_pJ") for p in points)
    loops = nested_loops(points[0], mapping)
    assert [len(loops[operand]) for operand in WIRES] == [3, 3, 2]


@needs_reference
@pytest.mark.slow
def test_widths_follow_from_the_loops_as_zigzag_states_them(x64):
    """On every point of the file: the energy with widths worked out here is the one printed."""
    points = read_zigzag(REFERENCE / "zigzag" / "points.json")
    counts = iter(count_all([case for point in points for case in point.cases], ZIGZAG))
    for point in points:
        of_cases = [next(counts) for _ in point.cases]
        widths = _widths(point, point.record.value["temporal_mapping_inner_to_outer"])
        assert point.energy(of_cases, widths) == pytest.approx(point.record.number("linear_energy_total_pJ"), rel=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "line 1, field (all): no valid JSON"),
        ("", "line 1, field (all): no points"),
        (
            json.dumps(worked_point() | {"layer": "conv"}),
            "line 1, field (all): expected a reference point",
        ),  # no entries
    ],
)
def test_a_file_that_cannot_be_read_ends_with_2(tmp_path, capsys, text, message):
    file = tmp_path / "points.jsonl"
    if text is not None:
        file.write_text(text)
    assert command_line.run(main, [str(file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and str(file) in told and message in told and told.count("\n") == 1
