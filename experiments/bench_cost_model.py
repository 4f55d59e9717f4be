"""Speed of the cost model: exact counts and their gradients, against the batch size.

``python -m experiments.bench_cost_model [--json] [--quick]``, two minutes on two cores (``--quick``: half a minute).

One *evaluation* is one operation under one mapping on one chip: the full exact count of a nest on four levels (eight
loops, any order, any keep set, halos, all three passes), priced by the chip's energy per word and bandwidth of each
level and checked against its capacities. A *value-and-gradient* adds the gradient of log energy + log latency with
respect to all tiling factors and all prices of the chip. Every row of a batch has its own operation, mapping and chip.
float32; laid out by `hw.batching.into_blocks`, as a search on a CPU would keep its population, in blocks that stay in the
cache; each core a device of its own; compiled with `CPU_OPTIONS`. On an accelerator a device has one block.

Also timed: the same from and to arrays with the batch as the first axis, transposed on the way; and
`hw.cost.evaluate`, the whole price with voltages, widths and wires, on one chip.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import command_line
from hw import LOOPS, PASSES, Mapping, Operation, count, make_operation, stack_operations
from hw.batching import into_blocks, out_of_blocks
from hw.chip import make_chip
from hw.cost import evaluate

LEVELS = 4
BLOCK = 128
"""Rows whose temporaries fit the cache of a core; measured: 64 is 17 %, 256 is 9 % and 1024 is 100 % slower."""
CPU_OPTIONS = {"xla_cpu_prefer_vector_width": 512, "xla_cpu_enable_fast_min_max": True}
"""XLA's own choice are vectors of 256 bits, and min and max that pass NaN on; all other results are the same to the bit."""
BATCHES = (1, 16, 256, 4096, 16_384, 65_536, 262_144, 1_048_576)
QUICK_BATCHES = (256, 16_384, 65_536)
REFERENCE_BATCH = 65_536


class Prices(NamedTuple):
    """What a chip charges: joules per product, and joules, words per cycle and capacity in words of each level."""

    product: jax.Array
    word: jax.Array
    bandwidth: jax.Array
    capacity: jax.Array


class Designs(NamedTuple):
    """Operations, mappings and chips, of arrays with a leading or, where said so, a trailing batch axis."""

    operation: Operation
    mapping: Mapping
    prices: Prices


def over_rows(function: Callable) -> Callable:
    """Of arrays with a trailing batch axis, from a function of one row."""
    return jax.vmap(function, in_axes=-1, out_axes=-1)


