"""ONNX operators in JAX: `OPERATORS[name](attributes, *inputs)`; inputs that are left out are None."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Attributes = Mapping[str, Any]
_FLOATS = (1, 10, 11, 16)  # numbers of ONNX for float, float16, double, bfloat16


def _concrete(value: Any, what: str) -> list[int]:
    """A shape or list of axes, which must not depend on data."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"expected {what} that is constant, got one computed from data")
    return [int(x) for x in np.asarray(value).reshape(-1)]


def _text(attributes: Attributes, name: str, default: str) -> str:
    value = attributes.get(name, default)
    return value.decode() if isinstance(value, bytes) else value


def _window(attributes: Attributes, x: Any, window: list[int]) -> tuple[Any, Any, Any]:
    """Strides, (before, after) padding and dilations over the spatial axes of an NC... array."""
    rank = x.ndim - 2
    strides, dilations = (list(attributes.get(name, [1] * rank)) for name in ("strides", "dilations"))
    automatic = _text(attributes, "auto_pad", "NOTSET")
    if automatic == "VALID":
        padding = [(0, 0)] * rank
    elif automatic.startswith("SAME"):
        padding = []
        for i in range(rank):
            reach = (window[i] - 1) * dilations[i] + 1
            total = max((-(-x.shape[2 + i] // strides[i]) - 1) * strides[i] + reach - x.shape[2 + i], 0)
            less = total // 2
            padding.append((less, total - less) if automatic == "SAME_UPPER" else (total - less, less))
    else:
        pads = attributes.get("pads", [0] * 2 * rank)
        padding = list(zip(pads[:rank], pads[rank:], strict=True))
    return strides, padding, dilations


def _conv(attributes: Attributes, x: Any, kernel: Any, bias: Any = None) -> Any:
    strides, padding, dilations = _window(attributes, x, kernel.shape[2:])
    out = lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilations, feature_group_count=attributes.get("group", 1)
    )
    return out if bias is None else out + bias.reshape(1, -1, *[1] * (x.ndim - 2))


def _pool(attributes: Attributes, x: Any, start: float, combine: Callable[..., Any]) -> Any:
    if attributes.get("ceil_mode", 0):
        raise ValueError("expected pooling that rounds sizes down, got ceil_mode")
    window = list(attributes["kernel_shape"])
    strides, padding, dilations = _window(attributes, x, window)
    full = [(0, 0), (0, 0), *padding]
    return lax.reduce_window(x, start, combine, (1, 1, *window), (1, 1, *strides), full, None, (1, 1, *dilations))


def _average_pool(attributes: Attributes, x: Any) -> Any:
    total = _pool(attributes, x, 0.0, lax.add)
    if attributes.get("count_include_pad", 0):
        return total / float(np.prod(attributes["kernel_shape"]))
    return total / _pool(attributes, jnp.ones((1, 1, *x.shape[2:]), x.dtype), 0.0, lax.add)


def _gemm(attributes: Attributes, a: Any, b: Any, c: Any = None) -> Any:
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    out = a @ b
    if (alpha := attributes.get("alpha", 1.0)) != 1.0:
        out = alpha * out
    return out if c is None else out + attributes.get("beta", 1.0) * c


def _batch_norm(attributes: Attributes, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
    shape = (1, -1, *[1] * (x.ndim - 2))
    factor = scale * lax.rsqrt(variance + attributes.get("epsilon", 1e-5))
    return (x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)


def _layer_norm(attributes: Attributes, x: Any, scale: Any, bias: Any = None) -> Any:
    axes = tuple(range(attributes.get("axis", -1) % x.ndim, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    out = centred * lax.rsqrt((centred**2).mean(axes, keepdims=True) + attributes.get("epsilon", 1e-5)) * scale
    return out if bias is None else out + bias


def _reshape(attributes: Attributes, x: Any, shape: Any) -> Any:
    wanted = _concrete(shape, "a shape")
    sizes = wanted if attributes.get("allowzero") else [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(sizes)


def _flatten(attributes: Attributes, x: Any) -> Any:
    axis = attributes.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _squeeze(attributes: Attributes, x: Any, axes: Any = None) -> Any:
    axes = attributes.get("axes") if axes is None else _concrete(axes, "axes")
    return x.squeeze(None if axes is None else tuple(axes))


def _unsqueeze(attributes: Attributes, x: Any, axes: Any = None) -> Any:
    axes = attributes["axes"] if axes is None else _concrete(axes, "axes")
    module: Any = np if isinstance(x, np.ndarray) else jnp
    return module.expand_dims(x, tuple(axes))


def _slice(attributes: Attributes, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = _concrete(starts, "starts"), _concrete(ends, "ends")
    axes = range(len(starts)) if axes is None else _concrete(axes, "axes")
    steps = [1] * len(starts) if steps is None else _concrete(steps, "steps")
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, None if step < 0 and end < -x.shape[axis] else end, step)
    return x[tuple(index)]


def _pad(attributes: Attributes, x: Any, pads: Any, value: Any = None, axes: Any = None) -> Any:
    if _text(attributes, "mode", "constant") != "constant" or axes is not None:
        raise ValueError("expected padding of all axes by a constant, got another mode or axes")
    sizes = _concrete(pads, "padding")
    pairs = list(zip(sizes[: x.ndim], sizes[x.ndim :], strict=True))
    return jnp.pad(x, pairs, constant_values=0.0 if value is None else np.asarray(value).item())


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(attributes: Attributes, x: Any, axes: Any = None) -> Any:
        found = attributes.get("axes") if axes is None else _concrete(axes, "axes")
        return function(x, axis=None if found is None else tuple(found), keepdims=bool(attributes.get("keepdims", 1)))

    return reduce


def _quantise(attributes: Attributes, x: Any, scale: Any, zero: Any = None) -> Any:
    """As floats, so that what is trained has a gradient; rounded and saturated as the type of the zero point has it."""
    dtype = np.dtype(np.uint8) if zero is None else np.asarray(zero).dtype
    limits = np.iinfo(dtype)
    offset = 0.0 if zero is None else np.asarray(zero, np.float32)
    return jnp.clip(jnp.round(x / scale) + offset, limits.min, limits.max)


def _dequantise(attributes: Attributes, x: Any, scale: Any, zero: Any = None) -> Any:
    if np.ndim(scale) > 0:
        raise ValueError("expected one scale for a tensor, got several")
    offset = 0.0 if zero is None else np.asarray(zero, np.float32)
    return (jnp.asarray(x, jnp.float32) - offset) * scale


def _constant(attributes: Attributes) -> Any:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in attributes:
            return np.asarray(attributes[name])
    raise ValueError("expected a constant of numbers, got another")


def _clip(attributes: Attributes, x: Any, low: Any = None, high: Any = None) -> Any:
    low = attributes.get("min") if low is None else low
    return jnp.clip(x, low, attributes.get("max") if high is None else high)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda attributes, *inputs: function(*inputs)


def _concatenate(attributes: Attributes, *inputs: Any) -> Any:
    module: Any = np if all(isinstance(x, np.ndarray) for x in inputs) else jnp
    return module.concatenate(inputs, axis=attributes["axis"])


def _gather(attributes: Attributes, x: Any, indices: Any) -> Any:
    module: Any = np if isinstance(x, np.ndarray) and isinstance(indices, np.ndarray) else jnp
    return module.take(x, indices, axis=attributes.get("axis", 0))


_PLAIN: dict[str, Callable[..., Any]] = {
    "Add": jnp.add, "Sub": jnp.subtract, "Mul": jnp.multiply, "Div": jnp.divide, "Pow": jnp.power, "Neg": jnp.negative,
    "MatMul": jnp.matmul, "Relu": jax.nn.relu, "Sigmoid": jax.nn.sigmoid, "Tanh": jnp.tanh, "Erf": lax.erf,
    "Exp": jnp.exp, "Log": jnp.log, "Sqrt": jnp.sqrt, "Abs": jnp.abs, "Sign": jnp.sign, "Floor": jnp.floor,
    "Ceil": jnp.ceil, "Sin": jnp.sin, "Cos": jnp.cos, "Reciprocal": lambda x: 1.0 / x, "Identity": lambda x: x,
    "Greater": jnp.greater, "GreaterOrEqual": jnp.greater_equal, "Less": jnp.less, "LessOrEqual": jnp.less_equal,
    "Equal": jnp.equal, "Not": jnp.logical_not, "And": jnp.logical_and, "Or": jnp.logical_or, "Where": jnp.where,
    "HardSwish": jax.nn.hard_swish, "Softplus": jax.nn.softplus, "Dropout": lambda x, *_: x,
}  # fmt: skip

OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: _plain(function) for name, function in _PLAIN.items()},
    "Max": lambda attributes, *xs: functools.reduce(jnp.maximum, xs),
    "Min": lambda attributes, *xs: functools.reduce(jnp.minimum, xs),
    "LeakyRelu": lambda attributes, x: jax.nn.leaky_relu(x, attributes.get("alpha", 0.01)),
    "Elu": lambda attributes, x: jax.nn.elu(x, attributes.get("alpha", 1.0)),
    "HardSigmoid": lambda a, x: jnp.clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0.0, 1.0),
    "Gelu": lambda a, x: jax.nn.gelu(x, approximate=_text(a, "approximate", "none") == "tanh"),
    "Clip": _clip,
    "Softmax": lambda attributes, x: jax.nn.softmax(x, axis=attributes.get("axis", -1)),
    "LogSoftmax": lambda attributes, x: jax.nn.log_softmax(x, axis=attributes.get("axis", -1)),
    "Cast": lambda attributes, x: x.astype(np.float32) if attributes["to"] in _FLOATS else x,
    "Constant": _constant,
    "Shape": lambda attributes, x: np.array(x.shape[attributes.get("start", 0) : attributes.get("end")], np.int64),
    "Gather": _gather,
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": lambda attributes, x: _pool(attributes, x, -jnp.inf, lax.max),
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda attributes, x: x.mean(tuple(range(2, x.ndim)), keepdims=True),
    "GlobalMaxPool": lambda attributes, x: x.max(tuple(range(2, x.ndim)), keepdims=True),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda attributes, x: x.transpose(attributes.get("perm")),
    "Expand": lambda attributes, x, shape: jnp.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_concrete(shape, "a shape")))),
    "Concat": _concatenate,
    "Slice": _slice,
    "Pad": _pad,
    "ReduceMean": _reduce(jnp.mean),
    "ReduceSum": _reduce(jnp.sum),
    "ReduceMax": _reduce(jnp.max),
    "ReduceMin": _reduce(jnp.min),
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
}  # fmt: skip
