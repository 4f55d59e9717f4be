"""Run directory and checkpoints: what is saved comes back bit for bit, and nothing is half-written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import rundir
from codesign.checkpoint import Checkpoints

State = namedtuple("State", "weights key empty step")


def make_state(value: float) -> dict:
    return {
        "named": State(
            weights=[jnp.full((2, 3), value, jnp.bfloat16), jnp.arange(3, dtype=jnp.int32)],
            key=jax.random.key(int(value)),
            empty=jnp.zeros((0, 4)),
            step=int(value),
        ),
        "mask": np.array([True, False]),
    }


def test_state_comes_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path, "f") as checkpoints:
        checkpoints.save(3, make_state(3.25), {"phase": "joint", "done": ["float32"]})
    with Checkpoints(tmp_path, "f") as checkpoints:
        saved = checkpoints.resume()
    assert (saved.step, saved.note) == (3, {"phase": "joint", "done": ["float32"]})
    state = saved.state(make_state(0.0))
    assert isinstance(state["named"], State) and state["named"].step == 3
    assert isinstance(state["mask"], np.ndarray)
    chex.assert_trees_all_equal(state["named"].weights, make_state(3.25)["named"].weights)
    assert jnp.array_equal(jax.random.uniform(state["named"].key), jax.random.uniform(jax.random.key(3)))
    assert state["named"].empty.shape == (0, 4)


def test_keeps_the_last_two_and_falls_back_when_the_last_is_damaged(tmp_path):
    with Checkpoints(tmp_path, "f") as checkpoints:
        for step in (1, 2, 5):
            rundir.append_metrics(tmp_path, {"step": step})
            checkpoints.save(step, {"x": jnp.full(2, float(step))})
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["2", "5"]
    for file in (root / "5" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with Checkpoints(tmp_path, "f") as checkpoints, pytest.warns(UserWarning, match="step 5 is damaged"):
        saved = checkpoints.resume()
    assert saved.step == 2 and saved.state({"x": jnp.zeros(2)})["x"].tolist() == [2.0, 2.0]
    assert rundir.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_directory_of_another_config_is_refused(tmp_path):
    Checkpoints(tmp_path, "aaaa").close()
    with pytest.raises(ValueError, match=r"another config \(fingerprint aaaa, this one is bbbb\)"):
        Checkpoints(tmp_path, "bbbb")


def test_state_of_another_model_is_refused(tmp_path):
    with Checkpoints(tmp_path, "f") as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        saved = checkpoints.resume()
    with pytest.raises(ValueError, match=r"\['y'\] is missing"):
        saved.state({"x": jnp.zeros(2), "y": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"\['x'\] is unknown"):
        saved.state({})
    with pytest.raises(ValueError, match=r"shape \(2,\) and type float32, expected \(3,\)"):
        saved.state({"x": jnp.zeros(3)})


LOOP = """
    import os, signal, sys
    from pathlib import Path
    import jax.numpy as jnp
    from codesign import rundir
    from codesign.checkpoint import Checkpoints

    directory, kill_at = Path(sys.argv[1]), int(sys.argv[2])
    with Checkpoints(directory, "f") as checkpoints:
        saved = checkpoints.resume()
        x = saved.state(jnp.zeros(())) if saved else jnp.zeros(())
        for step in range(saved.step + 1 if saved else 1, 8):
            x = x * 1.1 + step
            rundir.append_metrics(directory, {"step": step, "x": float(x)})
            if step == kill_at:
                with open(directory / rundir.METRICS, "a") as file:
                    file.write('{"step": 6, "x": 1')  # a kill in the middle of a line
                os.kill(os.getpid(), signal.SIGKILL)
            if step % 3 == 0:
                checkpoints.save(step, x)
"""


def run_loop(directory: Path, kill_at: int) -> int:
    directory.mkdir(exist_ok=True)
    script = textwrap.dedent(LOOP)
    return subprocess.run([sys.executable, "-c", script, str(directory), str(kill_at)], env=os.environ).returncode


def test_killed_between_steps_then_resumed_ends_with_the_same_numbers(tmp_path):
    assert run_loop(tmp_path / "whole", kill_at=0) == 0
    assert run_loop(tmp_path / "killed", kill_at=5) == -signal.SIGKILL
    assert [record["step"] for record in rundir.read_metrics(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    assert run_loop(tmp_path / "killed", kill_at=0) == 0
    whole, resumed = ((tmp_path / name / rundir.METRICS).read_bytes() for name in ("whole", "killed"))
    assert whole == resumed and whole.count(b"\n") == 7


def test_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    with Checkpoints(tmp_path, "f") as checkpoints:
        checkpoints.save(1, jnp.ones(2))
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "state").write_bytes(b"half")
    with Checkpoints(tmp_path, "f") as checkpoints:
        assert checkpoints.resume().step == 1
    assert not unfinished.exists()


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from codesign.checkpoint import Checkpoints

    with Checkpoints(Path(sys.argv[1]), "f") as checkpoints:
        checkpoints.save(1, np.ones(20_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # stands in for a disk with 2000 bytes left
        try:
            checkpoints.save(2, np.random.rand(20_000))
        except OSError as error:
            print(error)
"""