def evaluate_designs(designs: Designs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Energy, cycles and excess of capacity, (B,) each, of designs with a trailing batch axis."""
    accesses, prices = over_rows(count)(designs.operation, designs.mapping), designs.prices
    words = jnp.sum(accesses.reads + accesses.fills + accesses.updates, axis=1)
    energy = accesses.macs * prices.product + jnp.sum(words * accesses.instances * prices.word, axis=0)
    cycles = jnp.maximum(accesses.compute_cycles, jnp.max(words / prices.bandwidth, axis=0))
    excess = jnp.sum(jnp.maximum(jnp.sum(accesses.footprint, axis=1) / prices.capacity - 1.0, 0.0), axis=0)
    return energy, cycles, excess


def values_and_gradients(designs: Designs) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Prices]]:
    """Log energy + log cycles + excess, (B,), and its gradient in temporal and spatial factors and in prices."""

    def objective(temporal: jax.Array, spatial: jax.Array, prices: Prices) -> jax.Array:
        mapping = Mapping(temporal, spatial, designs.mapping.order, designs.mapping.keep)
        energy, cycles, excess = evaluate_designs(Designs(designs.operation, mapping, prices))
        return jnp.log(energy) + jnp.log(cycles) + excess

    # Not a gradient under vmap, whose rules for the backward pass put the batch first and transpose it back.
    values, pull_back = jax.vjp(objective, designs.mapping.temporal, designs.mapping.spatial, designs.prices)
    return values, pull_back(jnp.ones_like(values))


def random_designs(number: int, seed: int = 0) -> Designs:
    """Convolutions in all passes under random factors, orders and keep sets, as numpy arrays."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, Any] = {"N": 4, "K": 64, "C": 32, "P": 16, "Q": 16, "R": 3, "S": 3}
    operations = stack_operations([make_operation(**sizes, pass_=pass_) for pass_ in PASSES])
    picked = rng.integers(0, len(PASSES), number)
    factors = np.ones((number, 3 * LEVELS, len(LOOPS)), np.float32)
    for loop, bound in sizes.items():
        primes = [3] if bound == 3 else [2] * (bound.bit_length() - 1)
        for prime in primes:
            factors[np.arange(number), rng.integers(0, 3 * LEVELS, number), LOOPS.index(loop)] *= prime
    order = rng.permuted(np.tile(np.arange(len(LOOPS), dtype=np.int32), (number, LEVELS, 1)), axis=-1)
    keep = (rng.random((number, LEVELS, 3)) < 0.7).astype(np.float32)
    keep[:, -1] = 1.0
    spatial = factors[:, LEVELS:].reshape(number, LEVELS, 2, len(LOOPS))
    scale = rng.uniform(0.5, 2.0, (number, 3 * LEVELS + 1)).astype(np.float32)
    scale *= np.array([1.0, 0.5, 3.0, 8.0, 100.0, 2.0, 2.0, 64.0, 8.0, 64.0, 512.0, 1e5, 1e9], np.float32)
    return Designs(
        jax.tree.map(lambda leaf: np.asarray(leaf)[picked], operations),
        Mapping(factors[:, :LEVELS], spatial, order, keep),  # type: ignore[arg-type]  # moved to the devices later
        Prices(scale[:, 0], scale[:, 1:5], scale[:, 5:9], scale[:, 9:13]),  # type: ignore[arg-type]
    )


class Timing(NamedTuple):
    compile_s: float
    per_s: float


def measure(function: Callable, designs: Designs, rows: int, in_blocks: bool = True) -> Timing:
    """Compiles a function of designs with a trailing batch axis for a batch over all devices, and times it at its best.

    With `in_blocks`, from blocks to blocks; else from and to arrays with a leading batch axis, in blocks in between.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = BLOCK if on_cpu else -(-rows // jax.device_count())
    batched: Callable = partial(jax.lax.map, function)
    batch = jax.tree.map(lambda leaf: np.resize(leaf, (rows, *leaf.shape[1:])), designs)
    if in_blocks:
        batch = into_blocks(batch, size)
    else:
        batched = _on_first_axis(batched, size)
    length = len(jax.tree.leaves(batch)[0])
    devices = jax.devices()[: max(n for n in range(1, jax.device_count() + 1) if length % n == 0)]
    mesh = Mesh(np.array(devices), ("batch",))
    batched = jax.shard_map(batched, mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec("batch"))
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))
    start = time.perf_counter()
    compiled = jax.jit(batched, compiler_options=CPU_OPTIONS if on_cpu else {}).lower(batch).compile()
    compile_s = time.perf_counter() - start
    jax.block_until_ready(compiled(batch))
    best, spent = float("inf"), 0.0
    while spent < 1.0:
        start = time.perf_counter()
        jax.block_until_ready(compiled(batch))
        best = min(best, time.perf_counter() - start)
        spent += time.perf_counter() - start
    return Timing(compile_s, rows / best)


def _on_first_axis(function: Callable, size: int) -> Callable:
    return lambda batch: out_of_blocks(function(into_blocks(batch, size)))


def bytes_per_second() -> float:
    """Speed at which all cores together add two arrays that do not fit the caches, in bytes read and written."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    size = 2**24 * jax.device_count()
    array = jax.device_put(np.ones(size, np.float32), sharding)
    add = jax.jit(lambda a, b: a + b)
    jax.block_until_ready(add(array, array))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(add(array, array))
        best = min(best, time.perf_counter() - start)
    return 2 * array.nbytes / best  # the two summands are one array, read once


def run(batches: Sequence[int]) -> dict:
    """All figures; see the module's text."""
    designs = random_designs(REFERENCE_BATCH)
    by_batch = {}
    for rows in batches:
        values, gradients = (measure(f, designs, rows) for f in (evaluate_designs, values_and_gradients))
        by_batch[rows] = {
            "evaluations_per_s": values.per_s,
            "value_and_gradients_per_s": gradients.per_s,
            "compile_s": values.compile_s,
            "gradient_compile_s": gradients.compile_s,
        }
    first_axis = [
        measure(f, designs, REFERENCE_BATCH, in_blocks=False) for f in (evaluate_designs, values_and_gradients)
    ]
    whole = measure(over_rows(partial(_evaluate_on, make_chip(), jnp.full(3, 8.0))), designs, REFERENCE_BATCH)
    best = {
        name: max(row[name] for row in by_batch.values()) for name in ("evaluations_per_s", "value_and_gradients_per_s")
    }
    # An evaluation must at least read its operation, mapping and prices once.
    bytes_read = sum(leaf.nbytes for leaf in jax.tree.leaves(designs)) / REFERENCE_BATCH
    return best | {
        "compile_s": by_batch[max(batches)]["compile_s"],
        "gradient_compile_s": by_batch[max(batches)]["gradient_compile_s"],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "roofline_fraction": best["evaluations_per_s"] * bytes_read / bytes_per_second(),
        "first_axis": {
            "evaluations_per_s": first_axis[0].per_s,
            "value_and_gradients_per_s": first_axis[1].per_s,
        },
        "full_price_evaluations_per_s": whole.per_s,
        "bytes_per_evaluation": bytes_read,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "by_batch": by_batch,
    }


def _evaluate_on(chip: Any, bits: jax.Array, design: Designs) -> tuple[jax.Array, jax.Array]:
    cost = evaluate(chip, design.operation, design.mapping, bits)
    return cost.energy, cost.latency


def main(quick: bool = False, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Speed of the cost model: exact counts and their gradients, against the batch size.

    Args:
      quick: three batch sizes only.
      as_json: print one JSON object instead of text.
    """
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    report = run(QUICK_BATCHES if quick else BATCHES)
    if as_json:
        print(json.dumps(report))
        return
    print(f"{'batch':>9} {'evaluations/s':>15} {'value+gradient/s':>17} {'compile s':>10} {'with gradient':>14}")
    for rows, row in report["by_batch"].items():
        print(
            f"{rows:9d} {row['evaluations_per_s']:15,.0f} {row['value_and_gradients_per_s']:17,.0f}"
            f" {row['compile_s']:10.1f} {row['gradient_compile_s']:14.1f}"
        )
    first_axis = report["first_axis"]
    print(
        f"batch as the first axis, {REFERENCE_BATCH} rows: {first_axis['evaluations_per_s']:,.0f} evaluations/s,"
        f" {first_axis['value_and_gradients_per_s']:,.0f} values and gradients/s"
    )
    print(f"whole price (hw.cost.evaluate): {report['full_price_evaluations_per_s']:,.0f} evaluations/s")
    print(
        f"share of memory-bound roofline {report['roofline_fraction']:.2f}, peak RSS {report['peak_rss_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main))
