"""The comparison with Timeloop and ZigZag: on the shared reference points, on a worked example, on broken files."""

import json
from pathlib import Path

import pytest

from experiments import command_line
from experiments.check_accesses import check, main

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="no ../shared/reference beside the repository")


@needs_reference
def test_every_timeloop_point_matches(x64):
    report = check(REFERENCE / "timeloop" / "points.jsonl")
    assert report["points"] == 659 and report["entries"] > 20_000
    assert report["mismatches"] == 0, report["first_mismatches"]


@needs_reference
def test_every_zigzag_point_matches(x64):
    report = check(REFERENCE / "zigzag" / "points.json", "zigzag")
    assert report["points"] == 72 and report["entries"] > 1_000
    assert report["mismatches"] == 0, report["first_mismatches"]


def words(reads, fills, updates, capacity):
    return {
        "reads": reads,
        "fills": fills,
        "updates": updates,
        "utilized_capacity": capacity,
        "utilized_instances": 1,
    }


def point():
    """A 1-D convolution of 4 outputs and 3 taps; outputs in a buffer, one at a time; one MAC.

    Buffer: 12 products update 4 outputs; the first product of each is written without a read, so 8 reads; no sum ever
    comes back, so no fills. The MAC reads weights and inputs 12 times, from DRAM, which is written each output once.
    """
    level = {"word_bits": 8, "fanout_below": [1, 1], "instances": 1, "meshX": 1}
    return {
        "id": "worked",
        "dims": {"P": 4, "R": 3},
        "stride": 1,
        "dilation": 1,
        "depthwise": False,
        "arch": {
            "mac": {"energy": 1.0},
            "levels": [
                level | {"name": "Buffer", "read_bw": 1, "write_bw": 1, "access_energy": 1.0},
                level | {"name": "DRAM", "read_bw": 1, "write_bw": 1, "access_energy": 10.0},
            ],
        },
        "mapping": [
            {
                "keep": ["Outputs"],
                "temporal": {"R": 3},
                "loops_outer_to_inner": [["R", 3]],
                "spatial": {"X": {}, "Y": {}},
            },
            {
                "keep": ["Weights", "Inputs", "Outputs"],
                "temporal": {"P": 4},
                "loops_outer_to_inner": [["P", 4]],
                "spatial": {"X": {}, "Y": {}},
            },
        ],
        "result": {
            "compute_cycles": 12,
            "cycles": 24,
            # 12 MACs, 8 + 12 words of the buffer, 12 + 12 + 4 words of DRAM
            "energy_total_uJ": (12 * 1 + 20 * 1 + 28 * 10) * 1e-6,
            "levels": {
                "Buffer": {"tensors": {"Outputs": words(8, 0, 12, 1)}},
                "DRAM": {
                    "tensors": {
                        "Weights": words(12, 0, 0, 3),
                        "Inputs": words(12, 0, 0, 6),
                        "Outputs": words(0, 0, 4, 4),
                    }
                },
            },
        },
    }


def run(capsys, path, *options):
    code = command_line.run(main, [str(path), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_worked_example_matches(tmp_path, capsys):
    file = tmp_path / "points.jsonl"
    file.write_text(json.dumps(point()) + "\n")
    code, out, _ = run(capsys, file, "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and report["points"] == 1 and report["mismatches"] == 0
    assert report["entries"] == 1 + 4 * 5 + 2


def test_a_mismatch_is_explained(tmp_path, capsys):
    wrong = point()
    wrong["result"]["levels"]["Buffer"]["tensors"]["Outputs"]["reads"] = 9
    file = tmp_path / "points.jsonl"
    file.write_text(json.dumps(wrong))
    code, out, _ = run(capsys, file)
    assert code == 1 and "1 mismatches" in out
    assert "Buffer Outputs reads: expected 9, counted 8" in out and "P4 | R3" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no points"),
        (json.dumps(point())[:200], "line 1, field (all): no valid JSON"),
        (json.dumps(point()) + "\n[1, 2]", "line 2, field (all): expected an object"),
        (json.dumps({k: v for k, v in point().items() if k != "stride"}), "line 1, field stride: missing"),
        (json.dumps(point() | {"dims": {"P": 4, "Z": 3}}), "line 1, field dims: unknown loop 'Z'"),
        (json.dumps(point() | {"dims": {"P": 8, "R": 3}}), "cover its bound"),
        (json.dumps(point() | {"stride": float("nan")}), "line 1, field stride: unexpected value"),
        (json.dumps(point() | {"stride": 10**400}), "line 1, field stride: unexpected value"),
        (json.dumps(point() | {"dims": {"P": 10**400, "R": 3}}), "line 1, field dims.P: unexpected value"),
        ("[" * 100_000, "line 1, field (all): no valid JSON"),
    ],
)
def test_a_broken_file_is_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    file = tmp_path / "points.jsonl"
    file.write_text(text)
    code, out, err = run(capsys, file)
    assert code == 2 and out == "" and message in err
    assert err.startswith(f"error: {file}: line") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("points", "message"), [([{"layer": "conv"}], "unknown layer 'conv'"), ([], "field points: no points")]
)
def test_a_zigzag_file_of_another_format(tmp_path, capsys, points, message):
    file = tmp_path / "points.json"
    file.write_text(json.dumps({"layers": [], "points": points}))
    code, _, err = run(capsys, file, "--format", "zigzag")
    assert code == 2 and message in err


def test_a_missing_file(tmp_path, capsys):
    assert run(capsys, tmp_path / "none.jsonl")[0] == 2
