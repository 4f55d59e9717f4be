"""The mapper on the chips and layers of reference files: no mapping in them may take less energy than what it finds.

    python -m experiments.search_references ../shared/reference/timeloop/points.jsonl
    python -m experiments.search_references ../shared/reference/zigzag/points.json --format zigzag

For every (chip, layer) the least energy of the file's mappings, against the least that local search finds under the same
conventions: the file's energies per access, its capacities, perfect factors. Every answer is counted once more, in double
precision, by what `experiments.check_accesses` compares with the file. Ends with exit code 1 if one is worse than the file,
2 if the file cannot be read.
"""

import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from codesign.config import Seed
from codesign.flat import FlatPrices, map_operations
from codesign.mapspace import Nest, Space
from codesign.rundir import blaming
from experiments import command_line
from experiments.timeloop_points import TimeloopPoint, read_timeloop
from experiments.zigzag_points import ZigzagPoint, read_zigzag
from experiments.zigzag_search import recount as recount_zigzag
from experiments.zigzag_search import search_layer
from hw.accesses import count
from hw.mapping import Mapping
from hw.operation import LOOPS

CHAINS, ITERATIONS = 32, 1600


@dataclass(frozen=True)
class Row:
    """One chip and layer: least energy of the file and of the search, in the file's units; seconds of the search."""

    chip: str
    layer: str
    reference: float
    found: float
    seconds: float

    @property
    def ratio(self) -> float:
        """What was found over the reference."""
        return self.found / self.reference


def space_of(point: TimeloopPoint) -> Space:
    """What the chip of a point allows: every loop may run at every level and fan out wherever there is a fan-out."""
    levels = [level.value for level in point.levels]
    with point.record.blamed():
        fanout = np.array([level["fanout_below"] for level in levels], float)
        capacity = np.array([level["entries"] or np.inf for level in levels], float)
    spatial = np.broadcast_to((fanout > 1)[..., None], (*fanout.shape, len(LOOPS)))
    everything = np.ones((len(levels), 3), bool)
    temporal = np.ones((len(levels), len(LOOPS)), bool)
    return Space(everything, temporal, spatial, fanout, capacity, everything.astype(float))


def prices_of(point: TimeloopPoint) -> FlatPrices:
    """Energies per access of a point's chip, in microjoules; the file is compared by energy, so nothing has to wait."""
    access = jnp.array([level.number("access_energy") for level in point.levels]) * 1e-6
    mac = jnp.asarray(point.record.record("arch").record("mac").number("energy") * 1e-6)
    return FlatPrices(access, mac, jnp.full_like(access, jnp.inf), jnp.zeros_like(access))


def nest_of(point: TimeloopPoint) -> Nest:
    """The layer of a point in plain numbers."""
    operation = point.case.operation
    stride, dilation = ((int(a), int(b)) for a, b in (operation.stride, operation.dilation))
    return Nest(tuple(int(b) for b in operation.bounds), stride, dilation)


def search_timeloop(path: Path, seed: int = 0, limit: int | None = None) -> list[Row]:
    """One row for every chip and layer of a Timeloop file, or for the first `limit` of them."""
    same: dict[tuple, list[TimeloopPoint]] = defaultdict(list)
    for point in read_timeloop(path):
        nest = nest_of(point)
        same[json.dumps(point.record.value["arch"], sort_keys=True), nest].append(point)
    return [_timeloop_row(points, jax.random.key(seed)) for points in list(same.values())[:limit]]


def _timeloop_row(points: list[TimeloopPoint], key: jax.Array) -> Row:
    """A level that keeps an operand may also pass it by, as in the file; DRAM keeps all."""
    point, nest, space = points[0], nest_of(points[0]), space_of(points[0])
    layer, arch = point.record.get("layer", str), point.record.record("arch")
    kind = f"{arch.get('kind', str)} {arch.record('mac').get('instances', int)} MACs"
    toggles = space.keep & (np.arange(space.num_levels) < space.num_levels - 1)[:, None]
    begun = time.perf_counter()
    mapped = map_operations(
        key, [nest], space, prices_of(point), jnp.array([[1.0, 0.0]]), toggles=toggles, num_chains=CHAINS,
        iterations=ITERATIONS, num_best=1,
    )  # fmt: skip
    jax.block_until_ready(mapped)
    seconds = time.perf_counter() - begun
    mapped.check([nest], space)
    # Counted, as the file prints two decimals of a microjoule.
    least = min(p.energy(_count(p, p.case.mapping)) for p in points)
    return Row(kind, layer, least, recount(point, mapped.mapping), seconds)


def recount(point: TimeloopPoint, mapping: Mapping) -> float:
    """Energy in microjoules of the first of the mappings (1, K) of a point's layer, as its file is checked."""
    return point.energy(_count(point, jax.tree.map(lambda x: x[0, 0], mapping)))


def _count(point: TimeloopPoint, mapping: Mapping):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.int32 if x.dtype == np.int32 else np.float64), mapping)
        operation = jax.tree.map(lambda x: np.asarray(x, np.float64), point.case.operation)
        return jax.tree.map(np.asarray, _counted(operation, wide))


_counted = jax.jit(count)


def search_zigzag(path: Path, seed: int = 0, limit: int | None = None) -> list[Row]:
    """One row for every chip and layer of a ZigZag file, or for the first `limit` of them; picojoules."""
    same: dict[tuple[str, str], list[ZigzagPoint]] = defaultdict(list)
    for point in read_zigzag(path):
        same[point.record.get("arch", str), point.record.get("layer", str)].append(point)
    rows = []
    for (chip, layer), points in list(same.items())[:limit]:
        best = min(points, key=lambda point: point.record.number("linear_energy_total_pJ"))
        begun = time.perf_counter()
        _, mapping = search_layer(jax.random.key(seed), best)
        seconds = time.perf_counter() - begun
        least = best.record.number("linear_energy_total_pJ")
        rows.append(Row(chip, layer, least, recount_zigzag(best, mapping), seconds))
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Prints one line for every chip, and what was asked."""
    table = Table()
    for heading in ("chip", "layers", "worst / file", "median / file", "best / file", "s per layer", "longest"):
        table.add_column(heading, justify="left" if heading == "chip" else "right")
    chips = dict.fromkeys(row.chip for row in rows)
    for chip in chips:
        ratios = [row.ratio for row in rows if row.chip == chip]
        seconds = [row.seconds for row in rows if row.chip == chip]
        numbers = (max(ratios), np.median(ratios), min(ratios), np.median(seconds), max(seconds))
        table.add_row(chip, str(len(ratios)), *(f"{number:.3f}" for number in numbers))
    console.print(table)
    worse = [row for row in rows if row.ratio > 1 + 1e-6]
    console.print(f"{len(rows)} chips and layers, {len(worse)} where a mapping of the file takes less energy")
    console.print("The first search of each kind of chip compiles: its seconds are the longest.")


def main(
    file: Annotated[Path, tyro.conf.Positional],
    format: Literal["timeloop", "zigzag"] = "timeloop",
    seed: Seed = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Searches every chip and layer of a file; returns the exit code.

    Args:
      file: reference points, one JSON object a line (timeloop) or one document (zigzag).
      format: whose points they are.
      seed: of the searches.
      as_json: print one JSON object on the last line.
    """
    with blaming(file):
        rows = search_zigzag(file, seed) if format == "zigzag" else search_timeloop(file, seed)
    show(rows, Console(stderr=as_json))
    if as_json:
        print(json.dumps([row.__dict__ | {"ratio": row.ratio} for row in rows]))
    return int(any(row.ratio > 1 + 1e-6 for row in rows))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
