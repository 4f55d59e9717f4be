"""The run directory: files that are whole or absent, whatever kills the process.

runs/lenet-digits-001/
  config.yaml      settings, complete
  metrics.jsonl    one JSON object per line, in order of time
  design.yaml      the chip, bits and mappings that came out, with units in the key names
  result.json      everything the report shows
  network.npz      the joint design's network: weights, batch statistics, formats
  report.html      the report; figures/*.svg the same pictures one by one
  checkpoints/     state to resume from
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CONFIG, METRICS, DESIGN, RESULT, REPORT = "config.yaml", "metrics.jsonl", "design.yaml", "result.json", "report.html"
NETWORK = "network.npz"

DESIGN_FORMAT = "jax-codesign design 1"
_DESIGN_HEADER = """\
# A co-designed chip: what to build, the bits of every layer, how its work is mapped, what that costs.
# Units are the last part of a key (kib, mm2, uj, ms, v, bits; js is J s, and 1 uJ ms is 1e-9 J s); keys without one are
# counts or ratios. Intervals are [low, high], see the report.
"""


def new_run_directory(out: str | None, stem: str) -> Path:
    """Create and return the directory of a new run: `out`, or else the first free runs/STEM-NUMBER.

    Raises:
      ValueError: `out` holds something already, which a new run would overwrite.
    """
    if out is not None:
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: {path} is a file; name a directory that is empty or does not exist")
        if path.is_dir() and any(
            not file.name.startswith(f".{CONFIG}.") for file in path.iterdir()
        ):  # a kill's leftover
            raise ValueError(f"out: {path} is not empty; continue it with 'run --resume {path}' or name another")
        path.mkdir(parents=True, exist_ok=True)
        return path
    number = 1
    while True:
        path = Path("runs") / f"{stem}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


@contextlib.contextmanager
def new_run(out: str | None, stem: str) -> Iterator[Path]:
    """`new_run_directory`, which is gone again where a mistake ends the run before anything is written into it.

    Raises:
      ValueError: as `new_run_directory`.
    """
    was_there = out is not None and Path(out).exists()
    path = new_run_directory(out, stem)
    try:
        yield path
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):  # one that holds something stays
                path.rmdir()
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old content or the new one."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with _naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private to the user
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def append_metrics(directory: Path, record: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl; numbers that are not finite become null, which JSON has instead."""
    line = json.dumps(plain(record, finite=True), allow_nan=False) + "\n"
    with _naming(directory / METRICS), open(directory / METRICS, "a", encoding="utf-8") as file:
        file.write(line)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl; an unfinished last line, left by a kill, is passed over.

    Raises:
      ValueError: a line before the last is not a JSON object.
    """
    path = directory / METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"not a JSON object: {path}, line {number}; remove the line")
        records.append(record)
    return records


def sync_metrics(directory: Path) -> int:
    """Force metrics.jsonl to the disk; returns its size in bytes, which a checkpoint remembers."""
    with open(directory / METRICS, "ab") as file:
        os.fsync(file.fileno())
        return file.tell()


def cut_metrics(directory: Path, size: int) -> None:
    """Cut metrics.jsonl back to `size` bytes: drop what was logged after the checkpoint that is resumed.

    Raises:
      ValueError: the file is shorter, so it is not the one that was written beside the checkpoint.
    """
    path = directory / METRICS
    present = path.stat().st_size if path.exists() else 0
    if present < size:
        raise ValueError(f"{path} has {present} bytes, its checkpoint knows {size}; restore the file")
    if present > size:
        os.truncate(path, size)


def write_design(directory: Path, design: Mapping[str, Any]) -> None:
    """Write design.yaml: nested dict of numbers, text and arrays, units in the key names."""
    content = {"format": DESIGN_FORMAT, **plain(design)}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    write_atomic(directory / DESIGN, _DESIGN_HEADER + text)


def read_design(path: Path) -> dict[str, Any]:
    """Read a design.yaml back, the same nested dict with lists for arrays.

    Raises:
      ValueError: not YAML, or not a design of this format.
      FileNotFoundError: no such file.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or content.get("format") != DESIGN_FORMAT:
        raise ValueError(f"no design: {path} lacks the line 'format: {DESIGN_FORMAT}'; give a design.yaml of a run")
    return {key: value for key, value in content.items() if key != "format"}


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, from which `report` can be made again."""
    write_atomic(directory / RESULT, json.dumps(plain(result, finite=True), indent=1, allow_nan=False) + "\n")


def read_result(directory: Path) -> dict[str, Any]:
    """Read result.json.

    Raises:
      FileNotFoundError: the run has not finished, or this is no run directory.
      ValueError: the file is damaged.
    """
    path = directory / RESULT
    if not path.is_file():
        raise FileNotFoundError(f"no finished run: {path} is missing; finish it with 'run --resume {directory}'")
    try:
        result = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise ValueError(f"damaged: {path} is not a JSON object; make it again with 'run --resume {directory}'")
    return result


def plain(value: Any, finite: bool = False) -> Any:
    """Nested dicts and lists of Python's own numbers and text, from numpy, JAX arrays, tuples and paths.

    Args:
      value: what to convert.
      finite: turn infinities and NaN into None, for JSON.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, finite) for item in value]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        # The shortest decimal that names a float32 reads better than the same number in double precision.
        return plain((array.astype(str).astype(float) if array.dtype == np.float32 else array).tolist(), finite)
    if isinstance(value, float) and finite and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def read_yaml(path: Path) -> Any:
    """Parse one YAML file with plain types only; a key that stands twice is an error.

    Raises:
      ValueError: one line with file, line and column.
      FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; check the path")
    try:
        content = path.read_bytes()
        _refuse_duplicate_keys(yaml.compose(content, Loader=yaml.SafeLoader))
        return yaml.safe_load(content)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"not valid YAML: {error.problem} in {path}{where}; correct it there") from None
    except Exception as error:  # PyYAML raises anything, down to AttributeError, where a value does not fit its tag
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not valid YAML: {reason} in {path}; is this the right file?") from None


def read_json(path: Path) -> Any:
    """Parse one JSON file.

    Raises:
      ValueError: not JSON; one line with the file.
      OSError: no such file, or none that can be read.
    """
    with blaming(path):
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}; is this the right file?") from None


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[Path]:
    """What is wrong within is told with the file that says it."""
    try:
        yield path
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_duplicate_keys(root: yaml.Node | None) -> None:
    """Raises ConstructorError where a key stands twice, of which a loader would silently keep the last."""
    pending, visited = [root], set()  # an alias may lead back to where it stands
    while pending:
        node = pending.pop()
        if id(node) in visited or not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
            continue
        keys = set()
        for key, value in node.value:
            pending += [key, value]
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            keys.add(key.value)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error in writing, as where the disk is full, says which file it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {path} cannot be written") from error


def _sync_directory(path: Path) -> None:
    """Make a rename in the directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
