"""Malformed input, systematically: whatever stands in a file or on the command line, one clear line and exit code 2.

Mutations of valid inputs, bytes and structure alike, from fixed seeds. What a mutation happens to leave valid is passed over; a
run that would then start is replaced by one that costs nothing.
"""

import io
import itertools
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from codesign import cli, exchange, rundir
from codesign.config import Config, config_to_dict
from hw.operation import make_operation
from tests.test_report import RESULT

SECONDS = 10
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2, 10**30, 1e308, -1e-308, float("nan"), float("inf"), "", "\0", "no\nyes", "é" * 300, "../..",
    [], {}, [[]], [None] * 3, {"": {}}, [1, "two"], "10", "1e3",
)  # fmt: skip
TOKENS = (
    b"\0", b"\xff\xfe", b"\n", b"\t", b"{", b"]", b": ", b"&a [*a, *a]", b"!!python/object/apply:os.mkdir [executed]",
    b"---\n", b'"', b"1e999", b"-", b"%", b"\xf0\x9f", b"NaN", b"9" * 5000, b"[" * 2000,
)  # fmt: skip


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three bytes flipped, spans dropped, doubled or cut off, foreign tokens put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.choice([1, 4, 64]))
        kind = rng.randrange(5)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[start:end]
        elif kind == 2:
            changed[start:start] = changed[start:end]
        elif kind == 3:
            del changed[start:]
        else:
            changed[start:start] = rng.choice(TOKENS)
    return bytes(changed)


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """One node of nested dicts and lists replaced, dropped, renamed or wrapped."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.8:
        items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
        place = rng.randrange(len(items))
        key, value = items[place]
        kind = rng.random()
        if kind < 0.75:
            items[place] = key, mutated_tree(rng, value)
        elif kind < 0.9:
            del items[place]
        else:
            items[place] = f"{key}{rng.choice('xé ')}", value
        return dict(items) if isinstance(tree, dict) else [value for _, value in items]
    return [tree] if rng.random() < 0.1 else rng.choice(HOSTILE)


def settings_cases(rng: random.Random, folder: Path) -> Iterator[list[str]]:
    """Configuration files."""
    path, settings = folder / "settings.yaml", config_to_dict(Config())
    while True:
        if rng.random() < 0.5:
            path.write_bytes(mutated_bytes(rng, yaml.safe_dump(settings).encode()))
        else:
            path.write_text(yaml.dump(mutated_tree(rng, settings), allow_unicode=True), encoding="utf-8")
        yield ["run", "--config", str(path)]


def argument_cases(rng: random.Random, folder: Path) -> Iterator[list[str]]:
    """Command lines."""
    valid = (
        ["run", "--train.epochs", "3", "--chip.free", "rows", "vdd", "--objective.area-mm2", "0.5", "--out", "mine"],
        ["run", "--model.name", "mlp", "--data.writer", "3", "--precision.max-bits", "8", "--no-train.augment"],
        ["trace", "--model", "mlp", "--data", "digits", "--batch-size", "4"],
        ["cost", "--model", "mlp", "--bits", "8", "--chip", "edge_trainer", "--rows", "8", "--vdd", "0.9"],
        ["report", "mine", "--json"],
    )
    for number in itertools.count():
        arguments = list(rng.choice(valid))
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(arguments))
            hostile = rng.choice(
                ["-1", "0", "nan", "inf", "1e999", "", "é", "--", "--x", "os:getcwd", "no:such", ":", "9" * 40]
            )
            word = mutated_bytes(rng, arguments[place].encode()).replace(b"\0", b"").decode(errors="replace")
            arguments[place] = rng.choice([hostile, word[:200]])
        if arguments[0] != "cost" or number % 5 == 0:  # one that is valid costs seconds
            yield arguments


def idx_file(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_cases(rng: random.Random, folder: Path) -> Iterator[list[str]]:
    """Folders of IDX files, of which one is damaged."""
    images, labels = (
        idx_file(np.arange(12 * 64, dtype=np.uint8).reshape(12, 8, 8)),
        idx_file(np.arange(12, dtype=np.uint8) % 2),
    )
    names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    while True:
        for name in names:
            (folder / name).write_bytes(images if "images" in name else labels)
        hit = rng.choice(names)
        (folder / hit).write_bytes(mutated_bytes(rng, (folder / hit).read_bytes()))
        yield ["trace", "--model", "mlp", "--batch-size", "2", "--data", str(folder)]


def npz_cases(rng: random.Random, folder: Path) -> Iterator[list[str]]:
    """Damaged npz files, and whole ones with arrays of wrong names, shapes, types and values."""
    path = folder / "data.npz"
    while True:
        arrays: dict[str, Any] = {}
        for split in ("train", "test"):
            arrays |= {f"x_{split}": np.zeros((12, 8, 8), np.float32), f"y_{split}": np.arange(12) % 2}
        if rng.random() < 0.5:
            name = rng.choice(list(arrays))
            array = arrays.pop(name)
            wrong = [array[:5], array[:0], array[None, None], array.astype(complex), array.astype(str), array * np.nan,
                     array - 3, array * 1e30, array.astype(object), np.float32(3), array.astype("M8[s]")]  # fmt: skip
            arrays[name + rng.choice(["", "", "", "x"])] = rng.choice(wrong)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        path.write_bytes(mutated_bytes(rng, buffer.getvalue()) if rng.random() < 0.6 else buffer.getvalue())
        yield ["trace", "--model", "mlp", "--batch-size", "2", "--data", str(path)]


def table_cases(rng: random.Random, folder: Path) -> Iterator[list[str]]:
    """CSV files of pixels and JSON files by user."""
    rows = ["label," + ",".join(f"pixel{i}" for i in range(64))]
    rows += [f"{n % 2}," + ",".join(str(i) for i in range(64)) for n in range(24)]
    users = {
        "users": ["a", "b"],
        "user_data": {name: {"x": [[0.5] * 64] * 12, "y": [0, 1] * 6} for name in "ab"},
        "num_samples": [12, 12],
    }
    while True:
        if rng.random() < 0.5:
            path, content = folder / "data.csv", mutated_bytes(rng, "\n".join(rows).encode())
        else:
            path = folder / "data.json"
            tree = users if rng.random() < 0.5 else mutated_tree(rng, users)
            content = json.dumps(tree).encode()
            content = mutated_bytes(rng, content) if tree is users else content
        path.write_bytes(content)
        yield ["trace", "--model", "mlp", "--batch-size", "2", "--data", str(path)]


def result_cases(rng: random.Random, folder: Path) -> Iterator[list[str]]:
    """Run directories with a damaged result.json or metrics.jsonl."""
    metrics = "".join(json.dumps({"method": "joint", "epoch": n, "loss": 1.0 / (n + 1)}) + "\n" for n in range(4))
    while True:
        figure = rng.choice(list(RESULT["figures"]))  # one is drawn in a sixth of the time
        valid = RESULT | {"figures": {figure: RESULT["figures"][figure]}}
        result, lines = json.dumps(valid).encode(), metrics.encode()
        kind = rng.randrange(3)
        if kind == 0:
            result = mutated_bytes(rng, result)
        elif kind == 1:
            result = json.dumps(mutated_tree(rng, valid)).encode()
        else:
            lines = mutated_bytes(rng, lines)
        (folder / rundir.RESULT).write_bytes(result)
        (folder / rundir.METRICS).write_bytes(lines)
        yield ["report", str(folder)]


CASES = (settings_cases, argument_cases, idx_cases, npz_cases, table_cases, result_cases)


def told_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the command refuses the arguments, which it must do in time and in one line; nothing else may go wrong."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"hangs: {arguments}")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        code = cli.main(arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    told = capsys.readouterr().err
    assert not Path("executed").exists()
    if code == 0:
        return False
    assert code == 2 and told.startswith("error: ") and len(told) > 20, (arguments, told)
    assert told.count("\n") == 1 and "Traceback" not in told, (arguments, told)
    return True


def refuse(cases: Callable[[random.Random, Path], Iterator[list[str]]], seed: int, number: int, capsys: Any) -> None:
    """See `number` refusals among the mutations of one kind of input."""
    folder = Path("input")
    folder.mkdir(exist_ok=True)
    refused = 0
    for tried, arguments in enumerate(cases(random.Random(seed), folder)):
        refused += told_in_one_line(arguments, capsys)
        if refused == number:
            return
        assert tried < 20 * number + 20, f"only {refused} of {tried + 1} refused"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, with a run that costs nothing."""
    monkeypatch.setattr("codesign.runner.run", lambda *args, **options: {"summary": [{"method": "joint"}]})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("cases", CASES, ids=lambda cases: cases.__name__)
