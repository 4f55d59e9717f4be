"""Compares the access counts with those of Timeloop or ZigZag, point by point.

``python -m experiments.check_accesses FILE [--json] [--format timeloop|zigzag]``; seconds for some hundred points.
Ends with exit code 0 if every entry matches, 1 if some do not, 2 if the file cannot be read.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from codesign.rundir import blaming
from experiments import command_line
from experiments.reference_points import Case, Entry
from experiments.timeloop_points import TimeloopPoint, read_timeloop
from experiments.zigzag_points import ZigzagPoint, read_zigzag
from hw import LOOPS, Accesses, Conventions, Mapping, count

SHOWN = 5
type Point = TimeloopPoint | ZigzagPoint


def check(path: Path, format: Literal["timeloop", "zigzag"] = "timeloop") -> dict:
    """Compares all points of a file; counts are exact where the caller enables double precision.

    Returns:
      `points`, `entries`, `mismatches`, `worst_relative_error` and `first_mismatches`, each explained in a line.

    Raises:
      FormatError: the file is truncated or of another format.
      OSError: it cannot be read.
    """
    entries, mismatches, worst = 0, [], 0.0
    points: Sequence[Point] = read_zigzag(path) if format == "zigzag" else read_timeloop(path)
    counts = iter(count_all([case for point in points for case in point.cases], points[0].conventions))
    for point in points:
        of_cases = [next(counts) for _ in point.cases]
        for entry in point.entries(of_cases):
            entries += 1
            worst = max(worst, entry.excess)
            if not entry.matches:
                mismatches.append(_explain(point, entry))
    return {
        "points": len(points),
        "entries": entries,
        "mismatches": len(mismatches),
        "worst_relative_error": worst,
        "first_mismatches": mismatches[:SHOWN],
    }


def count_all(cases: list[Case], conventions: Conventions) -> list[Accesses]:
    """Counts of all cases in one batch, as numpy arrays; empty levels below the others make them equally deep."""
    depth = max(case.mapping.num_levels for case in cases)
    deepened = [Case(case.operation, _deepened(case.mapping, depth)) for case in cases]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *deepened)
    counted = jax.jit(jax.vmap(partial(count, conventions=conventions)))(batch.operation, batch.mapping)
    counted = jax.tree.map(np.asarray, counted)
    counts = []
    for i, case in enumerate(cases):
        added = depth - case.mapping.num_levels
        counts.append(
            jax.tree.map(lambda leaf, i=i, added=added: leaf[i, added:] if leaf.ndim > 1 else leaf[i], counted)
        )
    return counts


def _deepened(mapping: Mapping, depth: int) -> Mapping:
    """The same mapping above levels that run no loop and keep nothing."""

    def add(levels: jax.Array, row: np.ndarray) -> jax.Array:
        added = np.broadcast_to(row, (depth - len(levels), *levels.shape[1:]))
        return jnp.concatenate([jnp.asarray(added, levels.dtype), levels])

    return Mapping(
        temporal=add(mapping.temporal, np.ones(())),
        spatial=add(mapping.spatial, np.ones(())),
        order=add(mapping.order, np.arange(len(LOOPS))),
        keep=add(mapping.keep, np.zeros(())),
    )


def _explain(point: Point, entry: Entry) -> str:
    """The numbers, and the nest they belong to, outermost level first."""
    case = point.cases[0]
    levels = []
    for l in reversed(range(case.mapping.num_levels)):
        temporal, spatial = np.asarray(case.mapping.temporal[l]), np.prod(case.mapping.spatial[l], axis=0)
        loops = [
            f"{LOOPS[d]}{temporal[d]:g}" for d in np.argsort(-np.asarray(case.mapping.order[l])) if temporal[d] > 1
        ]
        loops += [f"({LOOPS[d]}{spatial[d]:g})" for d in range(8) if spatial[d] > 1]
        levels.append(" ".join(loops) or "-")
    window = f"stride {np.asarray(case.operation.stride)}, dilation {np.asarray(case.operation.dilation)}"
    return (
        f"{point.name}, {entry.name}: expected {entry.expected:.17g}, counted {float(entry.counted):.17g};"
        f" loops outer to inner, (fan-out): {' | '.join(levels)}; {window}"
    )


def main(
    file: tyro.conf.Positional[Path],
    format: Literal["timeloop", "zigzag"] = "timeloop",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Compares the access counts with those of Timeloop or ZigZag, point by point; returns the exit code.

    Args:
      file: reference points, one JSON object a line (timeloop) or one document (zigzag).
      format: whose points they are.
      as_json: print one JSON object instead of text.
    """
    with blaming(file), jax.enable_x64(True):
        report = check(file, format)
    if as_json:
        print(json.dumps(report))
    else:
        print(f"{report['points']} points, {report['entries']} entries, {report['mismatches']} mismatches")
        print(f"worst relative error {report['worst_relative_error']:.2g}")
        print(*report["first_mismatches"], sep="\n")
    return 1 if report["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
