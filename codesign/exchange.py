"""Workloads for other tools: layer tables as CSV or YAML, operations as Timeloop problem files, and those back.

A Timeloop problem has loop bounds, strides and dilations, but no padding: there, as in `Operation.macs`, products with padding
are computed like all others.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from codesign.rundir import blaming, read_yaml, write_atomic
from codesign.tracing import Workload
from hw.operation import LOOPS, OPERANDS, PASSES, Operation, make_operation

_STEPS = ("Wstride", "Hstride", "Wdilation", "Hdilation")
_SPACES = {"Weights": "weights", "Inputs": "inputs", "Outputs": "outputs"}
_LARGEST = 2**24  # float32 has every integer up to it
# The loop that moves these operands (weights, inputs, outputs); those of a window move inputs by a sum instead.
_ROLES = {(1, 1, 1): "G", (0, 1, 1): "N", (1, 0, 1): "K", (1, 1, 0): "C"}


def layer_table(workload: Workload, bits: jax.Array | None = None) -> list[dict[str, Any]]:
    """One row for each operation of a training step, all values plain.

    Args:
      workload: what `codesign.trace` gives.
      bits: (P, 4), of weights, inputs, and errors in input_grad and weight_grad; if given, rows have the operands' widths.

    Returns:
      Layer and pass; how often the operation runs; its loop bounds, strides and dilations; then as `Workload.table`.
    """
    rows = []
    for row, runs, operation in zip(
        workload.table(bits), workload.step.multiplicity, operations_of(workload), strict=True
    ):
        name = {key: row.pop(key) for key in ("layer", "pass")}
        del row["loops"]
        rows.append(name | {"runs": round(float(runs))} | _instance(operation) | row)
    return rows


def write_layers(workload: Workload, path: Path, bits: jax.Array | None = None) -> None:
    """Write `layer_table` to a file, as CSV or YAML by its suffix.

    Raises:
      ValueError: another suffix.
    """
    rows = layer_table(workload, bits)
    if path.suffix == ".csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, buffer.getvalue())
    elif path.suffix in (".yaml", ".yml"):
        write_atomic(path, yaml.safe_dump({"layers": rows}, sort_keys=False))
    else:
        raise ValueError(f"expected a file name that ends in .csv, .yaml or .yml, got {path.name!r}; rename it")


def timeloop_problem(operation: Operation) -> dict[str, Any]:
    """The content of a Timeloop problem file; the operand that the pass accumulates is the one read and written.

    Args:
      operation: a single, concrete operation of any pass.
    """
    accumulated = OPERANDS[int(np.argmax(operation.accumulated))]
    projections: dict[str, list[Any]] = {
        "Weights": [[[loop]] for loop in "GKCRS"],
        "Inputs": [
            *([[loop]] for loop in "GNC"),
            [["P", "Wstride"], ["R", "Wdilation"]],
            [["Q", "Hstride"], ["S", "Hdilation"]],
        ],
        "Outputs": [[[loop]] for loop in "GNKPQ"],
    }
    spaces = [
        {"name": name, "projection": axes} | ({"read-write": True} if _SPACES[name] == accumulated else {})
        for name, axes in projections.items()
    ]
    shape = {
        "name": "nest",
        "dimensions": list(LOOPS),
        "coefficients": [{"name": name, "default": 1} for name in _STEPS],
        "data-spaces": spaces,
    }
    return {"problem": {"shape": shape, "instance": _instance(operation)}}


def write_timeloop_problems(workload: Workload, folder: Path) -> list[Path]:
    """One problem file for each operation of a training step, in their order: `003-conv1-weight_grad.yaml`.

    Returns:
      Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    labels = zip(workload.names, workload.passes, strict=True)
    for i, (operation, (name, pass_)) in enumerate(zip(operations_of(workload), labels, strict=True)):
        path = folder / f"{i:03d}-{name.replace('/', '.')}-{pass_}.yaml"
        write_atomic(path, yaml.safe_dump(timeloop_problem(operation), sort_keys=False))
        paths.append(path)
    return paths


def read_timeloop_problem(path: Path) -> Operation:
    """The operation of a Timeloop problem file.

    What a dimension is follows from the data spaces it moves, not from its name: output channels are those of Weights and
    Outputs, whether K or M. Of two window axes that with Q or S is the height, else the second.

    Args:
      path: a YAML file with `problem: {shape: {dimensions, coefficients, data-spaces}, instance}`, the data spaces being
        Weights, Inputs and Outputs, one of them read and written.

    Raises:
      ValueError: no such file content, or a problem that is no nest of `hw.operation`; says which part.
      FileNotFoundError: no such file.
    """
    content = read_yaml(path)
    with blaming(path):
        return _read_problem(content)


class _Axis(NamedTuple):
    """One window axis: the dimensions over outputs and taps, and the coefficients they are multiplied by."""

    outputs: str
    taps: str
    stride: int
    dilation: int


_POINT = _Axis("", "", 1, 1)