def test_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    finished = subprocess.run(script, env=os.environ, capture_output=True, text=True)
    assert finished.returncode == 0 and finished.stderr == ""  # no tracebacks of orbax's threads
    assert len(finished.stdout.splitlines()) == 1 and "the checkpoint of step 2" in finished.stdout
    assert "make room on the disk" in finished.stdout
    with Checkpoints(tmp_path, "f") as checkpoints:
        assert checkpoints.resume().step == 1


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            ValueError("Error writing: File too large [os_error_code='27']"),
            r"\(File too large\); make room on the disk",
        ),
        (PermissionError(13, "Permission denied"), r"\(Permission denied\); let the directory be written to"),
        (ValueError("this is no array"), "^this is no array$"),
    ],
)
def test_what_went_wrong_is_told_as_it_is(raised, told, tmp_path, monkeypatch):
    with Checkpoints(tmp_path, "f") as checkpoints:

        def fail(*_, **__):
            if isinstance(raised, ValueError) and "os_error" in str(raised):
                raise RuntimeError("of a thread") from raised
            raise raised

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises((OSError, ValueError), match=told):
            checkpoints.save(1, np.ones(3))


def test_resume_without_checkpoint_starts_with_no_metrics(tmp_path):
    rundir.append_metrics(tmp_path, {"step": 1})
    with Checkpoints(tmp_path, "f") as checkpoints:
        assert checkpoints.resume() is None
    assert rundir.read_metrics(tmp_path) == []


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    rundir.write_atomic(path, "old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        rundir.write_atomic(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_metrics_hold_only_json(tmp_path):
    rundir.append_metrics(tmp_path, {"step": np.int64(1), "loss": jnp.float32(0.1), "gap": float("nan")})
    assert (tmp_path / rundir.METRICS).read_text() == '{"step": 1, "loss": 0.1, "gap": null}\n'
    with open(tmp_path / rundir.METRICS, "a") as file:
        file.write("[1]\n")
    with pytest.raises(ValueError, match="line 2"):
        rundir.read_metrics(tmp_path)


def test_metrics_shorter_than_their_checkpoint_are_refused(tmp_path):
    rundir.append_metrics(tmp_path, {"step": 1})
    with pytest.raises(ValueError, match="its checkpoint knows 99"):
        rundir.cut_metrics(tmp_path, 99)


def test_design_reads_back(tmp_path):
    design = {
        "chip": {"rows": 16, "columns": np.int32(8), "local_kib": jnp.float32(0.1), "vdd_v": 0.7},
        "precision": {"conv1": {"weights_bits": 4, "inputs_bits": 5}},
        "mapping": {"conv1 forward": {"temporal": np.ones((2, 3), int)}},
        "cost": {"energy_uj": np.float64(1 / 3)},
    }
    rundir.write_design(tmp_path, design)
    assert rundir.read_design(tmp_path / rundir.DESIGN) == {
        "chip": {"rows": 16, "columns": 8, "local_kib": 0.1, "vdd_v": 0.7},
        "precision": {"conv1": {"weights_bits": 4, "inputs_bits": 5}},
        "mapping": {"conv1 forward": {"temporal": [[1, 1, 1], [1, 1, 1]]}},
        "cost": {"energy_uj": 1 / 3},
    }
    assert "\n  conv1: {weights_bits: 4, inputs_bits: 5}\n" in (tmp_path / rundir.DESIGN).read_text()


@pytest.mark.parametrize(
    "text", ["chip: 3\n", "[1, 2]\n", "format: other\n", "a: [\n", "a: 1\na: 2\n", "\x00", "[" * 5000]
)
def test_what_is_no_design_is_one_line(tmp_path, text):
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        rundir.read_design(tmp_path / "d.yaml")
    assert "\n" not in str(error.value) and "d.yaml" in str(error.value)


def test_result_must_exist_and_be_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="run --resume"):
        rundir.read_result(tmp_path)
    rundir.write_result(tmp_path, {"title": "t", "summary": [{"gap": float("inf")}]})
    assert rundir.read_result(tmp_path) == {"title": "t", "summary": [{"gap": None}]}
    (tmp_path / rundir.RESULT).write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="damaged"):
        rundir.read_result(tmp_path)


def test_a_run_that_fails_before_it_wrote_anything_leaves_no_directory(tmp_path):
    def fail(out, file=None):
        with pytest.raises(ValueError, match="mistake"), rundir.new_run(str(out), "x") as directory:
            if file:
                (directory / file).write_text("")
            raise ValueError("mistake")
        return out.exists()

    (tmp_path / "mine").mkdir()
    assert [fail(tmp_path / "new"), fail(tmp_path / "filled", "log"), fail(tmp_path / "mine")] == [False, True, True]


def test_new_run_directory_takes_the_next_free_number_and_never_a_full_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [rundir.new_run_directory(None, "lenet-digits").name for _ in range(2)] == [
        "lenet-digits-001",
        "lenet-digits-002",
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".config.yaml.abc").write_text("half")  # left by a kill
    assert rundir.new_run_directory("mine", "x") == Path("mine")
    (tmp_path / "mine" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="run --resume mine"):
        rundir.new_run_directory("mine", "x")
