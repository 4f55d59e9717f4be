"""Control flow in plain code: a `scan` as its steps one after the other, a `cond` as a choice of its branches' results.

Every step of a scan then has products of its own, as each turn of a Python loop has: layers with stacked parameters get
bits, ranges and a mapping each. A `cond` computes all its branches, as it does under `vmap`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

UNROLLED = ("scan", "cond")
MAX_STEPS = 256  # every step is compiled


def unrolled(equation: Any, as_function: Callable[[Any], Callable]) -> Callable:
    """What an equation of a jaxpr computes, without its control flow.

    Args:
      equation: one of a primitive in `UNROLLED`.
      as_function: makes a jaxpr inside it a function of its inputs that returns a list.

    Returns:
      A function of the equation's inputs that returns a list of its outputs.

    Raises:
      ValueError: a scan of more than `MAX_STEPS` steps.
    """
    params = equation.params
    if equation.primitive.name == "cond":
        return _choice([as_function(branch) for branch in params["branches"]])
    if params["length"] > MAX_STEPS:
        raise ValueError(
            f"expected a scan with products of at most {MAX_STEPS} steps, got {params['length']}; each step is "
            f"compiled and has formats of its own: scan over fewer, such as parts of a sequence"
        )
    body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    # How many inputs and results are stacked along the steps: their names differ between versions of JAX, ranks do not.
    num_stacked = _num_stacked(equation.invars, body.invars)
    num_carry = len(body.outvars) - _num_stacked(equation.outvars, body.outvars)
    run = as_function(params["jaxpr"])
    return _steps(run, params["length"], params["reverse"], len(body.invars) - num_stacked - num_carry, num_carry)


def _choice(branches: Sequence[Callable]) -> Callable:
    def run(index: jax.Array, *operands: Any) -> list[Any]:
        results = [branch(*operands) for branch in branches]
        which = jnp.clip(index, 0, len(branches) - 1)
        # Selecting between two takes a bool.
        which = which.astype(bool) if len(branches) == 2 else which
        return [lax.select_n(which, *cases) for cases in zip(*results, strict=True)]

    return run


def _num_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Values with one axis more outside of a scan's body than inside."""
    return sum(x.aval.ndim > y.aval.ndim for x, y in zip(outside, inside, strict=True))


def _steps(body: Callable, length: int, reverse: bool, num_consts: int, num_carry: int) -> Callable:
    def run(*inputs: Any) -> list[Any]:
        consts, carry, stacked = inputs[:num_consts], inputs[num_consts:][:num_carry], inputs[num_consts + num_carry :]
        rows: list[Sequence[Any]] = []
        for i in reversed(range(length)) if reverse else range(length):
            out = body(*consts, *carry, *(lax.index_in_dim(x, i, keepdims=False) for x in stacked))
            carry = out[:num_carry]
            rows.append(out[num_carry:])
        if reverse:
            rows.reverse()
        return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]

    return run
