"""JAX primitives as ONNX nodes: everything of a network but its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from codesign.optional import require
from nets.jaxpr import Equation

Operand = str | np.ndarray | np.generic
"""The name of a tensor of the graph, or a constant."""


class Graph:
    """Nodes and constants in the order they are made."""

    def __init__(self) -> None:
        self._onnx = require("onnx", "exchange")
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: set[str] = set()

    def node(self, op: str, inputs: Sequence[Operand], output: str | None = None, **attributes: Any) -> str:
        """Adds a node with one output; returns the output's name."""
        name = self._unique(op.lower() if output is None else output)
        names = [self.constant(x) if isinstance(x, np.ndarray | np.generic) else x for x in inputs]
        self.nodes.append(self._onnx.helper.make_node(op, names, [name], name=f"{name}/{op}", **attributes))
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        """Adds a constant; returns its name."""
        name = self._unique("constant" if name is None else name)
        self.initializers.append(
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        )
        return name

    def transpose(self, operand: Operand, axes: Sequence[int]) -> Operand:
        """Its axes in another order."""
        if list(axes) == list(range(len(axes))):
            return operand
        if isinstance(operand, np.ndarray):
            return operand.transpose(axes)
        return self.node("Transpose", [operand], perm=list(axes))

    def reshape(self, operand: Operand, shape: Sequence[int]) -> Operand:
        """Its elements in another shape."""
        if isinstance(operand, np.ndarray):
            return operand.reshape(shape)
        return self.node("Reshape", [operand, np.array(shape, np.int64)])

    def _unique(self, name: str) -> str:
        count, unique = 1, name
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        return unique


def _same(op: str) -> Callable[..., str]:
    """A primitive that is one node of the same operands."""
    return lambda graph, equation, *inputs: graph.node(op, inputs)


def _max(graph: Graph, equation: Equation, *inputs: Operand) -> str:
    is_zero = [isinstance(x, np.ndarray) and not x.any() for x in inputs]
    if any(is_zero):
        return graph.node("Relu", [inputs[is_zero.index(False)]])
    return graph.node("Max", inputs)


def _integer_pow(graph: Graph, equation: Equation, x: Operand) -> str:
    exponent = equation.params["y"]
    return graph.node("Mul", [x, x]) if exponent == 2 else graph.node("Pow", [x, np.float32(exponent)])


def _rsqrt(graph: Graph, equation: Equation, x: Operand) -> str:
    return graph.node("Reciprocal", [graph.node("Sqrt", [x])])


def _select(graph: Graph, equation: Equation, which: Operand, *cases: Operand) -> str:
    if len(cases) != 2:
        raise ValueError(
            f"expected a choice between two, got select_n of {len(cases)}, which ONNX has no counterpart for"
        )
    return graph.node("Where", [which, cases[1], cases[0]])


def _clamp(graph: Graph, equation: Equation, low: Operand, x: Operand, high: Operand) -> str:
    return graph.node("Min", [graph.node("Max", [x, low]), high])


def _cast(graph: Graph, equation: Equation, x: Operand) -> str:
    return graph.node(
        "Cast", [x], to=graph._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    )


def _reshape(graph: Graph, equation: Equation, x: Operand) -> Operand:
    return graph.reshape(x, equation.outputs[0].shape)


def _transpose(graph: Graph, equation: Equation, x: Operand) -> Operand:
    return graph.transpose(x, equation.params["permutation"])


def _broadcast(graph: Graph, equation: Equation, x: Operand) -> str:
    """Its axes go to the given ones, those between are new."""
    shape = equation.outputs[0].shape
    sizes = dict(zip(equation.params["broadcast_dimensions"], equation.inputs[0].shape, strict=True))
    aligned = graph.reshape(x, [sizes.get(axis, 1) for axis in range(len(shape))])
    return graph.node("Expand", [aligned, np.array(shape, np.int64)])


