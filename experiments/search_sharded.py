"""Local search of a network's mappings with its chains spread over all devices of all processes.

    python -m experiments.search_sharded                                        # one process
    python -m experiments.search_sharded --processes 2 --process 0 --coordinator localhost:9911 &
    python -m experiments.search_sharded --processes 2 --process 1 --coordinator localhost:9911

Under Slurm `--slurm` finds coordinator, number and rank itself. Every process ends with the same answer; the first prints
it. docs/scaling.md has the rest.
"""

import json
import sys
import time
from typing import Literal

import jax

from codesign.anytime import Effort
from codesign.config import Count, Seed
from codesign.flat import map_network
from codesign.sharding import make_mesh
from experiments import command_line
from experiments.gemmini import DEFAULT, WORKLOADS, Gemmini, read_workload


def main(
    workload: Literal["resnet50", "bert", "unet", "retinanet"] = "bert",
    evaluations: Count = 10_000,
    chains: Count = 8,
    seed: Seed = 0,
    processes: Count = 1,
    process: int = 0,
    coordinator: str = "localhost:9911",
    slurm: bool = False,
) -> None:
    """Search and print one JSON object.

    Args:
      workload: the network, on the default chip of `experiments.search_benchmark`.
      evaluations: mappings tried for each layer.
      chains: of each layer.
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
    layers, mesh = read_workload(WORKLOADS, workload), make_mesh()
    if len(layers.nests) * chains % mesh.size:
        raise ValueError(
            f"expected chains of {len(layers.nests)} layers that divide among {mesh.size} devices, got {chains} of each"
        )
    space, prices = Gemmini().flat(DEFAULT)
    begun, times = time.perf_counter(), []
    for _ in range(2):  # the first compiles
        found, _ = map_network(
            jax.random.key(seed), layers.nests, layers.counts, space, prices, Effort(evaluations), num_chains=chains,
            mesh=mesh,
        )  # fmt: skip
        times.append(time.perf_counter() - begun)
    if jax.process_index() == 0:
        picks = [int(i) for i in found.picks]
        answer = {"edp": found.value, "energy_uj": found.energy, "cycles": found.latency, "picks": picks}
        print(json.dumps(answer | {"devices": mesh.size, "seconds": times[1] - times[0], "first_s": times[0]}))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
