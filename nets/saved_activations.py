"""What is kept between forward and backward pass: masks of single bits, and activations of a few bits per local region.

A ReLU needs one bit per value for its backward pass, a max pooling the place of the maximum: their gradients stay the
same, bit for bit. Weight gradients and normalisation layers need values; kept at 2 to 8 bits with one scale per local
region, they give approximate gradients. Everything is kept packed, so that the memory is really saved.

Source: masks as in S. Choi et al., An Energy-Efficient Deep Convolutional Neural Network Training Accelerator for In Situ
Personalization on Smart Devices, JSSC 2020; local scales reconstruct the low-bit activations of S. Choi et al., DAC 2019,
whose exact rule is not public.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nets import fixed_point
from nets.jaxpr import used_inputs

_WORD = 32
SCALES = ("power_of_two", "linear")


def pack(values: jax.Array, bits: int) -> jax.Array:
    """Unsigned integers of a few bits packed into words, bit plane by bit plane.

    The leading axis stays (a batch may be sharded along it); the others are flattened and padded to whole words.

    Args:
      values: integers or booleans below 2**bits, of any shape.
      bits: width, 1 to 8.

    Returns:
      uint32 of shape (leading, bits, ceil(rest / 32)); leading is 1 for vectors and scalars.
    """
    rows = values.astype(jnp.uint32).reshape(_rows(values.shape))
    lanes = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % _WORD))).reshape(rows.shape[0], 1, _WORD, -1)
    planes = (lanes >> jnp.arange(bits, dtype=jnp.uint32)[None, :, None, None]) & 1
    return jnp.sum(planes << jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :, None], axis=2, dtype=jnp.uint32)


def unpack(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The integers that `pack` packed.

    Args:
      words: of `pack`.
      shape: shape of the integers.

    Returns:
      uint32 of shape `shape`.
    """
    planes = (words[:, :, None, :] >> jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :, None]) & 1
    place = jnp.arange(words.shape[1], dtype=jnp.uint32)[None, :, None, None]
    values = jnp.sum(planes << place, axis=1, dtype=jnp.uint32).reshape(words.shape[0], -1)
    return values[:, : _rows(shape)[1]].reshape(shape)


def when_needed(kept: Any, cotangent: Any) -> tuple[Any, Any]:
    """Both arguments, such that nothing is unpacked before the error has come.

    Without that barrier XLA unpacks early, and the memory is not saved.

    Args:
      kept: a pytree of arrays kept by a forward pass.
      cotangent: a pytree of arrays.

    Returns:
      (kept, cotangent).
    """
    return lax.optimization_barrier((kept, cotangent))


@jax.custom_vjp
def masked_relu(x: jax.Array) -> jax.Array:
    """`jax.nn.relu` whose backward pass keeps one packed bit per value: x > 0.

    Args:
      x: floats of any shape.

    Returns:
      Shape and dtype of `x`; the gradient is that of `jax.nn.relu`, bit for bit.
    """
    return jnp.maximum(x, 0.0)


def _masked_relu_fwd(x):
    return masked_relu(x), pack(x > 0.0, 1)


def _masked_relu_bwd(mask, g):
    mask, g = when_needed(mask, g)
    return (jnp.where(unpack(mask, g.shape) == 1, g, jnp.zeros_like(g)),)


