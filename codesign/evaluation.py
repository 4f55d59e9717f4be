"""Cost of a step on a given chip with its mappings searched: what a user asks first, and what every method is judged by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from codesign import mapper
from codesign.anytime import Effort, Progress, keep_searching
from codesign.objective import full_density, next_prices
from codesign.uncertainty import QUICKLY_COMPILED, sample_step
from hw.chip import Chip
from hw.schedule import Step, StepCost, residency

NUM_CHAINS = 16
_SCRATCH, _WARM = 0.3, 0.1  # temperatures that a search starts with, in nats of its score


class Evaluated(NamedTuple):
    """A chip with the mappings found for it.

    Attributes:
      chip: the chip.
      candidates: mappings of every operation, (n, K), best first.
      prices: of a joule and a second at this cost, (2,).
      cost: of the step under the best of them; numpy arrays.
      drawn: the same under sampled technologies, see `codesign.uncertainty.sample_step`.
      density: share of the products' work that is left, (n, 2), see `hw.cost.price`.
      evaluations: (operation, mapping, chip) triples costed.
    """

    chip: Chip
    candidates: mapper.Candidates
    prices: jax.Array
    cost: StepCost
    drawn: StepCost
    density: jax.Array
    evaluations: int


def begin_search(
    chip: Chip,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    prices: jax.Array,
    key: jax.Array,
    *,
    density: jax.Array | None = None,
    slots: mapper.Slots,
    tables: mapper.Tables,
    start: mapper.Candidates | None,
    evaluations: int,
    num_best: int,
    freedom: mapper.Freedom | None = None,
    mesh: Mesh | None = None,
) -> Callable[[], mapper.Candidates]:
    """Begins to search candidates (n, num_best) of every operation of a step on a chip, `evaluations` mappings tried for each.

    What is returned waits for them, see `codesign.mapper.begin_search`.

    From scratch the search anneals widely; from a `start` it stays near, for which a few evaluations suffice. Its chains
    are spread over the devices of a `mesh`.
    """
    density = full_density(operation_bits) if density is None else density
    # A search scores its start and, in the end, its best: one more than it has iterations.
    return mapper.begin_search(
        key, step.operations, chip, operation_bits, prices, slots=slots, tables=tables,
        density=density, resident=_resident(chip, step, tensor_bits),
        start=None if start is None else start.mapping, num_chains=NUM_CHAINS,
        iterations=max(1, evaluations // NUM_CHAINS - 1), temperature=_SCRATCH if start is None else _WARM, num_best=num_best,
        freedom=freedom, mesh=mesh,
    )  # fmt: skip


def evaluate(
    chip: Chip,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    key: jax.Array,
    *,
    density: jax.Array | None = None,
    slots: mapper.Slots | None = None,
    tables: mapper.Tables | None = None,
    start: mapper.Candidates | None = None,
    prices: jax.Array | None = None,
    evaluations: int = 2000,
    rounds: int = 2,
    num_best: int = 4,
    freedom: mapper.Freedom | None = None,
    seconds: float = math.inf,
    on_progress: Callable[[Progress], None] | None = None,
) -> Evaluated:
    """Search the mappings of a step on a chip and cost it, least EDP in mind.

    Each round searches at the prices of a joule and a second that the round before ended with; without `prices` a first
    round weighs a second by a guess of the chip's power. `evaluations` are per operation and round; `density` (n, 2) is that
    of `hw.cost.price`, by default of a chip that skips nothing. What the chip's wiring leaves open is in `freedom`. No round
    begins after `seconds`; Ctrl-C returns what the last round ended with.
    """
    density = full_density(operation_bits) if density is None else density
    slots = mapper.make_slots(chip) if slots is None else slots
    tables = mapper.make_tables(step.operations) if tables is None else tables
    rounds += prices is None
    first = start, initial_prices(chip, operation_bits.dtype) if prices is None else prices

    def search(i: int, before: Evaluated | None) -> Evaluated:
        start, prices = first if before is None else (before.candidates, before.prices)
        found = begin_search(
            chip, step, operation_bits, tensor_bits, prices, jax.random.fold_in(key, i),
            density=density, slots=slots, tables=tables, start=start, evaluations=evaluations, num_best=num_best,
            freedom=freedom,
        )()  # fmt: skip
        best = jax.tree.map(lambda x: x[:, 0], jax.device_get(found.accesses))
        cost, drawn = sample_step(chip, step, best, operation_bits, tensor_bits, density)
        tried = (i + 1) * evaluations * operation_bits.shape[0]
        return Evaluated(chip, found, next_prices(cost), cost, drawn, density, tried)

    effort = Effort(rounds * evaluations, seconds)
    return keep_searching(search, evaluations, effort, lambda best: float(best.cost.edp), on_progress)


def evaluate_chip(
    chip: Chip,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    key: jax.Array,
    names: tuple[str, ...],
    **options,
) -> Evaluated:
    """`evaluate`, of a chip that must be able to run the step.

    Raises:
      ValueError: no legal mapping of an operation was found; names the operation and what does not fit.
    """
    found = evaluate(chip, step, operation_bits, tensor_bits, key, **options)
    mapper.check_legal(found.cost.violation, chip, names)
    return found


@functools.partial(jax.jit, static_argnames="dtype")
def initial_prices(chip: Chip, dtype) -> jax.Array:
    """Prices (2,) before any mapping is known: a second costs what a picojoule per MAC and cycle adds up to."""
    return jnp.stack([1.0, chip.num_macs() * chip.frequency() * 1e-12]).astype(dtype)


@functools.partial(jax.jit, compiler_options=QUICKLY_COMPILED)
def _resident(chip: Chip, step: Step, tensor_bits: jax.Array) -> jax.Array:
    """Resident share of the operands, (n, 3)."""
    return residency(step, tensor_bits, chip.size_bits[-2] * chip.resident_fraction)[step.operand_tensor]
