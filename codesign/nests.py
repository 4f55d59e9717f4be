"""A product of a JAX program as a loop nest: `dot_general` and `conv_general_dilated` in all three passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hw.operation import OPERANDS, PASSES, Operation, make_operation
from nets.jaxpr import Product


@dataclass(frozen=True)
class Nest:
    """Loop nest of a product.

    Attributes:
      sizes: bounds, stride, dilation, padding and input size as `hw.operation.make_operation` takes them.
      operands: which operand of the product is the nest's weights, inputs and outputs. They agree but for a transposed
        convolution, whose result is the nest's inputs: there a forward pass accumulates inputs.
    """

    sizes: dict[str, Any]
    operands: tuple[str, str, str] = OPERANDS

    def operation(self, pass_: str) -> Operation:
        """The nest with the operand accumulated that this pass of the product computes."""
        accumulated = OPERANDS[self.operands.index(PASSES[pass_])]
        return make_operation(**self.sizes, pass_=next(p for p, operand in PASSES.items() if operand == accumulated))


def make_nest(product: Product) -> Nest:
    """The nest of a product.

    Raises:
      ValueError: a convolution over more than two spatial axes, or strided and transposed at once.
    """
    return _dot_nest(product) if product.kind == "dot" else _conv_nest(product)


def _dot_nest(product: Product) -> Nest:
    """Batch axes are groups; of the inputs' free axes the first is the batch N, the others are positions P."""
    contracting, batch = product.params["dimension_numbers"]
    side = product.weights_operand
    shapes = (product.lhs_shape, product.rhs_shape)
    free = [
        [n for axis, n in enumerate(shape) if axis not in (*contracting[i], *batch[i])]
        for i, shape in enumerate(shapes)
    ]
    rows = free[1 - side]
    sizes = {
        "G": math.prod(shapes[0][axis] for axis in batch[0]),
        "N": math.prod(rows[:1]),
        "P": math.prod(rows[1:]),
        "K": math.prod(free[side]),
        "C": math.prod(shapes[0][axis] for axis in contracting[0]),
    }
    return Nest(sizes)


def _conv_nest(product: Product) -> Nest:
    """The kernel, rhs, is the nest's weights. One spatial axis is the width; of two the first is the height."""
    params = product.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    if len(lhs_spec) > 4:
        raise ValueError(
            f"expected a convolution over at most two spatial axes, got {len(lhs_spec) - 2} in {product.name!r}; "
            f"write the third as a sum of convolutions"
        )
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    axes = [
        _axis(product, i, product.lhs_shape[lhs_spec[i + 2]], product.rhs_shape[rhs_spec[i + 2]], product.out_shape[o])
        for i, o in enumerate(out_spec[2:])
    ]
    height, width = [_POINT] * (2 - len(axes)) + axes
    channels, features = product.rhs_shape[rhs_spec[1]], product.rhs_shape[rhs_spec[0]] // (groups * batch_groups)
    is_transposed = any(dilation > 1 for dilation in params["lhs_dilation"])
    sizes = {
        "G": groups * batch_groups,
        "N": product.lhs_shape[lhs_spec[0]] // batch_groups,
        "K": channels if is_transposed else features,
        "C": features if is_transposed else channels,
        **dict(zip("PR", (width.positions, width.window), strict=True)),
        **dict(zip("QS", (height.positions, height.window), strict=True)),
        "stride": (width.stride, height.stride),
        "dilation": (width.dilation, height.dilation),
        "padding": (width.padding, height.padding),
        "input_size": (width.size, height.size),
    }
    lhs, rhs = ("inputs", "weights") if product.weights_operand == 1 else ("weights", "inputs")
    return Nest(sizes, (rhs, "outputs", lhs) if is_transposed else (rhs, lhs, "outputs"))


@dataclass(frozen=True)
class _Axis:
    """One spatial axis of the nest: outputs, taps, and the inputs under them."""

    positions: int
    window: int
    size: int
    stride: int
    dilation: int
    padding: tuple[int, int]


_POINT = _Axis(1, 1, 1, 1, 1, (0, 0))


def _axis(product: Product, i: int, inputs: int, window: int, outputs: int) -> _Axis:
    """The i-th spatial axis; where the inputs are dilated the roles of inputs and outputs are exchanged."""
    params = product.params
    stride, upsampling, dilation = (params[name][i] for name in ("window_strides", "lhs_dilation", "rhs_dilation"))
    padding: Sequence[int] = params["padding"][i]
    if upsampling == 1:
        return _uncropped(outputs, window, inputs, stride, dilation, padding)
    if stride > 1:
        raise ValueError(
            f"expected a convolution with strides or with dilated inputs, got both in {product.name!r}; "
            f"write it as two convolutions"
        )
    # outputs[o] = sum x[p] w[r] over p * upsampling = o + r * dilation - padding: a window sliding over the outputs.
    reach = (window - 1) * dilation
    before = reach - padding[0]
    after = (inputs - 1) * upsampling + reach + 1 - before - outputs
    return _uncropped(inputs, window, outputs, upsampling, dilation, (before, after))


def _uncropped(outputs: int, window: int, inputs: int, stride: int, dilation: int, padding: Sequence[int]) -> _Axis:
    """Negative padding cuts inputs off."""
    before, after = padding
    size = inputs + min(before, 0) + min(after, 0)
    return _Axis(outputs, window, size, stride, dilation, (max(before, 0), max(after, 0)))
