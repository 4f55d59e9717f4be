"""Row pipeline: layers that hand rows to each other keep lines of their inputs instead of whole maps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from hw.operation import Operation
from hw.step import Step

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


def row_pipelined(step: Step) -> Step:
    """An inference whose layers hand rows to each other: what lies between two of them takes a line buffer of one sample.

    Those buffers all live at once, as all layers run at once. If they fit the part of the shared SRAM for resident
    tensors, nothing between layers goes to DRAM. Operations still run one after the other on the one array, row by row,
    so latencies add up as before.

    Args:
      step: an inference, concrete; operations of the forward pass alone.

    Returns:
      The step with shorter tensors.
    """
    elements, birth, death = (np.array(x) for x in (step.tensor_elements, step.tensor_birth, step.tensor_death))
    written = set(np.asarray(step.operand_tensor)[:, 2].tolist()) | set(np.flatnonzero(step.vector_writes.sum(axis=0)))
    for row, inputs in enumerate(np.asarray(step.operand_tensor)[:, 1]):
        if inputs in written and not step.tensor_external[inputs]:
            layer = jax.tree.map(lambda x: x[row], step.operations)  # noqa: B023
            elements[inputs] = min(elements[inputs], float(line_buffer_bits(layer, 1.0)))
            birth[inputs], death[inputs] = 0, step.num_slots - 1
    for row in range(step.vector_slot.shape[0]):
        # A chain works on rows as they come: what it reads from an operation is never whole either.
        read, made = (set(np.flatnonzero(np.asarray(x)[row])) for x in (step.vector_reads, step.vector_writes))
        for tensor in (t for t in read & written if not step.tensor_external[t]):
            elements[tensor] = min([elements[tensor], *(elements[other] for other in made)])
    return replace(
        step,
        tensor_elements=jnp.asarray(elements, step.tensor_elements.dtype),
        tensor_birth=jnp.asarray(birth, jnp.int32),
        tensor_death=jnp.asarray(death, jnp.int32),
    )
