"""The quantised network as an ONNX graph, with QuantizeLinear and DequantizeLinear before every product.

The forward jaxpr, as `nets.jaxpr` walks it, is written node by node. What depends on no data (weights, batch statistics) is
computed here. An operand in fixed point is clipped to its range, quantised to the smallest integer type that holds it and
dequantised; weights are stored as those integers. Steps are powers of two, so products, their sums below 2**24 steps and
everything exact in float32 is the same in any runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.onnx_primitives import CONVERTERS, Graph, Operand
from codesign.optional import require
from codesign.rundir import write_atomic
from nets import fixed_point
from nets.fixed_point import FLOAT_BITS
from nets.jaxpr import Equation, Product, Program, Value, flatten
from nets.precision import Precision

OPSET, IR_VERSION = 21, 10  # the first with 16 bit integers in QuantizeLinear
_TYPES = ((8, np.int8, np.uint8), (16, np.int16, np.uint16))


def export_onnx(fn: Callable, params: Any, precision: Precision, images: jax.Array | jax.ShapeDtypeStruct) -> Any:
    """The ONNX model of `fn(params, images)` under given formats.

    Args:
      fn: the network, not quantised; what else it needs (batch statistics) is closed over.
      params: its parameters, concrete.
      precision: formats of its products, from `nets.init_precision` or a run.
      images: their shape and dtype; the graph is for batches of this size.

    Returns:
      An `onnx.ModelProto` with the input "images" and outputs "output", "output_2", ...

    Raises:
      ValueError: a primitive, a width or a format that ONNX has no counterpart for, a product that `precision` does not
        know; the extra packages are not installed.
    """
    onnx = require("onnx", "exchange")
    program = flatten(fn, params, images, enter_calls=True)
    graph = Graph()
    env: dict[Value, Operand] = {
        value: np.asarray(leaf) for value, leaf in zip(program.parameters, jax.tree.leaves(params), strict=True)
    }
    (given,) = program.arguments
    env[given] = "images"
    for equation in program.walk():
        inputs = [_read(env, value) for value in equation.inputs]
        env.update(zip(equation.outputs, _convert(graph, program, precision, equation, inputs), strict=True))
    names = ["output", *(f"output_{i}" for i in range(2, 1 + len(program.outputs)))]
    for name, value in zip(names, program.outputs, strict=True):
        graph.node("Identity", [_read(env, value)], output=name)
    tensor = onnx.helper.make_tensor_value_info
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "network",
            [tensor("images", onnx.helper.np_dtype_to_tensor_dtype(np.dtype(given.dtype)), given.shape)],
            [
                tensor(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)), value.shape)
                for name, value in zip(names, program.outputs, strict=True)
            ],
            graph.initializers,
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="jax-codesign",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def write_onnx(model: Any, path: Path) -> None:
    """Write what `export_onnx` returns; the file is whole or absent."""
    write_atomic(path, model.SerializeToString())


def _read(env: dict[Value, Operand], value: Value) -> Operand:
    return env[value] if value.constant is None else np.asarray(value.constant)


def _convert(
    graph: Graph, program: Program, precision: Precision, equation: Equation, inputs: list[Operand]
) -> Sequence[Operand]:
    """Outputs of one equation: computed where its inputs are constants, else nodes of the graph."""
    if equation.product is not None:
        product = program.products[equation.product]
        return [_PRODUCTS[product.kind](graph, product, precision, *inputs)]
    if all(isinstance(value, np.ndarray) for value in inputs):
        return [np.asarray(output) for output in equation.run(*map(jnp.asarray, inputs))]
    if equation.primitive not in CONVERTERS:
        raise ValueError(
            f"expected primitives with a counterpart in ONNX, got {equation.primitive!r}; write the network without it, "
            "or add it to codesign/onnx_primitives.py"
        )
    return [CONVERTERS[equation.primitive](graph, equation, *inputs)]


def _quantised(graph: Graph, product: Product, precision: Precision, inputs: Sequence[Operand]) -> list[Operand]:
    """Both operands of a product in their formats."""
    if product.name not in precision.names:
        raise ValueError(f"expected formats for every product, got none for {product.name!r}; calibrate this network")
    row = precision.names.index(product.name)
    rule = precision.rule(row)
    bits = np.asarray(precision.bits())[row, :2]
    steps, tops = (np.asarray(x)[row] for x in fixed_point.step_and_range(precision.log2_step, precision.log2_range))
    quantised: list[Operand] = []
    for side, operand in enumerate(inputs):
        role = 0 if side == product.weights_operand else 1
        if rule.formats[role] is not None:
            raise ValueError(
                f"expected fixed point, got the format {rule.formats[role]} of {product.name!r}, which QuantizeLinear has not"
            )
        if bits[role] == FLOAT_BITS:
            quantised.append(operand)
        else:
            what = f"{product.name}.{('weights', 'inputs')[role]}"
            signed = precision.signed[row][role]
            quantised.append(_fixed_point(graph, what, operand, steps[role], tops[role], int(bits[role]), signed))
    return quantised


def _fixed_point(
    graph: Graph, what: str, operand: Operand, step: np.ndarray, top: np.ndarray, bits: int, signed: bool
) -> str:
    """An operand in fixed point; the integers are called `what`."""
    dtype = next((pair[1 - signed] for limit, *pair in _TYPES if bits <= limit), None)
    if dtype is None:
        raise ValueError(f"expected at most 16 bits, got {bits} of {what}, which QuantizeLinear has not; use fewer")
    scale, zero = graph.constant(np.float32(step)), graph.constant(dtype(0))
    if isinstance(operand, np.ndarray):
        values = fixed_point.quantise(jnp.asarray(operand), jnp.asarray(step), jnp.asarray(top), signed)
        integers = graph.constant(np.asarray(values / step).astype(dtype), name=what)
    else:
        low = np.float32(-top if signed else 0.0)
        clipped = graph.node("Clip", [operand, low, np.float32(top)])
        integers = graph.node("QuantizeLinear", [clipped, scale, zero], output=what)
    return graph.node("DequantizeLinear", [integers, scale, zero])


def _dot(graph: Graph, product: Product, precision: Precision, lhs: Operand, rhs: Operand) -> Operand:
    """A matrix product, of several with batch axes: (batch, free, contracting) times (batch, contracting, free)."""
    contracting, batch = product.params["dimension_numbers"]
    orders, shapes = [], []
    for i, shape in enumerate((product.lhs_shape, product.rhs_shape)):
        free = [axis for axis in range(len(shape)) if axis not in (*contracting[i], *batch[i])]
        inner = [free, list(contracting[i])] if i == 0 else [list(contracting[i]), free]
        orders.append([*batch[i], *inner[0], *inner[1]])
        shapes.append(
            [*(shape[axis] for axis in batch[i]), *(math.prod(shape[axis] for axis in axes) for axes in inner)]
        )
    sides = [graph.transpose(operand, order) for operand, order in zip((lhs, rhs), orders, strict=True)]
    # Weights get a node between them and the product: onnxruntime replaces MatMul of dequantised weights by one that
    # rounds its other operand to 8 bits.
    is_weights = [isinstance(side, np.ndarray) for side in sides]
    plain = [
        side if weights else graph.reshape(side, shape)
        for side, shape, weights in zip(sides, shapes, is_weights, strict=True)
    ]
    quantised = _quantised(graph, product, precision, plain)
    flat = [
        graph.reshape(side, shape) if weights else side
        for side, shape, weights in zip(quantised, shapes, is_weights, strict=True)
    ]
    return graph.reshape(graph.node("MatMul", flat), product.out_shape)


def _conv(graph: Graph, product: Product, precision: Precision, lhs: Operand, rhs: Operand) -> Operand:
    """A convolution, channels moved before the spatial axes and back."""
    params = product.params
    if params["batch_group_count"] != 1 or any(dilation != 1 for dilation in params["lhs_dilation"]):
        raise ValueError(
            f"expected a convolution of plain inputs, got a transposed or batch-grouped one in {product.name!r}, which "
            "is not written to ONNX"
        )
    if any(pad < 0 for pair in params["padding"] for pad in pair):
        raise ValueError(f"expected padding of at least 0, got a negative one in {product.name!r}; slice the inputs")
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    sides = [graph.transpose(lhs, lhs_spec), graph.transpose(rhs, rhs_spec)]
    result = graph.node(
        "Conv",
        _quantised(graph, product, precision, sides),
        strides=list(params["window_strides"]),
        pads=[pair[end] for end in (0, 1) for pair in params["padding"]],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return graph.transpose(result, np.argsort(out_spec).tolist())


_PRODUCTS: dict[str, Callable[[Graph, Product, Precision, Operand, Operand], Operand]] = {"dot": _dot, "conv": _conv}
