"""One training step of an ImageNet network on one array: every pass mapped as suits it, against single dataflows.

    python -m experiments.table_steps                 # ResNet-18 and MobileNetV2, batch 32: minutes
    python -m experiments.table_steps --quick         # at 32 x 32 pixels, few evaluations

The step has all passes, element-wise work, the optimiser and the residency of activations that are kept for the backward
pass. A dataflow wires the array for some loops along each axis and leaves the rest of every mapping free; `own` leaves the
array free, too, and begins with what the dataflows found. All go for the least energy-delay product of the step.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from codesign import mapper
from codesign.config import Between, Count, Seed
from codesign.evaluation import Evaluated, evaluate_chip
from codesign.mapper import Candidates
from codesign.tracing import Workload, trace
from experiments import command_line
from hw.chip import Chip
from hw.chips import CHIPS
from hw.operation import LOOPS
from nets.models import MobileNetV2, ResNet18
from nets.training import split_model

NETWORKS: dict[str, Callable[..., nnx.Module]] = {"resnet18": ResNet18, "mobilenet_v2": MobileNetV2}
DATAFLOWS = {
    "channels": ("GK", "C"),  # as TPU and Gemmini: output channels along X, input channels along Y
    "outputs": ("P", "Q"),  # as ShiDianNao: a patch of outputs
    "rows": ("Q", "S"),  # as Eyeriss: rows of outputs by rows of the filter
    "samples": ("GK", "N"),  # output channels by samples
}
"""Loops that may fan out along X and Y. Channels of a depthwise layer are groups."""
PASSES = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True)
class Row:
    """A training step under one dataflow: joules, seconds, share of MAC-cycles that work in each of `PASSES`."""

    network: str
    dataflow: str
    energy: float
    latency: float
    utilisation: tuple[float, ...]

    @property
    def edp(self) -> float:
        """Energy-delay product in J s."""
        return self.energy * self.latency


def trace_step(name: str, pixels: int, batch: int) -> Workload:
    """The training step of a network, by shapes alone, with momentum."""
    shape = (pixels, pixels, 3)
    forward, params, rest = split_model(nnx.eval_shape(lambda: NETWORKS[name](shape, 1000, rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    def network(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        return forward(params, rest, images, None, True)[0]

    return trace(network, params, rest, images, optimizer="momentum")


def freedom_of(chip: Chip, dataflow: str) -> mapper.Freedom:
    """What a dataflow leaves open on a chip; everything if it is none of `DATAFLOWS`."""
    slots = mapper.make_slots(chip)
    if dataflow not in DATAFLOWS:
        return mapper.make_freedom(slots)
    axes = np.array([[loop in along for loop in LOOPS] for along in DATAFLOWS[dataflow]])
    return mapper.make_freedom(slots, spatial=np.broadcast_to(axes, (slots.num_levels, *axes.shape)))


def map_step(
    workload: Workload, chip: Chip, dataflow: str, bits: float, evaluations: int, rounds: int, seed: int,
    start: Candidates | None = None,
) -> Evaluated:  # fmt: skip
    """The step with its mappings searched under a dataflow, all operands of one width, from a `start` on."""
    widths = jnp.full((workload.num_products, 4), bits)
    return evaluate_chip(
        chip, workload.step, workload.operation_bits(widths), workload.tensor_bits(widths), jax.random.key(seed),
        workload.labels, evaluations=evaluations, rounds=rounds, freedom=freedom_of(chip, dataflow), start=start,
    )  # fmt: skip


def run(
    name: str, chip: Chip, pixels: int, batch: int, bits: float, evaluations: int, rounds: int = 6, seed: int = 0
) -> list[Row]:
    """All dataflows on one network, `own` last: its search goes on from the best mappings of all others."""
    workload, rows = trace_step(name, pixels, batch), []
    arguments = bits, evaluations, rounds, seed
    found = {dataflow: map_step(workload, chip, dataflow, *arguments) for dataflow in DATAFLOWS}
    best = [jax.tree.map(lambda x: x[:, :3], single.candidates) for single in found.values()]
    start = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *best)
    found["own"] = map_step(workload, chip, "own", *arguments, start=start)
    for dataflow, evaluated in found.items():
        cost = evaluated.cost
        utilisation = tuple(float(share) for share in cost.utilisation)
        rows.append(Row(name, dataflow, float(cost.energy), float(cost.latency), utilisation))
    return rows


def show(rows: list[Row], console: Console) -> None:
    """One line for each network and dataflow."""
    table = Table()
    for heading in ("network", "dataflow", "energy (mJ)", "latency (ms)", "EDP / own", *(f"{p} (%)" for p in PASSES)):
        table.add_column(heading, justify="right" if "(" in heading or "/" in heading else "left")
    own = {row.network: row.edp for row in rows if row.dataflow == "own"}
    for row in rows:
        busy = (f"{100 * share:.0f}" for share in row.utilisation)
        numbers = (f"{1e3 * row.energy:.1f}", f"{1e3 * row.latency:.1f}", f"{row.edp / own[row.network]:.2f}")
        table.add_row(row.network, row.dataflow, *numbers, *busy)
    console.print(table)


def main(
    chip: str = "edge_trainer",
    batch: Count = 32,
    bits: Annotated[float, Between(1, 32)] = 8.0,
    evaluations: Count = 4000,
    seed: Seed = 0,
    quick: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Run and tabulate.

    Args:
      chip: a preset of `hw.chips`.
      batch: samples of the training step.
      bits: of every operand.
      evaluations: mappings tried for each operation in each round.
      seed: of the search.
      quick: small images and few evaluations, to see it work.
      as_json: print one JSON object on the last line.
    """
    if chip not in CHIPS:
        raise ValueError(f"expected a chip among {', '.join(CHIPS)}, got {chip!r}")
    pixels, evaluations = (32, 400) if quick else (224, evaluations)
    rows = [row for name in NETWORKS for row in run(name, CHIPS[chip](), pixels, batch, bits, evaluations, seed=seed)]
    show(rows, Console(stderr=as_json, width=130))
    if as_json:
        print(json.dumps([row.__dict__ | {"edp": row.edp} for row in rows]))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