def test_some_malformed_inputs(cases, place, capsys):
    refuse(cases, seed=1, number=3 if cases is result_cases else 8, capsys=capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("cases", CASES, ids=lambda cases: cases.__name__)
def test_a_thousand_malformed_inputs(cases, seed, place, capsys):
    refuse(cases, seed, number=90, capsys=capsys)


@pytest.mark.parametrize("number", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_malformed_problem_and_design_files(number, tmp_path):
    """Read from Python alone: a ValueError in one line."""
    rng = random.Random(4)
    path = tmp_path / "file.yaml"
    problem = exchange.timeloop_problem(make_operation(N=2, K=4, C=3, P=5, Q=5, R=3, S=3))
    rundir.write_design(tmp_path, {"chip": {"rows": 4}, "bits": {"conv1": {"weights": 4}}})
    design = (tmp_path / rundir.DESIGN).read_bytes()
    for _ in range(number):
        for read, content in (
            (exchange.read_timeloop_problem, yaml.dump(mutated_tree(rng, problem)).encode()),
            (exchange.read_timeloop_problem, mutated_bytes(rng, yaml.dump(problem).encode())),
            (rundir.read_design, mutated_bytes(rng, design)),
        ):
            path.write_bytes(content)
            try:
                read(path)
            except ValueError as error:
                assert "\n" not in str(error) and str(path) in str(error), (content, str(error))
