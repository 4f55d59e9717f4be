"""Malformed input, systematically: whatever stands in a file or on the command line, one clear line and exit code 2.

What a mutation happens to leave valid is passed over; a run or search that would then start is replaced by one that costs nothing.
"""

import random
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from codesign import cli
from tests.malformed_inputs import KINDS, Cases, Input, result_cases, run_cases

SECONDS = 10


def told_in_one_line(given: Input, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether an input is refused, which it must be in time and in one line; nothing else may go wrong."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"hangs: {given}")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        code = cli.main(given) if isinstance(given, list) else cli.exit_code(lambda: given() and None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    told = capsys.readouterr().err
    assert not Path("executed").exists()
    if code == 0:
        return False
    assert code == 2 and told.startswith("error: ") and len(told) > 20, (given, told)
    assert told.count("\n") == 1 and "Traceback" not in told, (given, told)
    return True


def refuse(cases: Cases, seed: int, number: int, capsys: Any) -> int:
    """See `number` refusals among the mutations of one kind of input; returns it."""
    folder = Path("input")
    folder.mkdir(exist_ok=True)
    refused = 0
    for tried, given in enumerate(cases(random.Random(seed), folder)):
        refused += told_in_one_line(given, capsys)
        if refused == number:
            return refused
        assert tried < 20 * number + 20, f"only {refused} of {tried + 1} refused"
    raise AssertionError("the mutations have an end")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, no network, a run and a search that cost nothing."""

    def connect(*_: object) -> None:
        raise AssertionError("something is fetched")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("codesign.runner.run", lambda *args, **options: {"summary": [{"method": "joint"}]})
    monkeypatch.setattr("codesign.chip_report.ChipSearch", lambda *args: sys.exit(0))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "cases", [cases for cases in KINDS if cases is not run_cases], ids=lambda cases: cases.__name__
)
def test_some_malformed_inputs(cases, place, capsys):
    refuse(cases, seed=1, number=2 if cases is result_cases else 5, capsys=capsys)


@pytest.mark.slow
def test_a_thousand_malformed_inputs(place, tmp_path_factory, monkeypatch, capsys):
    refused = 0
    for cases, number in KINDS.items():
        monkeypatch.chdir(tmp_path_factory.mktemp(cases.__name__))
        refused += refuse(cases, 2, number, capsys)
    assert refused == 1000