def operations_of(workload: Workload) -> Iterator[Operation]:
    """The operations of a training step one by one, concrete."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, workload.step.operations))
    return (jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True))


def _instance(operation: Operation) -> dict[str, int]:
    values = np.concatenate([operation.bounds, operation.stride, operation.dilation])
    return dict(zip((*LOOPS, *_STEPS), (round(float(value)) for value in values), strict=True))


def _read_problem(content: Any) -> Operation:
    problem = _get(content, "problem", dict)
    shape = _get(problem, "shape", dict)
    dimensions = _get(shape, "dimensions", list)
    if not all(isinstance(name, str) for name in dimensions):
        raise ValueError(f"expected dimensions to be names, got {dimensions!r}; quote them")
    sizes = _sizes(dimensions, _get(shape, "coefficients", list, []), _get(problem, "instance", dict))
    spaces = {_get(space, "name", str): space for space in _get(shape, "data-spaces", list)}
    if set(spaces) != set(_SPACES):
        raise ValueError(f"expected the data spaces Weights, Inputs and Outputs, got {', '.join(spaces)}; rename them")
    moved = {name: _terms(space, sizes) for name, space in spaces.items()}
    axes = _window_axes(moved["Inputs"], moved["Weights"], moved["Outputs"])
    loops = _plain_loops(dimensions, moved, axes, sizes)
    for axis, names in zip(axes, ("PR", "QS"), strict=False):
        loops |= dict(zip(names, (sizes[axis.outputs], sizes[axis.taps]), strict=True))
    width, height = [*axes, _POINT, _POINT][:2]
    steps: dict[str, Any] = {"stride": (width.stride, height.stride), "dilation": (width.dilation, height.dilation)}
    return make_operation(**loops, **steps, pass_=_pass(spaces))


def _sizes(dimensions: list[str], coefficients: list[Any], instance: dict[Any, Any]) -> dict[str, int]:
    """Sizes of all dimensions and values of all coefficients."""
    defaults = {_get(coefficient, "name", str): _get(coefficient, "default", int) for coefficient in coefficients}
    for name in instance:
        if name not in dimensions and name not in defaults:
            raise ValueError(f"expected sizes of dimensions and coefficients in instance, got {name!r}; remove it")
    sizes = defaults | instance
    for name in dimensions:
        if name not in sizes:
            raise ValueError(f"expected a size of every dimension in instance, got none of {name}; add it")
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _LARGEST:
            raise ValueError(f"expected {name} to be an integer from 1 to {_LARGEST}, got {size!r}")
    return sizes


def _get(parent: Any, key: str, kind: type, default: Any = None) -> Any:
    """An entry of a mapping, of the type it must have; hyphens may be underscores, as in newer Timeloop files."""
    found = parent.get(key, parent.get(key.replace("-", "_"), default)) if isinstance(parent, Mapping) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"expected {key!r} to be a {kind.__name__}, got {found!r}")
    return found


def _pass(spaces: Mapping[str, Any]) -> str:
    written = [name for name, space in spaces.items() if space.get("read-write", space.get("read_write", False))]
    if len(written) != 1:
        raise ValueError(f"expected one data space with read-write, got {', '.join(written) or 'none'}")
    return next(pass_ for pass_, operand in PASSES.items() if operand == _SPACES[written[0]])


def _terms(space: Mapping[str, Any], sizes: Mapping[str, int]) -> list[list[tuple[str, int]]]:
    """The projection of a data space: for each of its axes the dimensions that are added up, with their factors."""
    axes = []
    is_sum = space["name"] == "Inputs"
    for axis in _get(space, "projection", list):
        terms: list[Any] = axis if isinstance(axis, list) and (is_sum or len(axis) == 1) else [None]
        for term in terms:
            known = isinstance(term, list) and len(term) in ((1, 2) if is_sum else (1,))
            if not (known and all(isinstance(name, str) and name in sizes for name in term)):
                raise ValueError(
                    f"expected projections as lists of [[dimension]], of Inputs also as sums with coefficients, got {axis!r} "
                    f"in {space['name']}; spell it out"
                )
        axes.append([(term[0], sizes[term[1]] if len(term) == 2 else 1) for term in terms])
    return axes


def _window_axes(inputs: Any, weights: Any, outputs: Any) -> list[_Axis]:
    """Width and height, those of them that there are."""
    over = {dimension for axis in outputs for dimension, _ in axis}
    within = {dimension for axis in weights for dimension, _ in axis}
    axes = []
    for axis in (axis for axis in inputs if len(axis) > 1):
        positions = [term for term in axis if term[0] in over - within]
        taps = [term for term in axis if term[0] in within - over]
        if len(axis) != 2 or len(positions) != 1 or len(taps) != 1:
            raise ValueError(
                f"expected a sum in Inputs to be of one dimension of Outputs and one of Weights, got "
                f"{' + '.join(name for name, _ in axis)}"
            )
        axes.append(_Axis(positions[0][0], taps[0][0], positions[0][1], taps[0][1]))
    if len(axes) > 2:
        raise ValueError(f"expected at most two window axes, got {len(axes)}; write the third as a sum of problems")
    return sorted(axes, key=lambda axis: axis.outputs == "Q" or axis.taps == "S")


def _plain_loops(dimensions: Any, moved: Any, axes: list[_Axis], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Sizes of G, N, K and C: what is in no window."""
    loops: dict[str, Any] = {}
    windowed = {name for axis in axes for name in (axis.outputs, axis.taps)}
    for name in (name for name in dimensions if name not in windowed):
        moves = tuple(int(any((name, 1) in axis for axis in moved[space])) for space in _SPACES)
        if moves not in _ROLES or _ROLES[moves] in loops:
            raise ValueError(
                f"expected dimensions that are groups, batch, output or input channels, one each, or in a window, got {name!r}, "
                f"which moves {', '.join(s for s, m in zip(_SPACES, moves, strict=True) if m) or 'nothing'}; join or split it"
            )
        loops[_ROLES[moves]] = sizes[name]
    return loops
