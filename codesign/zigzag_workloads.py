"""ZigZag workload files as JAX functions: convolutions, matrix products, poolings and additions, joined as they say.

Source of the format: ZigZag's documentation of workloads and its inputs/workload examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from codesign.rundir import read_yaml

_DIMENSIONS = ("B", "G", "K", "C", "OX", "OY", "FX", "FY")
_LARGEST = 2**24  # float32 has every integer up to it
_EQUATION = re.compile(r"O((?:\[\w+\])+)\+?=(\w)((?:\[\w+\])+)([*+])(\w)((?:\[\w+\])+)")
_RELATION = re.compile(r"i([xy])=(?:(\d+)\*)?o\1\+(?:(\d+)\*)?f\1")


class ZigzagFunction(NamedTuple):
    """A workload as a function.

    Attributes:
      fn: `fn(params, *inputs)`, what no other layer reads, as a tuple.
      params: shapes of the kernels by layer.
      inputs: shapes of what layers read from outside.
    """

    fn: Callable[..., tuple[Any, ...]]
    params: dict[str, dict[str, jax.ShapeDtypeStruct]]
    inputs: tuple[jax.ShapeDtypeStruct, ...]


@dataclass(frozen=True)
class _Layer:
    """One layer; `kind` is "product", "pool" or "add", `sources` the layers it reads, itself for what comes from outside."""

    id: int
    kind: str
    sizes: Mapping[str, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    sources: tuple[int, ...]

    @property
    def window(self) -> tuple[int, int]:
        """Inputs along height and width."""
        pairs = zip(("OY", "OX"), ("FY", "FX"), self.stride, self.dilation, strict=True)
        height, width = ((self.sizes[o] - 1) * s + (self.sizes[f] - 1) * d + 1 for o, f, s, d in pairs)
        return height, width

    @property
    def channels(self) -> int:
        return self.sizes["G"] * self.sizes["C"]


def read_zigzag_workload(path: Path, batch_size: int) -> ZigzagFunction:
    """Read a workload file.

    Args:
      path: of the YAML file.
      batch_size: in the place of B.

    Raises:
      ValueError: no such content, or a layer that is none of the three or does not fit what it reads; names the layer.
      FileNotFoundError: no such file.
    """
    content = read_yaml(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list of layers, as ZigZag's workloads are, got {type(content).__name__}")
    layers: dict[int, _Layer] = {}
    for entry in content:
        try:
            layer = _read_layer(entry, batch_size)
            if any(source != layer.id and source not in layers for source in layer.sources) or layer.id in layers:
                raise ValueError(f"expected ids that stand once and sources above, got {list(layer.sources)}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            name = entry.get("id") if isinstance(entry, Mapping) else entry
            reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, layer {str(name)[:40]}: {reason[:200]}") from None
        layers[layer.id] = layer
    kernels = {f"layer{layer.id}": _kernel(layer) for layer in layers.values() if layer.kind == "product"}
    outside = [layer for layer in layers.values() if layer.id in layer.sources]
    inputs = [jax.ShapeDtypeStruct((batch_size, *layer.window, layer.channels), jnp.float32) for layer in outside]
    read = {source for layer in layers.values() for source in layer.sources if source != layer.id}

    def fn(params: Any, *arrays: Any) -> tuple[Any, ...]:
        given = {layer.id: array for layer, array in zip(outside, arrays, strict=True)}
        made: dict[int, Any] = {}
        for layer in layers.values():
            operands = [given[layer.id] if source == layer.id else made[source] for source in layer.sources]
            try:
                made[layer.id] = _KINDS[layer.kind](layer, params, *operands)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, layer {layer.id}: {str(error).splitlines()[0][:200]}") from None
        return tuple(value for name, value in made.items() if name not in read)

    jax.eval_shape(fn, kernels, *inputs)
    return ZigzagFunction(fn, kernels, tuple(inputs))


def _read_layer(entry: Mapping[str, Any], batch_size: int) -> _Layer:
    match = _EQUATION.fullmatch(entry["equation"].replace(" ", ""))
    if match is None:
        raise ValueError(f"expected an equation of two operands, got {entry['equation']!r}")
    _, first, first_dims, operator, second, second_dims = match.groups()
    dims = {first: set(re.findall(r"\w+", first_dims)), second: set(re.findall(r"\w+", second_dims))}
    if set(dims) != {"W", "I"}:
        raise ValueError(f"expected the operands W and I, got {first} and {second}; rename them")
    sizes = dict.fromkeys(_DIMENSIONS, 1) | dict(zip(entry["loop_dims"], entry["loop_sizes"], strict=True))
    for name, size in sizes.items():
        if name not in _DIMENSIONS or type(size) is not int or not 1 <= size <= _LARGEST:
            raise ValueError(f"expected sizes from 1 of {', '.join(_DIMENSIONS)}, got {name} of {size!r}")
    sources, own = entry["operand_source"], entry["id"]
    read: tuple[Any, ...]
    if operator == "+":
        kind, read = "add", (sources["W"], sources["I"])
    else:
        kind, read = ("pool" if dims["W"] <= {"fx", "fy"} else "product"), (sources["I"],)
        if sources["W"] != own:
            raise ValueError(
                f"expected constant weights (W: {own}), got those of layer {sources['W']}, a product of activations"
            )
    if not all(type(source) is int for source in (own, *read)):
        raise ValueError(f"expected ids that are whole numbers, got {own!r} and {read!r}")
    steps = {"x": (1, 1), "y": (1, 1)}
    for relation in entry.get("dimension_relations") or []:
        found = _RELATION.fullmatch(relation.replace(" ", ""))
        if found is None:
            raise ValueError(f"expected relations such as ix=2*ox+1*fx, got {relation!r}")
        steps[found[1]] = (int(found[2] or 1), int(found[3] or 1))
    stride, dilation = zip(steps["y"], steps["x"], strict=True)
    return _Layer(own, kind, sizes | {"B": batch_size}, stride, dilation, read)


def _kernel(layer: _Layer) -> dict[str, jax.ShapeDtypeStruct]:
    sizes = layer.sizes
    return {
        "kernel": jax.ShapeDtypeStruct((sizes["FY"], sizes["FX"], sizes["C"], sizes["G"] * sizes["K"]), jnp.float32)
    }


def _fitted(layer: _Layer, x: Any, channels: int) -> tuple[Any, list[tuple[int, int]]]:
    """What a layer reads, with its channels, and the padding along height and width that it needs, halved."""
    if x.shape[3] != channels:
        if x.size != x.shape[0] * channels * layer.window[0] * layer.window[1]:
            raise ValueError(f"expected {channels} channels, got {x.shape[3]} from the layer it reads")
        x = x.reshape(x.shape[0], *layer.window, channels)
    lacks = [wanted - size for wanted, size in zip(layer.window, x.shape[1:3], strict=True)]
    return x, [(lack // 2, lack - lack // 2) for lack in lacks]


def _product(layer: _Layer, params: Any, x: Any) -> Any:
    x, padding = _fitted(layer, x, layer.channels)
    return lax.conv_general_dilated(
        x, params[f"layer{layer.id}"]["kernel"], layer.stride, padding, rhs_dilation=layer.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=layer.sizes["G"],
    )  # fmt: skip


def _pool(layer: _Layer, params: Any, x: Any) -> Any:
    x, padding = _fitted(layer, x, layer.channels * layer.sizes["K"])
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    window = (1, layer.sizes["FY"], layer.sizes["FX"], 1)
    total = lax.reduce_window(x, 0.0, lax.add, window, (1, *layer.stride, 1), "VALID", None, (1, *layer.dilation, 1))
    return total / float(window[1] * window[2])


def _add(layer: _Layer, params: Any, x: Any, y: Any) -> Any:
    return x + y


_KINDS: dict[str, Callable[..., Any]] = {"product": _product, "pool": _pool, "add": _add}
