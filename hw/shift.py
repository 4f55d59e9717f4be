"""Inputs that move between neighbours of an array instead of being read again: what a memory-centric array saves."""

import dataclasses

import jax
import jax.numpy as jnp

from hw.accesses import Accesses
from hw.mapping import Mapping
from hw.operation import LOOPS, OPERANDS, Operation

_INPUTS = OPERANDS.index("inputs")
_P, _R = LOOPS.index("P"), LOOPS.index("R")


def shift_inputs(accesses: Accesses, operation: Operation, mapping: Mapping, level: int) -> Accesses:
    """Accesses where the PEs below a level pass inputs on to their neighbours from tap to tap.

    A row of p PEs that make p neighbouring outputs needs p words for each of r taps, but only s (p - 1) + r of them are
    different (s the stride, taps side by side): the level reads those, and all others come from a neighbour, which costs
    that neighbour one more read of its own memory and no wire beyond it. Only taps that follow each other in time at this
    level count; those that a PE keeps a window for are read from its own memory anyway.

    Args:
      accesses: of `hw.accesses.count`.
      operation: the nest, its inputs being read and not accumulated.
      mapping: where its loops run; P along an axis below the level, R in time at it.
      level: the level that feeds the PEs, 1 or more.

    Returns:
      Accesses, of which only the inputs' reads at the level and at the one below differ.

    Source: CNNP-v2 (AICAS 2019) for the principle; the count is that of distinct words.
    """
    row = mapping.spatial[level, :, _P].prod()
    taps = mapping.temporal[level, _R]
    distinct = jnp.minimum(operation.stride[0] * (row - 1.0) + taps, row * taps)
    share = distinct / (row * taps)
    passed_on = (1.0 - share) * accesses.fills[level - 1, _INPUTS]
    reads: jax.Array = accesses.reads.at[level, _INPUTS].multiply(share).at[level - 1, _INPUTS].add(passed_on)
    return dataclasses.replace(accesses, reads=reads)
