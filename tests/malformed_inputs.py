"""Malformed inputs of every kind: mutations of valid ones, bytes and structure alike, from a random generator.

Each kind is an endless iterator that writes its file, or folder, and yields what is then to be refused: the arguments of
`jax-codesign`, or a function where only Python reads such a file.
"""

import functools
import io
import itertools
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

from codesign import mapper, rundir
from codesign.config import Config, ModelConfig, config_to_dict
from codesign.exchange import operations_of, read_timeloop_problem, timeloop_problem
from codesign.network_file import write_network
from codesign.problem import trace_network
from codesign.summary import describe_bits, describe_chip, describe_mappings
from codesign.timeloop_designs import read_timeloop_design, timeloop_design
from codesign.zigzag_accelerators import read_zigzag_accelerator
from hw.chips import CHIPS
from hw.mapping import make_mapping
from hw.operation import make_operation
from nets import LayerRule, PrecisionRules, init_precision
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.training import split_model
from tests.test_report import RESULT
from tests.test_zigzag_accelerators import ACCELERATOR
from tests.test_zigzag_workloads import NETWORK

Input = list[str] | Callable[[], Any]
Cases = Callable[[random.Random, Path], Iterator[Input]]

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


def settings_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """Configuration files."""
    path, settings = folder / "settings.yaml", config_to_dict(Config())
    while True:
        if rng.random() < 0.5:
            path.write_bytes(mutated_bytes(rng, yaml.safe_dump(settings).encode()))
        else:
            path.write_text(yaml.dump(mutated_tree(rng, settings), allow_unicode=True), encoding="utf-8")
        yield ["run", "--config", str(path)]


def argument_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """Command lines."""
    valid = (
        ["run", "--train.epochs", "3", "--chip.free", "rows", "vdd", "--objective.area-mm2", "0.5", "--out", "mine"],
        ["run", "--model.name", "mlp", "--data.writer", "3", "--precision.max-bits", "8", "--no-train.augment"],
        ["trace", "--model", "mlp", "--data", "digits", "--batch-size", "4"],
        ["cost", "--model", "mlp", "--bits", "8", "--chip", "edge_trainer", "--rows", "8", "--vdd", "0.9"],
        [
            "search",
            "--model",
            "mlp",
            "--chip",
            "edge_trainer",
            "--free",
            "rows",
            "levels",
            "--power-mw",
            "1",
            "--out",
            "mine",
        ],
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
        if arguments[0] not in ("cost", "search") or number % 5 == 0:  # one that is valid costs seconds
            yield arguments


def idx_file(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
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


def npz_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
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


def table_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
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


def result_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
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


def cifar_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """CIFAR-10 archives: a binary or a Python file of six, damaged or with wrong content."""
    rows, labels = np.arange(20 * 3072, dtype=np.uint8).reshape(20, 3072), list(range(10)) * 2
    binary = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))
    content = {b"batch_label": b"of 5", b"labels": labels, b"data": rows, b"filenames": [b"a.png"] * 20}
    wrong = (rows[:5], rows[:, :9], rows.astype(float), labels, None, b"", rows.astype(object))
    names = ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        is_binary = rng.random() < 0.3
        valid = binary if is_binary else pickle.dumps(content, rng.choice([0, 2, 4]))
        damaged = mutated_bytes(rng, valid)
        if not is_binary and rng.random() < 0.4:
            key = rng.choice([b"labels", b"data"])
            other = rng.choice([*wrong, [3] * 19, [-1] * 20, ["a"] * 20, [[1]] * 20])
            damaged = pickle.dumps(content | {key: other}, 2)
        suffix = ".bin" if is_binary else ""
        hit = rng.choice(names)
        for name in names:
            (folder / f"{name}{suffix}").write_bytes(damaged if name == hit else valid)
        yield ["trace", "--model", "mlp", "--batch-size", "2", "--data", str(folder)]


def image_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """Folders of images by class: a damaged file, one of another size or mode, a class without any."""
    while True:
        shutil.rmtree(folder)
        for label in ("cat", "dog"):
            (folder / label).mkdir(parents=True)
            for i in range(5):
                Image.new("L", (6, 5), 20 * i).save(folder / label / f"{i}.png")
        hit = folder / rng.choice(["cat", "dog"]) / f"{rng.randrange(5)}.png"
        kind = rng.randrange(6)
        if kind == 0:
            Image.new("L", (rng.randint(1, 5), 5)).save(hit)
        elif kind == 1:
            hit.write_bytes(rng.choice(TOKENS))
        elif kind == 2:
            shutil.rmtree(hit.parent)
        else:
            hit.write_bytes(mutated_bytes(rng, hit.read_bytes()))
        yield ["trace", "--model", "mlp", "--batch-size", "2", "--data", str(folder)]


def onnx_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """ONNX graphs: damaged files, and whole ones with a node, a tensor or a shape changed."""
    json_format = pytest.importorskip("google.protobuf.json_format", reason="needs the extra 'exchange'")
    reader = pytest.importorskip("tests.test_onnx_reader")
    valid = reader.make_model(reader.CNN, (3, 8, 8), reader.CNN_TENSORS, rank=2)
    tree, path = json_format.MessageToDict(valid), folder / "net.onnx"
    while True:
        model = valid
        if rng.random() < 0.6:
            try:
                model = json_format.ParseDict(mutated_tree(rng, tree), type(valid)())
            except (json_format.ParseError, TypeError, ValueError, AttributeError):  # not even a message
                continue
            path.write_bytes(model.SerializeToString())
        else:
            path.write_bytes(mutated_bytes(rng, valid.SerializeToString()))
        yield ["trace", "--model", str(path), "--batch-size", "2"]


