"""A run that is killed again and again, at random moments, ends with the numbers of one that was left alone, bit for bit.

Processes of their own, so that nothing but the run directory survives. The kills of `test_runner.py` fall between two steps; these
fall anywhere: while compiling, searching, writing a checkpoint or the report.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from codesign import rundir
from codesign.config import load_config

SETTINGS = """\
model: {name: mlp}
train: {pretrain_epochs: 1, epochs: 2, finetune_epochs: 1}
search: {candidates: 2, evaluations: 64, refresh_every: 6}
objective: {cost_weights: [0.1]}
baselines: {include: [uniform8]}
"""
ACCIDENTS = ("kill", "interrupt", "full disk")


def start(arguments: list[str], folder: Path, limit: int | None = None) -> subprocess.Popen[str]:
    """`jax-codesign run` with its own process group; no file can grow beyond `limit` bytes, as where the disk is full."""

    def confine() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "codesign", "run", *arguments], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=confine,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip


def strike(accident: str, arguments: list[str], folder: Path, rng: random.Random, seconds: float) -> bool:
    """Start a run that meets with an accident within `seconds`; returns whether it did before its end."""
    limit = int(10 ** rng.uniform(2, 5)) if accident == "full disk" else None
    process = start(arguments, folder, limit)
    try:
        _, told = process.communicate(timeout=None if limit else rng.uniform(0.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL if accident == "kill" else signal.SIGINT)
        _, told = process.communicate()
    hit = process.returncode != 0
    if hit and limit:
        last = told.splitlines()[-1]
        assert process.returncode == 2 and "Traceback" not in told, told
        assert last.startswith("error: ") and os.strerror(errno.EFBIG) in last, told
    elif hit:
        codes = {"kill": (-signal.SIGKILL,), "interrupt": (130, -signal.SIGINT, 1)}  # the latter two: not yet begun
        assert process.returncode in codes[accident], told
    return hit


def check_whole(directory: Path) -> None:
    """Every file under its final name is whole."""
    if (directory / rundir.CONFIG).exists():
        load_config(directory / rundir.CONFIG)
    rundir.read_metrics(directory)
    if (directory / rundir.RESULT).exists():
        rundir.read_result(directory)
    if (directory / rundir.DESIGN).exists():
        rundir.read_design(directory / rundir.DESIGN)


def outcome(directory: Path) -> tuple[object, ...]:
    """What a run wrote, without how long it took and where."""
    result = json.loads((directory / rundir.RESULT).read_text(encoding="utf-8"))
    del result["seconds"], result["config"]["out"]
    return result, rundir.read_metrics(directory), rundir.read_design(directory / rundir.DESIGN)


def finish(arguments: list[str], folder: Path) -> float:
    """Let a run come to its end; returns how many seconds it took."""
    began = time.monotonic()
    process = start(arguments, folder)
    _, told = process.communicate()
    assert process.returncode == 0, told
    return time.monotonic() - began


def survive(folder: Path, number: int, seed: int, tell: Callable[[str], None] = print) -> None:
    """`number` accidents over as many runs as they take; each of these runs ends as the first does."""
    (folder / "small.yaml").write_text(SETTINGS, encoding="utf-8")
    fresh = ["--config", "small.yaml", "--out"]
    finish([*fresh, "first"], folder)
    seconds = finish([*fresh, "second"], folder)  # finds everything compiled, as the resumed ones will
    expected = outcome(folder / "second")
    assert outcome(folder / "first") == expected
    rng, runs, struck = random.Random(seed), 0, 0
    directory = folder / "run-0"
    while struck < number:
        resumable = (directory / rundir.CONFIG).exists()
        arguments = ["--resume", directory.name] if resumable else [*fresh, directory.name]
        accident = rng.choice(ACCIDENTS)
        struck += (hit := strike(accident, arguments, folder, rng, seconds))
        check_whole(directory)
        tell(f"{struck} {accident}: {'cut off' if hit else 'came too late'}")
        if not hit or struck == number:
            resumable = (directory / rundir.CONFIG).exists()
            finish(["--resume", directory.name] if resumable else [*fresh, directory.name], folder)
            assert outcome(directory) == expected
            runs += 1
            directory = folder / f"run-{runs}"
    tell(f"{struck} accidents in {runs} runs of {seconds:.0f} s")


@pytest.mark.slow
def test_fifty_accidents(tmp_path):
    survive(tmp_path, number=50, seed=0)
