"""The command line as its user meets it: help, results, one line for a mistake, exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from codesign import cli, rundir
from codesign.config import Config, dump_config, load_config
from codesign.progress import TerminalProgress, deferred_interrupt

ROOT = Path(__file__).parent.parent
SUMMARY = [
    {"method": "joint", "accuracy": 0.97, "energy_uj": 4.0, "edp_js": 1e-9, "intervals": {"energy_uj": [3.5, 4.8]}},
    {
        "method": "float32",
        "edp_js": 5e-9,
        "edp_to_bound": 1.04,
        "against_joint": {"edp_js": {"ratio": 5.0, "interval": [4.5, 6.25], "holds": 0.9}},
    },
]


class FakeRunner:
    """Stands in for `codesign.runner.run`: notes how it was called, and ends as told."""

    def __init__(self):
        self.calls, self.ending = [], None

    def __call__(self, config, directory, resume=False, progress=None):
        self.calls.append((config, directory, resume))
        rundir.write_atomic(directory / rundir.CONFIG, dump_config(config))
        if self.ending is not None:
            raise self.ending
        return {"summary": SUMMARY}


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """In an empty working directory, with a run that costs nothing."""
    fake = FakeRunner()
    monkeypatch.setitem(sys.modules, "codesign.runner", SimpleNamespace(run=fake))
    monkeypatch.chdir(tmp_path)
    return fake


def told(capsys) -> str:
    """The error stream, which must be one line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text
    return text.strip()


