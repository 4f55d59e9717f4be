"""Cost of a step on a given chip with its mappings searched: what a user asks first, and what every method is judged by."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from codesign import mapper
from codesign.objective import full_density, next_prices, step_cost
from hw.chip import Chip
from hw.operation import stack_operations
from hw.schedule import Step, StepCost, residency

NUM_CHAINS = 16


class Evaluated(NamedTuple):
    """A chip with the mappings found for it.

    Attributes:
      chip: the chip.
      candidates: mappings of every operation, (n, K), best first.
      prices: of a joule and a second at this cost, (2,).
      cost: of the step under the best of them.
      evaluations: (operation, mapping, chip) triples costed.
    """

    chip: Chip
    candidates: mapper.Candidates
    prices: jax.Array
    cost: StepCost
    evaluations: int


def search_mappings(
    chips: Chip,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    prices: jax.Array,
    key: jax.Array,
    *,
    slots: mapper.Slots,
    tables: mapper.Tables,
    start: mapper.Candidates | None,
    evaluations: int,
    num_best: int,
) -> mapper.Candidates:
    """Candidates (chips, n, num_best) of every operation of a step on stacked chips, `evaluations` mappings tried each.

    What stays resident is taken from the first chip: it moves little between neighbours, and only ranks candidates.
    """
    first = jax.tree.map(lambda x: x[0], chips)
    rho = residency(step, tensor_bits, first.size_bits[-2] * first.resident_fraction)
    return mapper.search(
        key, step.operations, chips, operation_bits, prices, slots=slots, tables=tables,
        density=full_density(operation_bits), resident=rho[step.operand_tensor],
        start=None if start is None else start.mapping, num_chains=NUM_CHAINS,
        iterations=max(1, evaluations // NUM_CHAINS), num_best=num_best,
    )  # fmt: skip


def evaluate_chips(
    chips: list[Chip],
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    key: jax.Array,
    *,
    slots: mapper.Slots | None = None,
    tables: mapper.Tables | None = None,
    start: mapper.Candidates | None = None,
    prices: jax.Array | None = None,
    evaluations: int = 2000,
    rounds: int = 2,
    num_best: int = 4,
) -> list[Evaluated]:
    """Search the mappings of a step on each of several chips of one kind and cost it, least EDP in mind.

    Each round searches at the prices of a joule and a second that the round before ended with; without `prices` a first
    round weighs a second by a guess of the chip's power.
    """
    slots = mapper.make_slots(chips[0]) if slots is None else slots
    tables = mapper.make_tables(step.operations) if tables is None else tables
    rounds += prices is None
    prices = initial_prices(chips[0], operation_bits.dtype) if prices is None else prices
    stacked, found, tried = stack_operations(chips), start, 0
    for i in range(rounds):
        per_chip = search_mappings(
            stacked, step, operation_bits, tensor_bits, prices, jax.random.fold_in(key, i),
            slots=slots, tables=tables, start=found, evaluations=evaluations, num_best=num_best,
        )  # fmt: skip
        costs = _costs(stacked, step, per_chip, operation_bits, tensor_bits, prices)
        found = jax.tree.map(lambda x: x[0], per_chip)
        prices = next_prices(jax.tree.map(lambda x: x[0], costs))
        tried += evaluations * operation_bits.shape[0]
    at = [(jax.tree.map(lambda x: x[i], per_chip), jax.tree.map(lambda x: x[i], costs)) for i in range(len(chips))]
    return [
        Evaluated(chip, candidates, next_prices(cost), cost, tried)
        for chip, (candidates, cost) in zip(chips, at, strict=True)
    ]


def evaluate_chip(
    chip: Chip, step: Step, operation_bits: jax.Array, tensor_bits: jax.Array, key: jax.Array, names: tuple[str, ...], **options
) -> Evaluated:
    """`evaluate_chips` of one chip.

    Raises:
      ValueError: no legal mapping of an operation was found; names the operation and what does not fit.
    """
    found = evaluate_chips([chip], step, operation_bits, tensor_bits, key, **options)[0]
    mapper.check_legal(found.cost.violation, chip, names)
    return found


def initial_prices(chip: Chip, dtype) -> jax.Array:
    """Prices (2,) before any mapping is known: a second costs what a picojoule per MAC and cycle adds up to."""
    return jnp.asarray([1.0, chip.num_macs() * chip.frequency() * 1e-12], dtype)


@jax.jit
def _costs(chips: Chip, step: Step, candidates: mapper.Candidates, operation_bits, tensor_bits, prices) -> StepCost:
    over_chips = jax.vmap(step_cost, (0, None, None, None, 0, None))
    return over_chips(chips, step, operation_bits, tensor_bits, candidates.accesses, prices)