def yaml_bytes(rng: random.Random, tree: Any) -> bytes:
    """A tree as YAML, mutated in its structure or in its bytes."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, yaml.safe_dump(tree, sort_keys=False).encode())
    return yaml.dump(mutated_tree(rng, tree), sort_keys=False, allow_unicode=True).encode()


def zigzag_workload_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """ZigZag's workload files."""
    path = folder / "net.yaml"
    while True:
        path.write_bytes(yaml_bytes(rng, NETWORK))
        yield ["trace", "--model", str(path), "--batch-size", "2"]


def zigzag_accelerator_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """ZigZag's accelerator files."""
    path = folder / "chip.yaml"
    while True:
        path.write_bytes(yaml_bytes(rng, ACCELERATOR))
        yield functools.partial(read_zigzag_accelerator, path)


def timeloop_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """Timeloop's problem files, and those with an architecture and a mapping."""
    path, operation = folder / "problem.yaml", make_operation(N=2, K=4, C=3, P=5, Q=5, R=3, S=3)
    problem = timeloop_problem(operation)
    levels = np.ones((4, 8))
    levels[3] = operation.bounds
    design = timeloop_design(CHIPS["edge_trainer"](), operation, make_mapping(operation, levels), np.full(3, 8.0))
    while True:
        read, tree = rng.choice([(read_timeloop_problem, problem), (read_timeloop_design, design)])
        path.write_bytes(yaml_bytes(rng, tree))
        yield functools.partial(read, path)


def make_run(folder: Path) -> None:
    """A finished run of a network of three layers, without any training."""
    config = Config(model=ModelConfig("mlp"))
    dataset = load_dataset("digits")
    forward, params, rest = split_model(make_model("mlp", dataset.input_shape, dataset.num_classes, 0))
    images = jnp.asarray(dataset.train.images[:8])
    rules = PrecisionRules({"*": LayerRule(4, 4, 4, 4, learn=False)})
    precision, _ = init_precision(lambda p, x: forward(p, rest, x, None, False)[0], rules, params, images)
    workload = trace_network(forward, params, rest, dataset, config.train.batch_size, config.train.optimizer)
    in_dram = [make_mapping(o, [*np.ones((3, 8)), o.bounds]) for o in operations_of(workload)]
    found = mapper.Candidates(jax.tree.map(lambda *x: np.stack(x)[:, None], *in_dram), None, None)
    chip = CHIPS["edge_trainer"]()
    bits = np.full((len(precision.names), 4), 4.0)
    design = {
        "chip": describe_chip(chip),
        "bits": describe_bits(workload, bits, precision.names),
        "mappings": describe_mappings(workload.labels, found, chip.names),
    }
    rundir.write_atomic(folder / rundir.CONFIG, yaml.safe_dump(config_to_dict(config)))
    rundir.write_result(folder, RESULT)
    rundir.write_design(folder, design)
    write_network(folder / rundir.NETWORK, params, rest, precision)
    lines = [{"stage": "joint", "epoch": n, "loss": 1.0 / (n + 1), "chip": {"rows": 8}} for n in range(4)]
    rundir.write_atomic(folder / rundir.METRICS, "".join(json.dumps(line) + "\n" for line in lines))


def run_cases(rng: random.Random, folder: Path) -> Iterator[Input]:
    """Damaged run directories, to go on from and to export."""
    make_run(folder)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    design = rundir.read_yaml(folder / rundir.DESIGN)
    commands = {
        rundir.CONFIG: ["run --resume {}", "export {} --format csv"],
        rundir.RESULT: ["export {}"],
        rundir.DESIGN: ["export {} --format csv", "export {} --format timeloop"],
        rundir.NETWORK: ["export {} --format onnx"],
        rundir.METRICS: ["export {} --format tensorboard"],
    }
    while True:
        for path, content in whole.items():
            path.write_bytes(content)
        for made in ("timeloop", "tensorboard"):
            shutil.rmtree(folder / made, ignore_errors=True)
        name = rng.choice([*commands, rundir.DESIGN, rundir.NETWORK])
        hit = folder / name
        if name == rundir.DESIGN and rng.random() < 0.6:
            hit.write_text(
                yaml.dump(mutated_tree(rng, mutated_tree(rng, design)), allow_unicode=True), encoding="utf-8"
            )
        elif name == rundir.NETWORK and rng.random() < 0.5:
            write_arrays(hit, rng)
        elif rng.random() < 0.1:
            hit.unlink()
        else:
            hit.write_bytes(mutated_bytes(rng, whole[hit]))
        yield rng.choice(commands[name]).format(folder).split()


def write_arrays(path: Path, rng: random.Random) -> None:
    """A whole npz file in which an array is missing, or of another shape or type."""
    with np.load(path) as loaded:
        arrays = dict(loaded)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    wrong = [array[:1], array[None], array.astype(str), array.astype(complex)]
    if rng.random() < 0.7:
        arrays[name] = rng.choice(wrong)
    np.savez(path, allow_pickle=False, **arrays)


KINDS: dict[Cases, int] = {
    settings_cases: 140,
    argument_cases: 140,
    idx_cases: 60,
    npz_cases: 60,
    table_cases: 80,
    cifar_cases: 60,
    image_cases: 40,
    onnx_cases: 80,
    zigzag_workload_cases: 80,
    zigzag_accelerator_cases: 40,
    timeloop_cases: 60,
    result_cases: 60,
    run_cases: 100,
}
"""How many inputs of each kind make the thousand."""