def _concatenate(graph: Graph, equation: Equation, *inputs: Operand) -> str:
    return graph.node("Concat", inputs, axis=equation.params["dimension"])


def _slice(graph: Graph, equation: Equation, x: Operand) -> str:
    starts, ends = (np.array(equation.params[name], np.int64) for name in ("start_indices", "limit_indices"))
    steps = np.array(equation.params["strides"] or [1] * len(starts), np.int64)
    return graph.node("Slice", [x, starts, ends, np.arange(len(starts)), steps])


def _pad(graph: Graph, equation: Equation, x: Operand, value: Operand) -> str:
    config = equation.params["padding_config"]
    if any(low < 0 or high < 0 or interior for low, high, interior in config):
        raise ValueError(
            "expected padding at the ends only, got pad with negative or interior padding; slice the array instead"
        )
    return graph.node("Pad", [x, np.array([pair[end] for end in (0, 1) for pair in config], np.int64), value])


def _reduce(op: str) -> Callable[..., str]:
    def convert(graph: Graph, equation: Equation, x: Operand) -> str:
        return graph.node(op, [x, np.array(equation.params["axes"], np.int64)], keepdims=0)

    return convert


def _window(graph: Graph, equation: Equation, x: Operand, op: str) -> str:
    """A window over one to three axes; all others are moved before them and become one."""
    params, shape = equation.params, equation.inputs[0].shape
    sizes, strides, padding = (params[name] for name in ("window_dimensions", "window_strides", "padding"))
    moved = [axis for axis in range(len(shape)) if sizes[axis] > 1 or strides[axis] > 1 or any(padding[axis])]
    moved = moved or [len(shape) - 1]
    if len(moved) > 3 or any(dilation != 1 for dilation in params["base_dilation"]):
        raise ValueError(f"expected a window over at most three plain axes, got {equation.primitive} over {len(moved)}")
    still = [axis for axis in range(len(shape)) if axis not in moved]
    rows = math.prod(shape[axis] for axis in still)
    stacked = graph.reshape(graph.transpose(x, [*still, *moved]), [rows, 1, *(shape[axis] for axis in moved)])
    attributes: dict[str, Any] = {
        "strides": [strides[axis] for axis in moved],
        "pads": [padding[axis][end] for end in (0, 1) for axis in moved],
        "dilations": [params["window_dilation"][axis] for axis in moved],
    }
    window = [sizes[axis] for axis in moved]
    if op == "MaxPool":
        result = graph.node(op, [stacked], kernel_shape=window, **attributes)
    else:  # a sum: AveragePool would round its quotient
        result = graph.node("Conv", [stacked, np.ones((1, 1, *window), np.float32)], **attributes)
    out = equation.outputs[0].shape
    axes = [*still, *moved]
    unstacked = graph.reshape(result, [out[axis] for axis in axes])
    return str(graph.transpose(unstacked, np.argsort(axes).tolist()))


CONVERTERS: dict[str, Callable[..., Any]] = {
    **{name: _same(op) for name, op in {
        "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "min": "Min", "pow": "Pow", "neg": "Neg",
        "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "sqrt": "Sqrt", "abs": "Abs", "erf": "Erf",
        "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "sin": "Sin", "cos": "Cos", "copy": "Identity",
        "copy_p": "Identity", "stop_gradient": "Identity", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less",
        "le": "LessOrEqual", "eq": "Equal", "not": "Not", "and": "And", "or": "Or",
    }.items()},
    "max": _max,
    "integer_pow": _integer_pow,
    "square": lambda graph, equation, x: graph.node("Mul", [x, x]),
    "rsqrt": _rsqrt,
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _cast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "slice": _slice,
    "pad": _pad,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_window_max": lambda graph, equation, x: _window(graph, equation, x, "MaxPool"),
    "reduce_window_sum": lambda graph, equation, x: _window(graph, equation, x, "Sum"),
}  # fmt: skip
