"""Experiments: their statistics by hand, and each once at reduced size."""

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

import experiments
from codesign.config import check_range
from experiments import bench_joint, command_line, table_joint


def test_interval_is_students():
    # Mean 2, sample standard deviation 1, three values: half width t(0.975, 2) / sqrt(3) with t = 4.30265 from tables.
    got = table_joint.interval(np.array([1.0, 2.0, 3.0]))
    assert got == pytest.approx({"mean": 2.0, "low": 2 - 4.30265 / 3**0.5, "high": 2 + 4.30265 / 3**0.5}, rel=1e-5)


def test_interval_of_one_value_is_unknown():
    got = table_joint.interval(np.array([0.5]))
    assert got["mean"] == 0.5 and np.isnan(got["low"]) and np.isnan(got["high"])


def row(method, accuracy, edp_js, bits_mean=8.0, **more):
    return {"method": method, "accuracy": accuracy, "edp_js": edp_js, "bits_mean": bits_mean, **more}


@pytest.fixture
def results():
    """Two seeds; EDP of sequential over joint is 2 and 8, so 4 in the geometric mean. Random ran in one of them only."""
    first = [
        row("joint", 0.97, 1e-9, 4.0, gap=0.01, gap_polished=-0.01),
        row("sequential", 0.973, 2e-9, gap=0.5, gap_polished=0.5),
        row("float32", 0.98, 1e-7, 32.0),
        row("random", 0.97, 1e-9),
    ]
    second = [
        row("float32", 0.96, 1e-7, 32.0),
        row("joint", 0.96, 2e-9, 5.0, gap=0.03, gap_polished=0.01),
        row("sequential", 0.95, 16e-9, gap=0.5, gap_polished=0.5),
    ]
    return [{"summary": first}, {"summary": second}]


def test_table_of_made_up_runs(results):
    table = table_joint.tabulate(results)
    assert table["seeds"] == 2 and set(table["methods"]) == {"joint", "sequential", "float32"}
    sequential = table["methods"]["sequential"]
    assert sequential["edp_js"] == [2e-9, 16e-9]
    assert sequential["edp_to_joint"]["mean"] == pytest.approx(4.0)
    # log 2 and log 8 lie log 2 to each side of log 4; t(0.975, 1) = 12.7062, their standard deviation sqrt(2) log 2.
    assert sequential["edp_to_joint"]["high"] == pytest.approx(4.0 * 2**12.7062, rel=1e-3)
    assert table["methods"]["joint"]["edp_to_joint"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert table["methods"]["joint"]["bits_mean"] == [4.0, 5.0]
    assert table["methods"]["float32"]["accuracy"]["mean"] == pytest.approx(0.97)
    # Paired: -0.01 and 0.
    assert table["accuracy_difference_to_float32"]["mean"] == pytest.approx(-0.005)
    assert table["equal_accuracy"] == 0.5  # 0.3 and 1 point apart
    assert table["gap"]["mean"] == pytest.approx(0.02) and table["gap_polished"]["mean"] == pytest.approx(0.0)


def test_table_is_shown_and_is_json(results, capsys):
    table = table_joint.tabulate(results)
    table_joint.show(table)
    shown = capsys.readouterr().out
    assert "sequential" in shown and "accuracy_difference_to_float32: -0.50 %" in shown
    assert json.loads(json.dumps(table))["seeds"] == 2


def test_finished_seed_is_read_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(table_joint, "run", None)
    (tmp_path / "result.json").write_text('{"summary": []}')
    assert table_joint.run_seed(table_joint.configs(1, quick=True)[0], tmp_path) == {"summary": []}


def test_configs_are_paired_by_seed():
    configs = table_joint.configs(3, quick=False)
    assert [config.train.seed for config in configs] == [0, 1, 2]
    joint, sequential = configs[0].objective.cost_weights, configs[0].baselines.sequential_weights
    assert set(joint) <= set(sequential) and len(sequential) >= 5  # joint never has the larger choice


@pytest.mark.parametrize(
    ("experiment", "arguments", "message"),
    [
        ("table_systems", "--only S9", "system"),
        ("table_silicon", "--only abacus", "chip"),
        ("table_steps", "--chip abacus", "expected a chip among"),
        ("table_steps", "--bits 0.5", "--bits in the command line: expected a number from 1 to 32, got 0.5"),
        ("table_arithmetic", "--schemes ternary", "expected schemes among"),
        ("table_arithmetic", "--quick --data nowhere.npz", "nowhere.npz"),
        ("table_arithmetic", "--schemes masks --plot bits.svg", "expected sdfxp_laps among the schemes"),
        ("table_chips", "--chip edge", "expected a chip among"),
        ("table_joint", "--seeds 0", "--seeds in the command line: expected a number from 1"),
        ("search_sharded", "--processes 2 --process 2", "expected process in 0 to 1, got 2"),
        ("search_sharded", "--evaluations -1", "expected a number from 1"),
        ("search_benchmark", "--time-limit nan", "expected a number from"),
        ("search_benchmark", "--workloads deep.json", "deep.json: not valid JSON"),
        ("fit_sram", "nowhere.csv", "nowhere.csv"),
        ("fit_sram", "number.json", "number.json: line 1: field node_nm is missing"),
        ("fit_sram", "deep.json", "deep.json: line 1: field larger than"),
        ("table_systems", "--measured deep.json", "deep.json: not valid JSON"),
        ("table_systems", "--measured number.json", "expected number.json to hold what --json printed"),
        ("table_joint", "--seeds two", "arguments: Error parsing --seeds"),
        ("table_joint", "--sedes 2", "did you mean --seeds?"),
        ("bench_cost_model", "--fast", "see 'python -m experiments.bench_cost_model --help'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(experiment, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("deep.json").write_text("[" * 200_000)
    Path("number.json").write_text('{"systems": {"S1": 3}}')
    monkeypatch.setattr(sys, "argv", [experiment, *arguments.split()])
    assert command_line.run(import_module(f"experiments.{experiment}").main) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


@pytest.mark.parametrize("experiment", [path.stem for path in Path(experiments.__path__[0]).glob("*.py")])
def test_defaults_are_within_their_own_ranges(experiment):
    main = getattr(import_module(f"experiments.{experiment}"), "main", None)
    hints = get_type_hints(main, include_extras=True) if main else {}
    for name, parameter in inspect.signature(main).parameters.items() if main else ():
        if parameter.default is not inspect.Parameter.empty:
            check_range(name, hints[name], parameter.default, "the default")


@pytest.mark.slow
def test_table_joint_quick(tmp_path, capsys):
    table_joint.main(seeds=1, out=tmp_path, quick=True, as_json=True)
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert table["seeds"] == 1
    assert {"joint", "sequential", "float32", "random", "joint_without_bits"} <= set(table["methods"])
    assert all(method["edp_to_joint"]["mean"] > 0 for method in table["methods"].values())


@pytest.mark.slow
def test_bench_joint_measures_every_step():
    measured = bench_joint.measure(rounds=1, inner=1)
    assert set(measured["step_ms"]) == {"float32", "quantised", "joint"}
    assert all(ms > 0 for ms in (*measured["step_ms"].values(), *measured["refresh_ms"].values()))
    assert measured["joint_over_quantised"] > measured["joint_over_quantised_without_refresh"] > 0
