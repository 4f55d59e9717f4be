"""Row pipeline: layers that hand rows to each other keep lines of their inputs instead of whole maps."""

import jax
import jax.numpy as jnp

from hw.operation import Operation

_N, _C, _P, _Q, _R, _S = 1, 3, 4, 5, 6, 7


def map_bits(operation: Operation, bits: jax.Array | float) -> jax.Array:
    """Bits of all inputs of one sample of a layer, the window's whole reach, shape ().

    Args:
      operation: its forward nest.
      bits: width of an input.

    Source: the count of words of a tile, docs/conventions.md.
    """
    height, width = _reach(operation)
    return operation.bounds[_C] * height * width * bits


def line_buffer_bits(operation: Operation, bits: jax.Array | float, *, double: bool = False) -> jax.Array:
    """Bits of a line buffer that feeds a layer row by row without conflicts between banks, shape ().

    Rows r lie in bank r mod n. While a window of S rows is read, the rows of the next step, `stride` of them, are
    written: n = S + stride banks of a row each serve both at once.

    Args:
      operation: the layer's forward nest.
      bits: width of an input.
      double: two buffers in turn instead: 2 (S - 1 + stride) rows.

    Source: reconstructed from the abstract of the row-pipelined accelerator (Lu et al., ISCAS 2024).
    """
    _, width = _reach(operation)
    rows = operation.bounds[_S] + operation.stride[1]
    rows = 2.0 * (rows - 1.0) if double else rows
    return operation.bounds[_C] * rows * width * bits


def _reach(operation: Operation) -> tuple[jax.Array, jax.Array]:
    """Rows and columns that the window reaches over all outputs."""
    outputs, taps = operation.bounds[jnp.array([_Q, _P])], operation.bounds[jnp.array([_S, _R])]
    reach = (outputs - 1.0) * operation.stride[::-1] + (taps - 1.0) * operation.dilation[::-1] + 1.0
    return reach[0], reach[1]