@pytest.mark.parametrize("command", [[], ["run"], ["trace"], ["cost"], ["report"]])
def test_help_is_readable_and_leaves_with_zero(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    output = capsys.readouterr().out
    assert "usage: jax-codesign" in output
    for word in ("run", "trace", "cost", "report") if not command else ("--json",):
        assert word in output


def test_run_help_explains_every_setting(capsys):
    cli.main(["run", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    for option in ("--config", "--resume", "--train.epochs", "--chip.free", "--objective.area-mm2", "--out"):
        assert option in output
    assert "Largest chip area in mm2" in output


def test_help_starts_without_the_heavy_libraries():
    script = "import sys; from codesign.cli import main; main(['run', '--help']); print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    loaded = set(output.splitlines()[-1].replace("'", "").strip("[]").split(", "))
    assert "tyro" in loaded and not {"jax", "flax", "orbax", "matplotlib", "sklearn"} & loaded


def test_module_runs_as_a_program():
    finished = subprocess.run([sys.executable, "-m", "codesign", "rum"], capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: arguments: Unrecognized options: rum; Available subcommands: run, search, trace, cost, report, chips, export\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {run, search, trace, cost, report, chips, export}; see 'jax-codesign --help'"),
        (["run", "--train.epoks", "3"], "did you mean --train.epochs?"),
        (["run", "--train.epochs", "ten"], "--train.epochs: invalid literal for int()"),
        (["run", "--train.epochs", "0"], "train.epochs in the command line: expected a number from 1"),
        (["run", "--objective.area-mm2", "nan"], "objective.area_mm2 in the command line: expected a number"),
        (["run", "--model.name", "lnet"], "unknown model 'lnet'; nearest valid name: 'lenet'"),
        (["run", "--chip.free", "rows", "cols"], "invalid choice 'cols'"),
        (["run", "--config", "no.yaml"], "no such file: no.yaml"),
        (["run", "--resume", "nowhere"], "no run to go on with: nowhere/config.yaml is missing"),
        (["run", "--config", "a", "--resume", "b"], "--config beside --resume"),
        (["run", "--out", "full"], "out: full is not empty; continue it with 'run --resume full'"),
        (["cost", "--bits", "99"], "bits in the command line: expected a number from 1 to 32, got 99"),
        (["cost", "--bits"], "--bits"),
        (["cost", "--vdd", "100"], "vdd in the command line: expected a number from 0.2 to 2, got 100"),
        (["run", "--chip.vdd", "0.01"], "chip.vdd in the command line: expected a number from 0.2 to 2, got 0.01"),
        (["report"], "Missing from jax-codesign report"),
        (["report", "nowhere"], "no such directory: nowhere"),
        (["report", "full"], "no finished run: full/result.json is missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(arguments, message, runner, capsys):
    Path("full").mkdir()
    Path("full", "file").touch()
    assert cli.main(arguments) == 2
    text = told(capsys)
    assert text.startswith("error: ") and message in text
    assert not runner.calls


def test_run_takes_settings_from_file_and_options(runner, capsys):
    Path("my.yaml").write_text("train: {epochs: 2, batch_size: 8}\nout: mine\n")
    assert cli.main(["run", "--config", "my.yaml", "--train.epochs", "5", "--chip.free", "vdd", "--json"]) == 0
    ((config, directory, resume),) = runner.calls
    assert (config.train.epochs, config.train.batch_size, config.chip.free) == (5, 8, ("vdd",))
    assert (directory, resume) == (Path("mine"), False)
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert output["directory"] == "mine"
    assert [row["edp_ratio"] for row in output["summary"]] == [1.0, pytest.approx(5.0)]


def test_run_without_options_is_the_demo_in_a_new_directory(runner, capsys):
    for number in (1, 2):
        assert cli.main(["run"]) == 0
        assert runner.calls[-1] == (Config(), Path(f"runs/lenet-digits-00{number}"), False)
    table = capsys.readouterr().out
    assert "joint" in table and "97.00" in table and "runs/lenet-digits-002/report.html" in table
    for part in ("3.5–4.8", "4.50–6.25", " 90 ", " 1.04 "):  # intervals, order, bound
        assert part in table


def test_run_says_what_it_does_before_the_first_stage(runner, capsys):
    assert cli.main(["run", "--out", "mine"]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "run directory: mine",
        "tracing the network, searching first mappings",
    ]


def test_interrupted_run_says_how_to_go_on_and_does(runner, capsys):
    runner.ending = KeyboardInterrupt()
    assert cli.main(["run", "--out", "mine", "--train.epochs", "3"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; go on with: jax-codesign run --resume mine"
    runner.ending = None
    assert cli.main(["run", "--resume", "mine"]) == 0
    config, directory, resume = runner.calls[-1]
    assert (config.train.epochs, directory, resume) == (3, Path("mine"), True)


def test_resume_refuses_changed_settings(runner, capsys):
    assert cli.main(["run", "--out", "mine"]) == 0
    capsys.readouterr()
    assert cli.main(["run", "--resume", "mine", "--train.epochs", "9"]) == 2
    assert "changed settings beside --resume mine" in told(capsys)
    assert load_config(Path("mine/config.yaml")).train.epochs == Config().train.epochs


@pytest.mark.parametrize("ending", [ValueError("loss\nis nan"), FileNotFoundError("no"), OSError(28, "No space left")])
def test_errors_of_a_run_are_one_line(ending, runner, capsys, monkeypatch):
    runner.ending = ending
    assert cli.main(["run"]) == 2
    assert "\n" not in capsys.readouterr().err.partition("error: ")[2].strip()
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(type(ending)):
        cli.main(["run"])


def test_report_is_made_again(tmp_path, capsys):
    rundir.write_result(tmp_path, {"title": "t", "summary": SUMMARY})
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    assert (tmp_path / "report.html").is_file()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["summary"][0]["accuracy"] == 0.97 and "joint" in captured.err


def test_progress_tells_the_time_left_from_the_steps_that_took_time():
    now = [100.0]
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with TerminalProgress(console, clock=lambda: now[0]) as progress:
        progress.plan([("pretrain", 50), ("joint", 20)])
        progress.stage("pretrain")
        progress.advance(50)  # done in an earlier run
        progress.stage("joint")
        for _ in range(5):
            now[0] += 2.0
            progress.advance(loss=0.25)
        assert [task.fields["text"] for task in progress.bars.tasks] == ["30 s left", "loss 0.25"]  # 15 steps of 2 s
        assert progress.bars.tasks[0].completed == 55
    assert "pretrain: 50 steps" in stream.getvalue() and "joint: 5 steps, 10 s  loss 0.25" in stream.getvalue()


def test_progress_in_a_file_is_one_line_per_stage():
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream, width=120), clock=lambda: 0.0) as progress:
        progress.plan([("a", 1), ("b", 1)])
        for name in "ab":
            progress.stage(name)
            progress.advance(loss=1.0)
    assert stream.getvalue() == "a: 1 steps, 0 s  loss 1\nb: 1 steps, 0 s  loss 1\n"


def test_ctrl_c_waits_for_the_end_of_a_step_and_not_twice():
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_trace_lists_the_passes_of_every_layer(capsys):
    assert cli.main(["trace", "--model", "lenet", "--batch-size", "4", "--json"]) == 0
    captured = capsys.readouterr()
    traced = json.loads(captured.out)
    by_name = {}
    for row in traced["operations"]:
        by_name.setdefault(row["layer"], []).append(row["pass"])
        assert row["effective_macs"] <= row["macs"]
    first, *others = by_name.values()
    assert sorted(first) == ["forward", "weight_grad"]  # nothing trainable lies below the first layer
    assert all(sorted(passes) == ["forward", "input_grad", "weight_grad"] for passes in others)
    for total in ("macs", "effective_macs"):
        assert traced[total] == sum(row[total] for row in traced["operations"])
    assert "conv" in captured.err


def test_cost_on_a_published_chip(capsys):
    arguments = ["cost", "--chip", "hnpu", "--model", "mlp", "--batch-size", "8", "--evaluations", "32", "--json"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    costs = json.loads(captured.out)
    for cost in (costs["training_step"], costs["inference"]):
        assert sum(cost["energy_by_component_uj"].values()) == pytest.approx(cost["energy_uj"], rel=1e-4)
        assert cost["edp_js"] == pytest.approx(1e-9 * cost["energy_uj"] * cost["latency_ms"])
        for low, high in (cost["intervals"][name] for name in ("energy_uj", "latency_ms", "edp_js", "area_mm2")):
            assert 0 < low < high
        assert cost["edp_to_bound"] == pytest.approx(cost["energy_to_bound"] * cost["latency_to_bound"])
        assert all(row["energy_to_bound"] > 0.999 and row["intervals"]["energy_uj"] for row in cost["operations"])
    step, inference = costs["training_step"], costs["inference"]
    assert step["energy_uj"] > inference["energy_uj"]
    assert [row["operation"] for row in inference["operations"]] == [f"dense{i} (forward)" for i in (1, 2, 3)]
    # The table has the same numbers; EDP in uJ ms, as in the table of a run.
    row = next(line for line in captured.err.splitlines() if "EDP (µJ" in line)
    assert f"{step['edp_js'] * 1e9:.3g} " in row and f" {step['edp_to_bound']:.2f} " in row
    assert "limited by" in captured.err and "5th to 95th percentile" in captured.err
    assert costs["density"] is None
    # Zeros that training leaves are skipped: no operation gets dearer, and those with fewer products get cheaper.
    assert cli.main([*arguments, "--skip-after-epochs", "1"]) == 0
    sparse = json.loads(capsys.readouterr().out)
    assert all(0.0 < share <= 1.0 for share in sparse["density"].values())
    assert min(sparse["density"].values()) < 0.8
    assert sparse["training_step"]["energy_by_component_uj"]["mac"] < step["energy_by_component_uj"]["mac"]
    assert sparse["training_step"]["energy_uj"] < step["energy_uj"]


def test_folder_with_one_npz_file_is_told_to_name_the_file(tmp_path, capsys):
    np.savez(tmp_path / "mine.npz", x_train=np.zeros((2, 4, 4)))
    assert cli.main(["trace", "--data", str(tmp_path)]) == 2
    assert f"give that file instead: {tmp_path / 'mine.npz'}" in told(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "edge_triner"], "edge_trainer"),
        (["--mode", "8 bit"], "expected no mode for 'edge_trainer'"),
        (
            ["--chip", "unpu", "--mode", "4bit"],
            "expected a known mode of UNPU (ISSCC 2018), got '4bit'; the nearest is '4 bit'",
        ),
        (["--chip", "unpu", "--rows", "3"], "got rows for it"),
        (["--chip", "unpu", "--skip-after-epochs", "1"], "expected a chip with zero skipping or slice skipping"),
        (["--model", "no.such:thing"], "no.such"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_cost_of_what_does_not_exist(arguments, message, capsys):
    assert cli.main(["cost", *arguments]) == 2
    assert message in told(capsys)