masked_relu.defvjp(_masked_relu_fwd, _masked_relu_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def masked_max_pool(x: jax.Array, window: tuple[int, ...], relu: bool = False) -> jax.Array:
    """Max pooling over windows side by side, whose backward pass keeps the packed place of each maximum.

    That is ceil(log2(size of the window)) bits per window, and one more with `relu`: 2 + 1 bits for 2 x 2 windows,
    where ReLU and pooling keep two arrays of floats and one of bytes otherwise.

    Args:
      x: floats of any shape.
      window: extent of the window along every axis of `x`, also its stride; what is left at the end is dropped.
      relu: pool `jax.nn.relu(x)` instead.

    Returns:
      Maxima, shape x.shape // window. The gradient is that of `lax.reduce_window` (of `jax.nn.relu` before it), bit
      for bit: it goes to the first maximum of a window.
    """
    return _pool(x, window, relu)[0]


def _pool(x, window, relu):
    """Maxima and the code of each: the place of the first maximum and, above it, whether it is positive."""
    places = list(_places(x.shape, window))
    best = lax.slice(x, *places[0], window)
    code = jnp.zeros(best.shape, jnp.uint32)
    for index, place in enumerate(places[1:], start=1):
        value = lax.slice(x, *place, window)
        code = jnp.where(value > best, jnp.uint32(index), code)
        best = jnp.maximum(best, value)
    if relu:
        code |= (best > 0.0).astype(jnp.uint32) << _place_bits(window)
        best = jnp.maximum(best, 0.0)
    return best, code


def _masked_max_pool_fwd(x, window, relu):
    out, code = _pool(x, window, relu)
    # An array without elements carries the shape and dtype of x.
    return out, (pack(code, _place_bits(window) + relu), jnp.zeros((*x.shape, 0), x.dtype))


def _masked_max_pool_bwd(window, relu, residuals, g):
    (words, like), g = when_needed(residuals, g)
    code, shape = unpack(words, g.shape), like.shape[:-1]
    if relu:
        alive = code >> _place_bits(window)
        g, code = jnp.where(alive == 1, g, jnp.zeros_like(g)), code & (2 ** _place_bits(window) - 1)
    parts = [jnp.where(code == index, g, jnp.zeros_like(g)) for index in range(math.prod(window))]
    # (windows..., place in the window...) to (window, place) of one axis after the other.
    tiles = jnp.stack(parts, axis=-1).reshape(*g.shape, *window)
    order = [axis for pair in zip(range(g.ndim), range(g.ndim, 2 * g.ndim), strict=True) for axis in pair]
    pooled = jnp.transpose(tiles, order).reshape([n * w for n, w in zip(g.shape, window, strict=True)])
    return (jnp.pad(pooled, [(0, n - m) for n, m in zip(shape, pooled.shape, strict=True)]),)


masked_max_pool.defvjp(_masked_max_pool_fwd, _masked_max_pool_bwd)


@dataclass(frozen=True)
class LocalFormat:
    """How activations are kept; made by `make_local_format`.

    Attributes:
      bits: width of a value.
      region: values that share a scale: the number of neighbours in memory, or the shape of a tile along the trailing
        axes, where -1 stands for the whole axis: (-1, -1, -1, 1) is one scale per channel of a convolution's output.
      scale: "power_of_two" keeps an exponent of 8 bits per region, "linear" a float32.
    """

    bits: int
    region: int | tuple[int, ...] = 32
    scale: str = "power_of_two"


def make_local_format(bits: int, region: int | tuple[int, ...] = 32, scale: str = "power_of_two") -> LocalFormat:
    """A local format, checked.

    Args:
      bits: width of a value, 2 to 8.
      region: values that share a scale, see `LocalFormat`.
      scale: "power_of_two" or "linear".

    Returns:
      The format.

    Raises:
      ValueError: for anything else.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"expected saved activations of 2 to 8 bits, got {bits}; choose a width in between")
    if scale not in SCALES:
        raise ValueError(f"expected a scale among {', '.join(SCALES)}, got {scale!r}; choose one of them")
    extents = region if isinstance(region, tuple) else (region,)
    if not extents or any(extent < 1 and not (isinstance(region, tuple) and extent == -1) for extent in extents):
        raise ValueError(f"expected a region of at least one value, got {region}; give a number or a tile")
    return LocalFormat(bits, region, scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """An array kept at low bits.

    Attributes:
      words: packed levels, see `pack`.
      scales: one per region: exponents (int8) or float32.
      shape, dtype: of the array.
      local_format: how it is kept.
    """

    words: jax.Array
    scales: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    local_format: LocalFormat = field(metadata={"static": True})


def encode(x: jax.Array, local_format: LocalFormat) -> Saved:
    """An array at low bits: the nearest multiples of each region's scale.

    Levels are symmetric, -(2**(bits - 1) - 1) to 2**(bits - 1) - 1. A linear scale is the region's peak over the
    largest level; a power of two is the least that saturates nothing.

    Args:
      x: floats of any shape.
      local_format: how to keep it.

    Returns:
      What to hand to `decode`.

    Raises:
      ValueError: if the region does not divide `x`.
    """
    levels = 2.0 ** (local_format.bits - 1) - 1.0
    regions, axes = _tiles(x.astype(jnp.float32), local_format.region)
    peak = jnp.max(jnp.abs(regions), axis=axes, keepdims=True)
    if local_format.scale == "linear":
        scales = peak / levels
        # An all-zero region divides by 1.
        ratio = regions / jnp.where(scales > 0.0, scales, jnp.ones_like(scales))
    else:
        mantissa, exponent = jnp.frexp(peak / levels)
        # A power of two itself has the mantissa 1/2. Two bits of margin keep the step a normal float.
        exponent = jnp.clip(exponent - (mantissa == 0.5).astype(exponent.dtype), -124, 124)
        scales = exponent.astype(jnp.int8)
        ratio = regions * fixed_point.power_of_two(-exponent.astype(jnp.float32))
    level = jnp.clip(jnp.round(ratio), -levels, levels) + levels
    words = pack(level.reshape(x.shape).astype(jnp.uint32), local_format.bits)
    return Saved(words, jnp.squeeze(scales, axes), x.shape, x.dtype, local_format)


def decode(saved: Saved) -> jax.Array:
    """The array that `encode` kept, in its shape and dtype.

    Args:
      saved: of `encode`.

    Returns:
      Multiples of each region's scale, next to what was encoded.
    """
    levels = 2.0 ** (saved.local_format.bits - 1) - 1.0
    regions, axes = _tiles(unpack(saved.words, saved.shape).astype(jnp.float32) - levels, saved.local_format.region)
    scales = saved.scales
    if saved.local_format.scale == "power_of_two":
        scales = fixed_point.power_of_two(scales.astype(jnp.float32))
    return (regions * jnp.expand_dims(scales, axes)).reshape(saved.shape).astype(saved.dtype)


def saved_bytes(shape: tuple[int, ...], local_format: LocalFormat) -> int:
    """Bytes that `encode` keeps of an array: words and scales.

    Args:
      shape: of the array.
      local_format: how it is kept.

    Returns:
      A count of bytes.

    Raises:
      ValueError: if the region does not divide the array.
    """
    saved = jax.eval_shape(partial(encode, local_format=local_format), jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))


def residual_bytes(fn: Callable, params: Any, *args: Any) -> int:
    """Bytes that the backward pass of a function keeps between the two passes, its parameters apart.

    That is JAX's own list of residuals, before any compiler shortens it.

    Args:
      fn: function of `(params, *args)`, differentiable in `params`.
      params, args: pytrees of arrays; gradients are those with respect to `params`.

    Returns:
      A count of bytes; residuals with the shape of a parameter count as that parameter.
    """
    pullback = jax.eval_shape(lambda params: jax.vjp(lambda p: fn(p, *args), params)[1], params)
    shapes = {x.shape for x in jax.tree.leaves(params)}
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback) if x.shape not in shapes)


def keep_low_bit(fn: Callable, local_formats: Sequence[LocalFormat | None]) -> Callable:
    """`fn` whose backward pass starts from its arguments at low bits instead of what it would keep itself.

    The result is that of `fn`. The backward pass computes `fn` again from the kept arguments, so its gradients are
    approximate: exact for the nearby arguments. Arguments that the gradient does not depend on are not kept at all.

    Args:
      fn: a function of arrays, such as a normalisation or an activation function.
      local_formats: how each argument is kept, None as it is.

    Returns:
      A function of the same arguments with the same result.

    Raises:
      ValueError: when called, if a region does not divide its argument.
    """

    @jax.custom_vjp
    def kept(*args):
        return fn(*args)

    def forward(*args):
        residuals = [
            Absent.like(x) if not used else x if fmt is None else encode(x, fmt)
            for x, fmt, used in zip(args, local_formats, _used_by_gradient(fn, args), strict=True)
        ]
        return fn(*args), residuals

    def backward(residuals, cotangent):
        residuals, cotangent = when_needed(residuals, cotangent)
        return jax.vjp(fn, *map(_restored, residuals))[1](cotangent)

    kept.defvjp(forward, backward)
    return kept


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Absent:
    """An array that is not kept: any of its shape and dtype will do."""

    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})

    @staticmethod
    def like(x: jax.Array) -> "Absent":
        """In place of `x`."""
        return Absent(x.shape, x.dtype)


def _restored(residual: Any) -> jax.Array:
    if isinstance(residual, Absent):
        return jnp.zeros(residual.shape, residual.dtype)
    return decode(residual) if isinstance(residual, Saved) else residual


def _used_by_gradient(fn: Callable, args: Sequence[jax.Array]) -> tuple[bool, ...]:
    """Which arguments the gradient of `fn` depends on; those that are no floats always count."""
    out, structure = jax.tree.flatten(jax.eval_shape(fn, *args))
    is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in args]

    def gradient(cotangents: list[jax.Array], *args: jax.Array) -> list[jax.Array]:
        given = iter(cotangents)
        every = [
            next(given) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0) for x in out
        ]
        slopes = jax.vjp(fn, *args)[1](jax.tree.unflatten(structure, every))
        return [slope for slope, differentiable in zip(slopes, is_float, strict=True) if differentiable]

    cotangents = [x for x in out if jnp.issubdtype(x.dtype, jnp.inexact)]
    used = used_inputs(gradient, cotangents, *args)[len(cotangents) :]
    return tuple(u or not f for u, f in zip(used, is_float, strict=True))


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(leading, rest) of a shape; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _places(shape: tuple[int, ...], window: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Start and limit of the strided slices that hold one place of all windows each, in row-major order."""
    for place in itertools.product(*map(range, window)):
        yield list(place), [p + (n // w - 1) * w + 1 for p, n, w in zip(place, shape, window, strict=True)]


def _place_bits(window: tuple[int, ...]) -> int:
    return max(1, (math.prod(window) - 1).bit_length())


def _tiles(x: jax.Array, region: int | tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """An array with its regions as axes of their own, and which axes those are."""
    if isinstance(region, int):
        if x.size % region:
            raise ValueError(
                f"expected a region that divides a tensor of {x.size} values {x.shape}, got {region}; choose a divisor"
            )
        return x.reshape(-1, region), (1,)
    extents = (1,) * (x.ndim - len(region)) + region
    extents = tuple(n if extent == -1 else extent for n, extent in zip(x.shape, extents, strict=False))
    if len(extents) != x.ndim or any(n % extent for n, extent in zip(x.shape, extents, strict=True)):
        raise ValueError(f"expected a tile that divides a tensor of shape {x.shape}, got {region}; choose divisors")
    shape = [part for n, extent in zip(x.shape, extents, strict=True) for part in (n // extent, extent)]
    return x.reshape(shape), tuple(range(1, 2 * x.ndim, 2))
