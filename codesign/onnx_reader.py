"""ONNX graphs as JAX functions, to trace and cost them: training is then as for any JAX function.

Constant floating-point tensors of a graph, and stored integers that it dequantises, are parameters under their names there;
shapes and other integers are constants. Operators without counterpart here are errors that name them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codesign.onnx_operators import OPERATORS
from codesign.optional import require

_DOMAINS = ("", "ai.onnx")


class OnnxFunction(NamedTuple):
    """A graph as a function.

    Attributes:
      fn: `fn(params, *inputs)`, all outputs as a tuple.
      params: its parameters by name, numpy arrays.
      inputs: shapes and dtypes of the inputs, the first axis being the batch asked for.
    """

    fn: Callable[..., tuple[Any, ...]]
    params: dict[str, np.ndarray]
    inputs: tuple[jax.ShapeDtypeStruct, ...]


def read_onnx(path: Path, batch_size: int = 1) -> OnnxFunction:
    """Read an ONNX file.

    Args:
      path: of the file; tensors stored in other files beside it are not read.
      batch_size: size of the first axis of inputs, whatever the graph says; one that needs another cannot be evaluated.

    Raises:
      ValueError: no ONNX file, an operator without counterpart, an input without known shape, a graph that cannot be
        evaluated; the extra packages are not installed.
      FileNotFoundError: no such file.
    """
    onnx = require("onnx", "exchange")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; check the path")
    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(model)
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    except Exception as error:  # protobuf and the checker have errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: expected an ONNX model, got {reason[:120]}; is it the right file?") from error
    for node in model.graph.node:
        if node.domain not in _DOMAINS or node.op_type not in OPERATORS:
            raise ValueError(
                f"{path}: expected operators with a counterpart here, got {node.op_type!r} (node {node.name!r}); remove it, "
                "or add it to codesign/onnx_operators.py"
            )
    nodes = _with_dequantised(stored, [_Node.read(onnx, node) for node in model.graph.node])
    params = {_path(name): value for name, value in stored.items() if value.dtype.kind == "f" and value.ndim > 0}
    constants = {name: value for name, value in stored.items() if _path(name) not in params}
    given = [value for value in model.graph.input if value.name not in stored]
    inputs = tuple(_shape(onnx, path, value, batch_size) for value in given)
    names, results = [value.name for value in given], [value.name for value in model.graph.output]
    fn = _function(nodes, constants, names, results)
    try:
        jax.eval_shape(fn, params, *inputs)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: expected a graph that can be evaluated at batch {batch_size}, got {reason[:160]}; if it fixes its "
            "batch, ask for that one"
        ) from error
    return OnnxFunction(fn, params, inputs)


def _path(name: str) -> str:
    """The name of a tensor as a path of layers: "conv1.weight" to "conv1/weight"."""
    return name.replace(".", "/")


def _with_dequantised(stored: dict[str, np.ndarray], nodes: Sequence[_Node]) -> list[_Node]:
    """Nodes that dequantise stored integers are evaluated here: what they make are weights, and added to `stored`."""
    left, integers = [], dict(stored)  # several nodes may dequantise the same integers
    for node in nodes:
        if node.op == "DequantizeLinear" and all(name in integers for name in node.inputs):
            values = OPERATORS[node.op](node.attributes, *(integers[name] for name in node.inputs))
            stored[node.inputs[0]] = np.asarray(values)
            left.append(_Node(node.name, "Identity", node.inputs[:1], node.outputs, {}))
        else:
            left.append(node)
    return left


class _Node(NamedTuple):
    """One node of a graph."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @classmethod
    def read(cls, onnx: Any, node: Any) -> _Node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = {key: onnx.numpy_helper.to_array(v) if hasattr(v, "raw_data") else v for key, v in attributes.items()}
        return cls(node.name, node.op_type, tuple(node.input), tuple(node.output), plain)


def _shape(onnx: Any, path: Path, value: Any, batch_size: int) -> jax.ShapeDtypeStruct:
    tensor = value.type.tensor_type
    sizes = [dim.dim_value or None for dim in tensor.shape.dim]
    if not sizes or None in sizes[1:]:
        raise ValueError(
            f"{path}: expected inputs whose shape is known but for the batch, got {value.name!r} of {sizes}; fix it"
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return jax.ShapeDtypeStruct((batch_size, *sizes[1:]), dtype)


def _function(
    nodes: Sequence[_Node], constants: Mapping[str, np.ndarray], inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[..., tuple[Any, ...]]:
    """Evaluates the nodes in their order; values that are no JAX arrays stay numpy, as shapes must."""

    def fn(params: Mapping[str, Any], *arrays: Any) -> tuple[Any, ...]:
        env: dict[str, Any] = {**constants, **dict(zip(inputs, arrays, strict=True))}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for node in nodes:
                operands = [_value(env, params, name) for name in node.inputs]
                try:
                    results = OPERATORS[node.op](node.attributes, *operands)
                except ValueError as error:
                    raise ValueError(f"{error} (node {node.name or node.outputs[0]!r})") from None
                results = results if isinstance(results, tuple) else (results,)
                env.update(zip(node.outputs, results, strict=False))
        return tuple(jnp.asarray(_value(env, params, name)) for name in outputs)

    return fn


def _value(env: Mapping[str, Any], params: Mapping[str, Any], name: str) -> Any:
    """The value of a name; None for an input that is left out."""
    if not name:
        return None
    return env[name] if name in env else params[_path(name)]
