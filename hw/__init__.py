"""A parametrised chip and what work costs on it; every formula in JAX, for one nest, batched with `jax.vmap`."""

from hw.accesses import TIMELOOP, ZIGZAG, Accesses, Conventions, count
from hw.mapping import Mapping, make_mapping, outermost_mapping
from hw.operation import LOOPS, OPERANDS, PASSES, Operation, make_operation, stack_operations, transposed

# Another distribution may ship an import package of this name and overwrite it silently: `codesign` checks this marker.
__distribution__ = "jax-codesign"

__all__ = [
    "LOOPS",
    "OPERANDS",
    "PASSES",
    "TIMELOOP",
    "ZIGZAG",
    "Accesses",
    "Conventions",
    "Mapping",
    "Operation",
    "count",
    "make_mapping",
    "make_operation",
    "outermost_mapping",
    "stack_operations",
    "transposed",
]
