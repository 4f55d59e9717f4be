"""Searches with their chains and chips spread over all devices of all processes.

    python -m experiments.search_sharded                                        # one process
    python -m experiments.search_sharded --processes 2 --process 0 --coordinator localhost:9911 &
    python -m experiments.search_sharded --processes 2 --process 1 --coordinator localhost:9911
    python -m experiments.search_sharded --search chips --workload lenet        # the chip search of `jax-codesign search`

`mappings` are those of a network on the default chip of `experiments.search_benchmark`; `chips` are searched for a training
step of a network, from `edge_trainer` and under its area, by rounds and not by time, so that all processes do the same.
Under Slurm `--slurm` finds coordinator, number and rank itself. Every process ends with the same answer; the first prints
it. docs/scaling.md has the rest.
"""

import json
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from codesign.anytime import Effort
from codesign.chip_report import make_space, make_work
from codesign.chip_search import ChipSearch, Plan
from codesign.config import Count, Seed
from codesign.flat import map_network
from codesign.inspection import model_workload
from codesign.sharding import make_mesh
from experiments import command_line
from experiments.gemmini import DEFAULT, WORKLOADS, Gemmini, read_workload
from hw.chips import CHIPS


def search_mappings(workload: str, evaluations: int, chains: int, seed: int, mesh: Mesh) -> dict[str, Any]:
    """The best mappings of a network of `experiments.search_benchmark` on its default chip."""
    layers = read_workload(WORKLOADS, workload)
    if len(layers.nests) * chains % mesh.size:
        raise ValueError(
            f"expected chains of {len(layers.nests)} layers that divide among {mesh.size} devices, got {chains} of each"
        )
    space, prices = Gemmini().flat(DEFAULT)
    found, _ = map_network(
        jax.random.key(seed),
        layers.nests,
        layers.counts,
        space,
        prices,
        Effort(evaluations),
        num_chains=chains,
        mesh=mesh,
    )
    picks = [int(i) for i in found.picks]
    return {"edp": found.value, "energy_uj": found.energy, "cycles": found.latency, "picks": picks}


def search_chips(model: str, batch_size: int, evaluations: int, rounds: int, seed: int, mesh: Mesh) -> dict[str, Any]:
    """The best chip for a training step of a network, and how it was found."""
    base, workload = CHIPS["edge_trainer"](), model_workload(model, "digits", batch_size)
    work = make_work(workload, "training_step", jnp.full((workload.num_products, 4), 8.0))
    plan = Plan(evaluations=evaluations)
    search = ChipSearch(
        make_space(base, None), work, {"area": float(base.area().total)}, plan=plan, seed=seed, mesh=mesh
    )
    found = search.search(plan.effort(rounds))
    chip = dict(zip(search.names, found.best.values.tolist(), strict=True))
    return {"edp": found.value, "bound": found.bound, "chip": chip, "front": len(found.front), "chips": found.chips}


def main(
    search: Literal["mappings", "chips"] = "mappings",
    workload: str | None = None,
    batch_size: Count = 128,
    evaluations: Count | None = None,
    chains: Count = 8,
    rounds: Count = 12,
    seed: Seed = 0,
    processes: Count = 1,
    process: int = 0,
    coordinator: str = "localhost:9911",
    slurm: bool = False,
) -> None:
    """Search twice, as the first time compiles, and print one JSON object.

    Args:
      search: for mappings, or for chips.
      workload: the network, by default bert (mappings) or lenet (chips).
      batch_size: samples per training step (chips).
      evaluations: mappings tried for each layer, by default 10 000, or 800 for each operation of a chip.
      chains: of each layer (mappings).
      rounds: of the search (chips).
      seed: of the search.
      processes: how many there are; process: which this one is; coordinator: address of the first, with a free port.
      slurm: take these three from Slurm.
    """
    if not 0 <= process < processes:
        raise ValueError(f"expected process in 0 to {processes - 1}, got {process}")
    if slurm:
        jax.distributed.initialize()
    elif processes > 1:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=60)
    mesh, times = make_mesh(), [time.perf_counter()]
    for _ in range(2):
        if search == "mappings":
            answer = search_mappings(workload or "bert", evaluations or 10_000, chains, seed, mesh)
        else:
            answer = search_chips(workload or "lenet", batch_size, evaluations or 800, rounds, seed, mesh)
        times.append(time.perf_counter())
    if jax.process_index() == 0:
        seconds = {"seconds": times[2] - times[1], "first_s": times[1] - times[0]}
        print(json.dumps(answer | {"devices": mesh.size} | seconds))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
