"""Row pipeline: layers that hand rows to each other keep lines of their inputs instead of whole maps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from hw.operation import Operation
from hw.step import Step

_K, _C, _P, _Q, _R, _S = 2, 3, 4, 5, 6, 7


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


def row_pipelined(step: Step) -> Step:
    """An inference whose layers hand rows to each other: what lies between two of them takes line buffers of one sample.

    All those buffers live at once, as all layers run at once: each of these tensors counts for all of them, so that
    they go without DRAM only if they fit together in the part of the shared SRAM for resident tensors. Their lives
    stay their own: residency places short lives first, and lines come before whole maps. What a layer makes
    is worked on row by row as it comes. Operations still run one after the other on the one array, so latencies add up
    as before.

    Args:
      step: an inference, concrete; operations of the forward pass alone.

    Returns:
      The step with shorter tensors.

    Source: as `line_buffer_bits`.
    """
    elements, operands = np.array(step.tensor_elements), np.asarray(step.operand_tensor)
    external = np.asarray(step.tensor_external) > 0
    written = set(operands[:, 2].tolist()) | set(np.flatnonzero(np.asarray(step.vector_writes).sum(axis=0)).tolist())
    lines = {
        int(inputs): float(line_buffer_bits(jax.tree.map(lambda x: x[row], step.operations), 1.0))  # noqa: B023
        for row, inputs in enumerate(operands[:, 1])
        if int(inputs) in written and not external[inputs]
    }
    one_row = np.asarray(step.operations.bounds)[:, [_K, _P]].prod(axis=1)
    for row, outputs in enumerate(operands[:, 2]):
        if not external[outputs]:
            elements[outputs] = min(elements[outputs], one_row[row])
    for inputs in lines:
        elements[inputs] = sum(lines.values())
    return replace(step, tensor_elements=jnp.asarray(elements, step.tensor_elements.dtype))
