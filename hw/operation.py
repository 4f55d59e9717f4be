"""One loop nest for every convolution and matrix product, in every pass of training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np

LOOPS = ("G", "N", "K", "C", "P", "Q", "R", "S")
OPERANDS = ("weights", "inputs", "outputs")
PASSES = {"forward": "outputs", "input_grad": "inputs", "weight_grad": "weights"}
"""Every pass is the same nest; it differs only in the operand that is accumulated."""

_OPERAND_LOOPS = {"weights": "GKCRS", "inputs": "GNCPQRS", "outputs": "GNKPQ"}
RELEVANT = np.array([[loop in _OPERAND_LOOPS[operand] for loop in LOOPS] for operand in OPERANDS])
"""Which loop moves which operand, shape (3, 8)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operation:
    """The nest G N K C P Q R S over weights (G K C R S), inputs (G N C and a window) and outputs (G N K P Q).

    An input lies at ``p * stride + r * dilation`` along the width (P, R) and likewise along the height (Q, S). G counts
    independent groups: of a grouped or depthwise convolution, or the batch of a batched matrix product.

    Attributes:
      bounds: loop bounds in the order of `LOOPS`, shape (8,).
      stride: step of the window per output, along (P, Q), shape (2,).
      dilation: distance of the taps, along (R, S), shape (2,).
      taps: number of (output, tap) pairs that meet real data and not padding, along width and height, shape (2,).
      accumulated: one-hot over `OPERANDS` of the operand that is summed into, shape (3,).
    """

    bounds: jax.Array
    stride: jax.Array
    dilation: jax.Array
    taps: jax.Array
    accumulated: jax.Array

    @property
    def macs(self) -> jax.Array:
        """Multiply-accumulates of the nest, those on padding included, shape ()."""
        return jnp.prod(self.bounds, axis=-1)

    @property
    def effective_macs(self) -> jax.Array:
        """Multiply-accumulates on real data, shape (): what is left when taps on padding are skipped."""
        return jnp.prod(self.bounds[..., :4], axis=-1) * jnp.prod(self.taps, axis=-1)


def make_operation(
    *,
    G: int = 1,
    N: int = 1,
    K: int = 1,
    C: int = 1,
    P: int = 1,
    Q: int = 1,
    R: int = 1,
    S: int = 1,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    input_size: tuple[int, int] | None = None,
    pass_: str = "forward",
) -> Operation:
    """Checks the numbers of one nest and packs them. Pairs are ordered (width, height): P and R first.

    Args:
      G, N, K, C, P, Q, R, S: loop bounds; K and C are per group.
      stride, dilation: of the window, along width and height.
      padding: (before, after) of the inputs, along width and height.
      input_size: inputs along width and height without padding; by default what window and padding imply.
      pass_: one of `PASSES`.

    Raises:
      ValueError: a bound, stride, dilation or input size is no positive integer, a padding is negative or no integer, or
        the pass is unknown.
    """
    bounds = dict(zip(LOOPS, (G, N, K, C, P, Q, R, S), strict=True))
    for name, value in (bounds | {"stride": stride, "dilation": dilation}).items():
        if not all(_is_integer(v) and v >= 1 for v in np.atleast_1d(np.asarray(value, dtype=object))):
            raise ValueError(f"expected {name} to be a positive integer, got {value!r}; give every size as an int >= 1")
    for name, pair in (("stride", stride), ("dilation", dilation)):
        if np.shape(pair) != (2,):
            raise ValueError(f"expected {name} to be a pair (width, height), got {pair!r}")
    if pass_ not in PASSES:
        raise ValueError(f"expected pass_ to be one of {', '.join(PASSES)}, got {pass_!r}")
    if np.shape(padding) != (2, 2) or not all(_is_integer(v) and v >= 0 for pair in padding for v in pair):
        raise ValueError(f"expected padding ((before, after), (before, after)) of integers >= 0, got {padding!r}")
    if input_size is not None and not (len(input_size) == 2 and all(_is_integer(v) and v >= 1 for v in input_size)):
        raise ValueError(f"expected input_size to be a pair of positive integers (width, height), got {input_size!r}")
    taps = []
    for axis, (outputs, window) in enumerate(((P, R), (Q, S))):
        extent = (outputs - 1) * stride[axis] + (window - 1) * dilation[axis] + 1
        size = extent - sum(padding[axis]) if input_size is None else input_size[axis]
        taps.append(_taps_on_data(outputs, window, stride[axis], dilation[axis], padding[axis][0], size))
    fields = {
        "bounds": list(bounds.values()),
        "stride": stride,
        "dilation": dilation,
        "taps": taps,
        "accumulated": [operand == PASSES[pass_] for operand in OPERANDS],
    }
    dtype = jnp.result_type(float)  # converted before they are placed: on the device that is a program to compile
    return Operation(**jax.device_put({name: np.asarray(value, dtype) for name, value in fields.items()}))


def transposed(operation: Operation, input_size: tuple[int, int] | None = None) -> Operation:
    """The input gradient as a forward convolution over dY: every dX is an output, written once it is complete.

    ``dX[i] = sum dY[p] W[r]`` over ``p * stride + r * dilation = i``. With stride and dilation freed of their common
    divisor, the dX of one residue of i modulo the stride see every stride-th tap, and their dY lie `dilation` apart:
    the nest is a convolution of stride 1 per residue. The residues share dY and have their own dX and taps, as output
    channels have, so they are part of K. In the new nest `weights` are W, `inputs` dY and `outputs` dX.

    Args:
      operation: a concrete nest of any pass; its bounds are read, so it cannot be traced.
      input_size: dX wanted along width and height; by default the whole window, padding included.

    Returns:
      The forward operation; `effective_macs` is that of the original.
    """
    G, N, K, C, P, Q, R, S = (int(b) for b in operation.bounds)
    residues, sizes, taps, dilation = [], [], [], []
    for axis, (outputs, window) in enumerate(((P, R), (Q, S))):
        step, spread = int(operation.stride[axis]), int(operation.dilation[axis])
        common = gcd(step, spread)
        step, spread = step // common, spread // common
        extent = (outputs - 1) * step + (window - 1) * spread + 1
        if input_size is not None:
            extent = min(extent, -(-input_size[axis] // common))
        residues.append(step)
        sizes.append(-(-extent // step))
        taps.append(-(-window // step))
        dilation.append(spread)
    channels = C * residues[0] * residues[1]
    nest = make_operation(
        G=G, N=N, K=channels, C=K, P=sizes[0], Q=sizes[1], R=taps[0], S=taps[1], dilation=(dilation[0], dilation[1])
    )
    return replace(nest, taps=operation.taps / jnp.array(residues, operation.taps.dtype))


def stack_operations[Tree](trees: Sequence[Tree]) -> Tree:
    """Stacks pytrees of equal structure (operations, mappings, costs) along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _taps_on_data(outputs: int, window: int, stride: int, dilation: int, before: int, size: int) -> int:
    """Number of pairs p < outputs, r < window with ``0 <= p * stride + r * dilation - before < size``."""
    if window > outputs:
        outputs, window, stride, dilation = window, outputs, dilation, stride
    start = np.arange(window) * dilation - before
    first = np.maximum(-(start // stride), 0)
    last = np.minimum((size - 1 - start) // stride, outputs - 1)
    return int(np.sum(np.maximum(last - first + 1, 0)))


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
