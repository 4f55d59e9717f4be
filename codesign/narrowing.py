"""The last bits of a try: formats narrowed one by one while what the try was paying for falls.

In the loop, widths are steered by slopes. What they cost is a staircase (whole slices, whole words), and what they do to the
network is noisy from batch to batch. Once training has settled, both can be looked up instead: every narrower width of
every operand, on the same training examples, under the loop's own objective. A width that training left one bit above a
slice boundary goes below it, if the network does not mind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from codesign.cooptimize import Phase, State, Task, penalised
from nets.data import Examples
from nets.precision import Precision, freeze, narrowed
from nets.training import evaluate

_FURTHEST = 4  # bits by which a width is narrowed in one move
_SWEEPS = 3
_EXAMPLES = 1024


def narrow(task: Task, phase: Phase, state: State, examples: Examples) -> tuple[State, int]:
    """Coordinate descent over the widths of all products, on the objective that a phase trained with.

    Widths of weights and inputs trade the loss on training examples for the penalty; those of errors, which the loss does not
    depend on, fall as far as the noise budget lets them. Weights stay as they are.

    Args:
      task: the run's.
      phase: one that moved bits; its penalty and weight are the objective's.
      state: where it ended.
      examples: the training split, of which the first 1024 are looked at.

    Returns:
      The state with frozen formats, and the number of formats that were tried.
    """
    seen = Examples(examples.images[:_EXAMPLES], examples.labels[:_EXAMPLES])
    permitted = max(0.0, float(state.noise.excess(state.precision.bits()[:, 2:], task.noise_budget)))

    def task_loss(precision: Precision) -> float:
        groups = (state.params, precision, state.quant_state)
        return float(evaluate(task.quantised_evaluation, groups, state.rest, seen).loss)

    def objective(precision: Precision, loss: float) -> float:
        bits = precision.bits()
        if float(state.noise.excess(bits[:, 2:], task.noise_budget)) > permitted:
            return math.inf
        return loss + phase.weight * math.log(penalised(task, phase, state, bits))

    best = freeze(state.precision)
    loss, tried = task_loss(best), 1
    value = objective(best, loss)
    for _ in range(_SWEEPS):
        before = value
        for row, column in _trained_widths(state.precision):
            moves = list(_narrower(best, row, column, task.min_bits))
            # Widths of errors, the last two columns, leave the loss as it is.
            losses = [task_loss(moved) if column < 2 else loss for moved in moves]
            values = [objective(*move) for move in zip(moves, losses, strict=True)]
            tried += len(moves)
            if values and min(values) < value:
                chosen = values.index(min(values))
                best, loss, value = moves[chosen], losses[chosen], values[chosen]
        if value == before:
            break
    return dataclasses.replace(state, precision=best), tried


def _trained_widths(precision: Precision) -> Iterator[tuple[int, int]]:
    """Row and column in `Precision.bits` of every width that training moved."""
    for row in range(len(precision.names)):
        weights, inputs = precision.trains(row)
        for column, trains in enumerate((weights, inputs, weights, weights)):
            if trains:
                yield row, column


def _narrower(precision: Precision, row: int, column: int, min_bits: int) -> Iterator[Precision]:
    """The formats with one operand up to four bits narrower: all bits off the bottom, or one of them off the top."""
    bits = precision.bits()
    present = int(bits[row, column])
    for width in range(max(min_bits, present - _FURTHEST), present):
        for off_the_top in (0.0, 1.0) if column < 2 else (0.0,):
            top = jnp.zeros_like(bits[:, :2]).at[row, min(column, 1)].set(off_the_top)
            yield narrowed(precision, bits.at[row, column].set(float(width)), top)
