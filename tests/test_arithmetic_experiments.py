"""The experiments of low-bit training: their statistics by hand, and each once at reduced size."""

import json

import numpy as np
import pytest

from experiments import bench_training, table_arithmetic


def test_differences_to_float32_are_paired_by_seed():
    row = {"accuracy": [0.9, 0.8], "writer_accuracy": [0.5, 0.7], "mean_bits": [32.0, 32.0]}
    other = {"accuracy": [0.91, 0.83], "writer_accuracy": [0.5, 0.7], "mean_bits": [8.0, 8.0]}
    table = table_arithmetic.tabulate({"float32": row, "other": other})
    points = table["other"]["accuracy_points_to_float32"]
    assert points["values"] == pytest.approx([1.0, 3.0]) and points["mean"] == pytest.approx(2.0)
    # Two values, 1 and 3: standard deviation sqrt(2), t(0.975, 1) = 12.7062, over sqrt(2).
    assert points["half_width"] == pytest.approx(12.7062, rel=1e-4)
    assert np.isnan(table_arithmetic.interval([0.5])["half_width"])


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"expected schemes among float32, .*, got ternary"):
        table_arithmetic.main(schemes=("ternary",))
    with pytest.raises(ValueError, match=r"expected cases among float32, .*, got ternary"):
        bench_training.main(cases=("ternary",))


@pytest.mark.slow
def test_table_runs_small(capsys, tmp_path):
    names = ("w8a8g8_stochastic", "sdfxp_laps", "fxp4_fp16_frozen", "local_4bit", "weights8_residual")
    table_arithmetic.main(quick=True, as_json=True, schemes=names, plot=tmp_path / "bits.png")
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(table) == {"float32", *names} and (tmp_path / "bits.png").stat().st_size > 0
    assert table["w8a8g8_stochastic"]["mean_bits"]["mean"] == 8.0
    assert table["local_4bit"]["kept_bytes"] < 0.1 * table["float32"]["kept_bytes"]
    assert table["float32"]["accuracy"]["mean"] > 0.3 and table["float32"]["slice_work"] is None


@pytest.mark.slow
def test_benchmark_runs_small(capsys):
    bench_training.main(rounds=1, quick=True, as_json=True)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratios"]["float32"] == {"lenet": 1.0} and result["ratios"]["w8a8g8_stochastic"]["lenet"] > 0.0
    assert result["residual_bytes"]["float32"] > 1e6
