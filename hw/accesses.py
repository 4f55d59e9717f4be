"""Words moved between memory levels: what executing the loop nest would count, as a closed form.

The conventions, each with a worked example, are in docs/conventions.md. All formulas hold for one nest under one
mapping; batch them with `jax.vmap`. Factors may be real-valued: a loop is then present by a smooth gate between a
factor of 1 and of 2.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hw.adjoint import present_slope, pull_back
from hw.batching import batch_last
from hw.mapping import Mapping
from hw.operation import OPERANDS, Operation
from hw.traffic import ALL, IDLE, TIMELOOP, ZIGZAG, Conventions, Traffic, Words, count_traffic, over, present

__all__ = ["TIMELOOP", "ZIGZAG", "Accesses", "Conventions", "count"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accesses:
    """Words per instance over the whole nest; the total is times `instances`. Operands in the order of `OPERANDS`.

    Attributes:
      reads: words read for the level below (or the MACs), and to add to partial sums, shape (L, 3).
      fills: words written from the level above, shape (L, 3).
      updates: words of the accumulated operand written from below, shape (L, 3).
      entering: words of all tiles that pass through; an accumulated operand drains as many, shape (L, 3).
      finals: those of `updates` that are complete sums, and so have the width of the stored operand, shape (L, 3).
      footprint: words of the largest tile, zero where the operand is not kept, shape (L, 3).
      keep: 1 where the operand is kept, shape (L, 3).
      fanout: instances fed below each level on the axes (X, Y), shape (L, 2).
      instances: utilised instances of each level, shape (L,).
      compute_cycles: iterations in time, the product slots of one MAC, shape ().
      macs: products of the nest over all MACs, shape (); never more than the nest has.
    """

    reads: jax.Array
    fills: jax.Array
    updates: jax.Array
    entering: jax.Array
    finals: jax.Array
    footprint: jax.Array
    keep: jax.Array
    fanout: jax.Array
    instances: jax.Array
    compute_cycles: jax.Array
    macs: jax.Array


def count(operation: Operation, mapping: Mapping, conventions: Conventions = TIMELOOP) -> Accesses:
    """Counts what every level reads and writes while a nest runs under a mapping.

    Args:
      operation: the nest.
      mapping: its tiling, order and kept operands.
      conventions: what a tile of inputs holds and keeps; static.

    Returns:
      Counts in words, exact for integer factors (docs/conventions.md, 11, says how far where they do not divide) and
      continuous in real-valued ones. They have gradients, in reverse mode, with respect to `mapping.temporal` and
      `mapping.spatial` and to nothing else; under `ZIGZAG` none.

    Source: the conventions are those of Timeloop (Parashar et al., ISPASS 2019), rederived and checked point by point.
    """
    if conventions == TIMELOOP:
        return _count(operation, mapping)
    return batch_last(partial(count_batch, conventions=conventions))(operation, mapping)


def count_batch(operations: Operation, mappings: Mapping, conventions: Conventions = TIMELOOP) -> Accesses:
    """Counts of a batch along the last axis of every array: `count` without gradients, for searches that keep this layout.

    Args:
      operations, mappings: of arrays with a trailing batch axis.
      conventions: as for `count`.

    Returns:
      Counts with a trailing batch axis.
    """
    return _accesses(operations, mappings, count_traffic(operations, mappings, conventions))


def no_accesses(num: int, num_levels: int, dtype: Any) -> Accesses:
    """Counts of nothing, in numpy, of the shapes of those of `num` operations: to compile with before there are any.

    Args:
      num: length of the leading axis.
      num_levels: memory levels.
      dtype: of the counts.
    """
    shapes: dict[str, tuple[int, ...]] = {"fanout": (num_levels, 2), "instances": (num_levels,)}
    shapes |= {"compute_cycles": (), "macs": ()}
    by_operand = (num_levels, len(OPERANDS))
    fields = dataclasses.fields(Accesses)
    nothing: Any = {f.name: np.zeros((num, *shapes.get(f.name, by_operand)), dtype) for f in fields}
    return Accesses(**nothing)


@jax.custom_vjp
def _count(operation: Operation, mapping: Mapping) -> Accesses:
    return _forward(operation, mapping)[0]


@batch_last
def _forward(operation: Operation, mapping: Mapping) -> tuple[Accesses, Traffic]:
    traffic = count_traffic(operation, mapping, TIMELOOP)
    return _accesses(operation, mapping, traffic), traffic


def _count_forward(operation: Operation, mapping: Mapping) -> tuple[Accesses, tuple[Operation, Mapping, Traffic]]:
    accesses, traffic = _forward(operation, mapping)
    return accesses, (operation, mapping, traffic)


def _count_backward(residuals: tuple[Operation, Mapping, Traffic], given: Accesses) -> tuple[None, Mapping]:
    operation, mapping, traffic = residuals
    temporal, spatial = _backward(operation.accumulated, mapping.spatial, traffic, given)
    return None, Mapping(temporal, spatial, None, None)  # type: ignore[arg-type]  # None: no cotangent


_count.defvjp(_count_forward, _count_backward)


def _accesses(operation: Operation, mapping: Mapping, traffic: Traffic) -> Accesses:
    """Accesses from words; arrays have a trailing batch axis."""
    nest = traffic.nest
    columns = []
    for operand, words in enumerate(traffic.words):
        accumulated, blind = operation.accumulated[operand][None], jnp.minimum(words.blind, words.asked)
        counts = (
            words.asked - accumulated * blind,
            _below_top(words.entering - accumulated * words.first),
            accumulated * words.asked,
            words.entering,
            accumulated * blind * (1.0 - present(over(nest.fan_out_above, IDLE[operand]))),
            words.tile,
        )
        columns.append([nest.keep[:, operand] * number for number in counts])
    reads, fills, updates, entering, finals, footprint = (
        jnp.stack(kind, axis=1) for kind in zip(*columns, strict=True)
    )
    return Accesses(
        reads=reads,
        fills=fills,
        updates=updates,
        entering=entering,
        finals=finals,
        footprint=footprint,
        keep=mapping.keep,
        fanout=over(mapping.spatial, ALL),
        instances=over(nest.fan_out_above, ALL),
        compute_cycles=over(nest.temporal[0] * nest.temporal_above[0], ALL),
        macs=over(nest.bounds, ALL),
    )


@batch_last
def _backward(
    accumulated: jax.Array, spatial: jax.Array, traffic: Traffic, given: Accesses
) -> tuple[jax.Array, jax.Array]:
    """Pulls cotangents of accesses back to the factors; arrays have a trailing batch axis."""
    nest = traffic.nest
    of_words, of_copies = [], []
    for operand in range(len(OPERANDS)):
        keep, summed = nest.keep[:, operand], nest.keep[:, operand] * accumulated[operand][None]
        copies, asked = over(nest.fan_out_above, IDLE[operand]), traffic.words[operand].asked
        blind = jnp.minimum(traffic.words[operand].blind, asked)
        reads, updates, finals = given.reads[:, operand], given.updates[:, operand], given.finals[:, operand]
        fills = _below_top(given.fills[:, operand])
        of_blind = summed * (finals * (1.0 - present(copies)) - reads)
        is_asked = traffic.words[operand].blind > asked  # more first touches than updates: both are the updates
        of_words.append(
            Words(
                tile=keep * given.footprint[:, operand],
                entering=keep * (fills + given.entering[:, operand]),
                first=-summed * fills,
                blind=jnp.where(is_asked, 0.0, of_blind),
                asked=keep * reads + summed * updates + jnp.where(is_asked, of_blind, 0.0),
            )
        )
        of_copies.append(-summed * finals * blind * present_slope(copies))
    of_words, of_copies = jax.lax.optimization_barrier((tuple(of_words), tuple(of_copies)))
    return pull_back(traffic, spatial, of_words, of_copies, given.fanout, given.instances, given.compute_cycles)


def _below_top(words: jax.Array) -> jax.Array:
    """Zero at the outermost level, which nothing fills: (L, B) -> (L, B)."""
    return jnp.concatenate([words[:-1], jnp.zeros_like(words[-1:])])
