"""What lies between the products of a program: chains of element-wise work, and what their backward passes need.

A *chain* is all work of the vector unit that leads to one operand of a product or to the results. It is fused: it
reads values that products, arguments or earlier chains have made and writes what others need of it. A reduction
(mean, variance, softmax) is a barrier: what is read before and again after it is read twice. Reshapes, transpositions
and casts are *views*: they move nothing, and a view is the value that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp

from nets.jaxpr import Equation, Program, Value

_VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "name", "optimization_barrier", "reduce_precision",
    "reshape", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_SELECTIONS = {"dynamic_slice", "gather", "slice"}  # read no more than they give
_MOVES = {"broadcast_in_dim", "concatenate", "iota", "pad", "rev", "split", *_SELECTIONS}
_BARRIERS = {"argmax", "argmin", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}
# Backward passes that need nothing of the forward pass.
_LINEAR = {
    "add", "add_any", "cumsum", "neg", "reduce_sum", "reduce_window_sum", "sub", "transpose", *_MOVES, *_VIEWS,
}  # fmt: skip
# Backward passes that need one bit per element, which side of a comparison won; or which element of a window did.
_MASKED = {"abs", "clamp", "max", "min", "select_n", "sign"}
_WINDOWED = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
_COEFFICIENTS = {"mul": slice(0, 2), "div": slice(1, 2)}  # linear unless these operands are needed and not at hand


@dataclass(eq=False)
class Chain:
    """Element-wise work between products.

    Attributes:
      name: what it makes: "conv2/inputs", "conv2/weights" or "results".
      reads: elements read of each value that others have made.
      writes: values that others need.
      num_ops: element operations: for each equation, the elements of its largest array.
      num_sweeps: passes over its inputs, one more for each barrier in a row.
      mask_bits: bits its backward pass needs where all else is linear: one per ReLU output, log2 of the window per
        maximum. The mask of a ReLU before a pooling is kept at the pooled size, as all other errors are zero.
      recomputes: whether something in it is not linear: then its inputs are kept and its backward pass recomputes it.
    """

    name: str
    reads: dict[Value, int] = field(default_factory=dict)
    writes: list[Value] = field(default_factory=list)
    num_ops: int = 0
    num_sweeps: int = 1
    mask_bits: int = 0
    recomputes: bool = False


@dataclass(frozen=True)
class Dataflow:
    """A program as products and chains in order of execution.

    Attributes:
      nodes: a `Chain`, or the index of a product.
      operands: (weights, inputs) of each product.
      results: of each product.
      outputs: results of the program that are no integers.
      varying: values, views among them, that depend on what is trained.
      origins: what each view shows.
    """

    nodes: tuple[Chain | int, ...]
    operands: tuple[tuple[Value, Value], ...]
    results: tuple[Value, ...]
    outputs: tuple[Value, ...]
    varying: Collection[Value]
    origins: Mapping[Value, Value]
