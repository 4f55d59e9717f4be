"""What is minimised and what must hold: EDP through the best mappings, and budgets by an augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.annealing import ILLEGAL
from hw.accesses import Accesses
from hw.chip import Chip
from hw.cost import Cost, price
from hw.schedule import Step, StepCost, join, residency

BUDGETS = ("area", "latency", "energy", "power")  # fields of StepCost, SI units

_TEMPERATURE = 0.05  # of the soft minimum over candidates, in nats of score


@jax.jit
def step_cost(
    chip: Chip,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    accesses: Accesses,
    prices: jax.Array,
    density: jax.Array | None = None,
) -> StepCost:
    """Cost of a step whose operations each run under the best of their candidate mappings.

    The value is that of the best legal candidate. The gradient is that of the soft minimum over all of them (envelope
    theorem: the weights are constants), in which a candidate that does not fit is inflated by its violation, so that the
    chip feels what it would gain by growing into it.

    Args:
      operation_bits, tensor_bits: (n, 3), (m,), widths of operands and tensors.
      accesses: exact counts of the candidates, leading axes (n, K).
      prices: (2,), of a joule and of a second, which rank candidates; see `codesign.mapper.score`.
      density: (n, 2), see `hw.cost.price`; by default nothing is skipped.
    """
    costs, rho = price_candidates(chip, step, operation_bits, tensor_bits, accesses, density)
    return join(chip, step, soft_minimum(costs, prices), rho, tensor_bits)


def price_candidates(
    chip: Chip,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    accesses: Accesses,
    density: jax.Array | None = None,
) -> tuple[Cost, jax.Array]:
    """Cost (n, K) of every candidate of every operation, and the resident share (m,) of every tensor."""
    density = full_density(operation_bits) if density is None else density
    rho = residency(step, tensor_bits, chip.size_bits[-2] * chip.resident_fraction)
    over_candidates = jax.vmap(price, (None, None, 0, None, None, None))
    costs = jax.vmap(over_candidates, (None, 0, 0, 0, 0, 0))(
        chip, step.operations, accesses, operation_bits, density, rho[step.operand_tensor]
    )
    return costs, rho


def full_density(operation_bits: jax.Array) -> jax.Array:
    """Density (n, 2) of a chip that skips nothing; a numpy array, which nothing has to be compiled for."""
    density: Any = np.ones((*operation_bits.shape[:-1], 2), operation_bits.dtype)
    return density


def soft_minimum(costs: Cost, prices: jax.Array) -> Cost:
    """Best legal candidate of each operation, (n, K) -> (n,), with the gradient of the soft minimum over K."""
    scores, best = _rank(costs, prices)
    inflation = 1.0 + jnp.sum(costs.violation, axis=-1)
    weights = jax.nn.softmax(-scores / _TEMPERATURE, axis=-1)
    one_hot = jax.nn.one_hot(best, scores.shape[-1], dtype=scores.dtype)
    weights, one_hot = jax.lax.stop_gradient((weights, one_hot))

    def reduce(field: jax.Array, inflated: bool) -> jax.Array:
        extra = range(2, field.ndim)
        values = field * jnp.expand_dims(inflation, extra) if inflated else field
        soft = jnp.sum(values * jnp.expand_dims(weights, extra), axis=1)
        hard = jnp.sum(values * jnp.expand_dims(one_hot, extra), axis=1)
        return soft + jax.lax.stop_gradient(hard - soft)

    priced = {"energy", "latency", "mac_energy", "access_energy", "control_energy"}
    return Cost(**{name: reduce(value, name in priced) for name, value in vars(costs).items()})


def best_candidate(costs: Cost, prices: jax.Array) -> jax.Array:
    """Index (n,) of the best legal candidate of each operation, (n, K)."""
    return _rank(costs, prices)[1]


def _rank(costs: Cost, prices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores (n, K), inflated where a candidate does not fit, and the best of those that do, (n,)."""
    violation = jnp.sum(costs.violation, axis=-1)
    scores = jnp.log(prices[0] * costs.energy + prices[1] * costs.latency) + jnp.log(1.0 + violation)
    return scores, jnp.argmin(jnp.where(violation > 0, scores + ILLEGAL, scores), axis=-1)


def next_prices(cost: StepCost, powers: Sequence[float] | jax.Array = (1.0, 1.0)) -> jax.Array:
    """Prices (2,) of a joule and a second for log E^p T^q, by default log EDP: p/E, and q/T plus the leakage in a second."""
    leakage_power = cost.leakage_energy / cost.latency
    per_joule, per_second = powers[0] / cost.energy, powers[1] / cost.latency
    return jax.lax.stop_gradient(jnp.stack([per_joule, per_second + powers[0] * leakage_power / cost.energy]))


def excesses(cost: StepCost, budgets: MappingABC[str, float]) -> dict[str, jax.Array]:
    """log(metric / budget) of every budgeted metric; positive where it is exceeded."""
    return {name: jnp.log(getattr(cost, name)) - jnp.log(limit) for name, limit in budgets.items()}


def augmented_lagrangian(excess: jax.Array, multiplier: jax.Array, stiffness: float) -> jax.Array:
    """Penalty of the constraint excess <= 0 at the present multiplier (Powell-Hestenes-Rockafellar form)."""
    active = jax.nn.relu(multiplier + stiffness * excess)
    return (active**2 - multiplier**2) / (2.0 * stiffness)


def next_multiplier(excess: jax.Array, multiplier: jax.Array, rate: float) -> jax.Array:
    """Dual ascent, never below zero."""
    return jax.nn.relu(multiplier + rate * jax.lax.stop_gradient(excess))


def bit_operations(step: Step, operation_bits: jax.Array) -> jax.Array:
    """Bit operations of a step: MACs times the widths of the two operands read, summed over operations."""
    read = 1.0 - step.operations.accumulated
    width_product = jnp.prod(jnp.where(read > 0, operation_bits, 1.0), axis=-1)
    macs = jnp.prod(step.operations.bounds, axis=-1)
    return jnp.sum(macs * width_product * step.multiplicity)
