"""Weight-update units of training chips as optax transformations, with the integers that they keep.

All of them are chainable and element-wise (but for one scale per array, a maximum), so they work on sharded arrays as
they are.

- `scale_by_optc`: momentum and Adam in one unit, whose state may be held in few bits.
- `low_bit_update`: weights of 8 bits with the residual of rounding beside them, together a 16-bit master.
- `near_memory`: gradients travel to the memory in few bits, and any optimiser runs there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nets import fixed_point, rounding

_STATE_DTYPES = {8: jnp.int8, 16: jnp.int16}


class LowBit(NamedTuple):
    """An array of `levels * 2**exponent`: int8 or int16 levels, and an int32 exponent of shape ()."""

    levels: jax.Array
    exponent: jax.Array


class OptcState(NamedTuple):
    """Steps taken, int32 of shape (); first and second moment like the parameters, `LowBit` where bits are given."""

    steps: jax.Array
    first: Any
    second: Any


def scale_by_optc(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    adam: bool = True,
    bias_correction: bool = True,
    state_bits: int | None = None,
) -> optax.GradientTransformation:
    """The unified update unit: with k = 1 Adam, with k = 0 momentum.

    m = b1 m + (1 - k b1) g and v = b2 v + (1 - b2) g**2; the update is m / (sqrt(v) + eps) with k = 1 and m with k = 0,
    where v is neither kept nor computed.

    Args:
      b1, b2: decay of the moments.
      eps: added to the denominator.
      adam: k, see above.
      bias_correction: divide m and v by 1 - b1**t and 1 - b2**t as Adam does. The published unit's rule does not say.
      state_bits: width of the state, 8 or 16: integers with one power of two per array. m is rounded to nearest. Of v
        the square root is kept, which halves the range it needs, rounded up, so that no update is divided by zero.
        None keeps both in the gradients' dtype.

    Returns:
      The transformation; chain it with `optax.scale(-learning_rate)`.

    Raises:
      ValueError: for other widths.

    Source: recurrence as published for HNPU (D. Han et al., JSSC 2021); width and scale of its state are ours.
    """
    if state_bits not in (None, *_STATE_DTYPES):
        raise ValueError(f"expected a state of 8 or 16 bits, or None, got {state_bits}; choose one of them")

    def hold(x: jax.Array, round_levels: Callable) -> jax.Array | LowBit:
        return x if state_bits is None else _low_bit(x, state_bits, round_levels)

    def hold_second(v: jax.Array) -> jax.Array | LowBit:
        return v if state_bits is None else hold(jnp.sqrt(v), jnp.ceil)

    def second_moment(g: jax.Array, v: jax.Array | LowBit) -> jax.Array:
        return b2 * (_read(v) ** 2 if isinstance(v, LowBit) else v) + (1.0 - b2) * g**2

    def init(params: Any) -> OptcState:
        zeros = jax.tree.map(lambda x: hold(jnp.zeros_like(x), jnp.round), params)
        return OptcState(jnp.zeros((), jnp.int32), zeros, zeros if adam else ())

    def update(updates: Any, state: OptcState, params: Any = None) -> tuple[Any, OptcState]:
        del params
        steps = optax.safe_increment(state.steps)
        first = jax.tree.map(lambda g, m: b1 * _read(m) + (1.0 - adam * b1) * g, updates, state.first)
        held = jax.tree.map(lambda m: hold(m, jnp.round), first)
        if not adam:
            return first, OptcState(steps, held, ())
        second = jax.tree.map(second_moment, updates, state.second)
        corrections = [1.0 - b ** steps.astype(jnp.float32) if bias_correction else jnp.ones(()) for b in (b1, b2)]

        def ratio(m: jax.Array, v: jax.Array) -> jax.Array:
            return (m / corrections[0].astype(m.dtype)) / (jnp.sqrt(v / corrections[1].astype(v.dtype)) + eps)

        return jax.tree.map(ratio, first, second), OptcState(steps, held, jax.tree.map(hold_second, second))

    return optax.GradientTransformation(init, update)


class LowBitUpdateState(NamedTuple):
    """Integers of `low_bit_update`, each but the first and last like the parameters.

    Fields:
      steps: taken so far, int32 of shape ().
      weights: int8, what the multipliers see.
      residual: int8, what rounding left over, in steps of 2**-8 of a weight's; zeros where rounding is stochastic.
      exponent: int32 of shape () per array: a weight is `weights * 2**exponent`.
      saturations: updates that left the range of the master, int32 of shape ().
    """

    steps: jax.Array
    weights: Any
    residual: Any
    exponent: Any
    saturations: jax.Array


WEIGHT_BITS = 8
RESIDUAL_BITS = 8
_MASTER_RANGE = (-(2**15) - 2**7, 2**15 - 2**7 - 1)


def low_bit_update(headroom_bits: int = 1, stochastic_seed: int | None = None) -> optax.GradientTransformation:
    """Weights of 8 bits whose updates are kept to 16: the residual of rounding stays beside them.

    With delta the update in steps of 2**-8 of a weight's step: `a = residual + delta; d = (a + 2**7) >> 8; w += d;
    residual = a - (d << 8)`. (w << 8) + residual equals, bit for bit, a master that saturates to [-2**15 - 2**7,
    2**15 - 2**7 - 1]; saturations are counted. Put it last in a chain: it turns an update into the difference between
    the new weights and the parameters, which start from `low_bit_weights(state)`.

    Args:
      headroom_bits: how far weights may grow: the largest starts below 2**(7 - headroom_bits) steps.
      stochastic_seed: of stochastic rounding in place of the residual, `d = (delta + u) >> 8`; None keeps the residual.

    Returns:
      The transformation; its `update` needs the parameters.

    Raises:
      ValueError: for an impossible headroom; when `update` is called without parameters.

    Source: reconstruction of the modified weight update of S. Choi et al., JSSC 2020, whose rule is not public.
    """
    if not 0 <= headroom_bits < WEIGHT_BITS - 1:
        raise ValueError(f"expected 0 to {WEIGHT_BITS - 2} bits of headroom, got {headroom_bits}; choose one of them")

    def init(params: Any) -> LowBitUpdateState:
        held = jax.tree.map(lambda x: _low_bit(x, WEIGHT_BITS, jnp.round, headroom_bits), params)
        weights, exponent = (jax.tree.map(lambda _, h, i=i: h[i], params, held) for i in range(2))
        zero = jnp.zeros((), jnp.int32)
        return LowBitUpdateState(zero, weights, jax.tree.map(jnp.zeros_like, weights), exponent, zero)

    def update(updates: Any, state: LowBitUpdateState, params: Any = None) -> tuple[Any, LowBitUpdateState]:
        if params is None:
            raise ValueError("expected parameters, got None; call update(updates, state, params)")
        leaves, structure = jax.tree.flatten(updates)
        columns = (jax.tree.leaves(tree) for tree in (state.weights, state.residual, state.exponent))
        moved = [
            _updated(u, w, r, e, _words(stochastic_seed, state.steps, index, u.shape))
            for index, (u, w, r, e) in enumerate(zip(leaves, *columns, strict=True))
        ]
        weights, residual, saturated = (jax.tree.unflatten(structure, column) for column in zip(*moved, strict=True))
        saturations = state.saturations + sum(jax.tree.leaves(saturated))
        new = LowBitUpdateState(optax.safe_increment(state.steps), weights, residual, state.exponent, saturations)
        difference = jax.tree.map(lambda w, x: w.astype(x.dtype) - x, low_bit_weights(new), params)
        return difference, new

    return optax.GradientTransformation(init, update)


def low_bit_weights(state: LowBitUpdateState) -> Any:
    """The weights that the multipliers see.

    Args:
      state: of `low_bit_update`.

    Returns:
      float32, like the parameters: integers of 8 bits times powers of two.
    """
    return jax.tree.map(lambda w, e: _read(LowBit(w, e)), state.weights, state.exponent)


def near_memory(
    optimizer: optax.GradientTransformation, gradient_bits: int = 16, stochastic_seed: int | None = 0
) -> optax.GradientTransformation:
    """An optimiser that runs next to the memory: gradients travel there in few bits, weights and state not at all.

    Args:
      optimizer: what the memory computes.
      gradient_bits: width of the gradients on the way, 8 or 16: integers with one power of two per array.
      stochastic_seed: of stochastic rounding, which is unbiased; None rounds to nearest.

    Returns:
      `optax.chain` of the rounding and `optimizer`.

    Raises:
      ValueError: for other widths.
    """
    if gradient_bits not in _STATE_DTYPES:
        raise ValueError(f"expected gradients of 8 or 16 bits, got {gradient_bits}; choose one of them")

    def travel(g: jax.Array, words: jax.Array | None) -> jax.Array:
        round_levels = jnp.round if words is None else lambda x: rounding.stochastic(x, words)
        return _read(_low_bit(g, gradient_bits, round_levels)).astype(g.dtype)

    def update(updates: Any, count: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        rounded = [travel(g, _words(stochastic_seed, count, i, g.shape)) for i, g in enumerate(leaves)]
        return jax.tree.unflatten(structure, rounded), optax.safe_increment(count)

    return optax.chain(optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update), optimizer)


def update_traffic_bits(
    weight_bits: float, gradient_bits: float, state_bits: Sequence[float] = (), near_memory: bool = False
) -> float:
    """Bits that the update of one weight moves over the interface of the memory.

    Args:
      weight_bits: width of the weight.
      gradient_bits: width of its gradient.
      state_bits: width of every word of state: none for SGD, one for momentum, two for Adam.
      near_memory: whether the memory updates in place.

    Returns:
      The gradient alone near memory; otherwise a read and a write of weight and state, the gradient being on chip.
    """
    return gradient_bits if near_memory else 2.0 * (weight_bits + sum(state_bits))


def _low_bit(x: jax.Array, bits: int, round_levels: Callable, headroom_bits: int = 0) -> LowBit:
    """An array as signed integers times the least power of two that fits its peak; all zeros have the exponent 0."""
    limit = 2.0 ** (bits - 1) - 1.0
    mantissa, exponent = jnp.frexp(jnp.max(jnp.abs(x)).astype(jnp.float32) / (limit * 2.0**-headroom_bits))
    # A power of two itself has the mantissa 1/2. The step and its reciprocal stay normal floats.
    exponent = jnp.clip(exponent - (mantissa == 0.5).astype(exponent.dtype), -120, 120)
    levels = round_levels(x.astype(jnp.float32) * fixed_point.power_of_two(-exponent.astype(jnp.float32)))
    return LowBit(jnp.clip(levels, -limit, limit).astype(_STATE_DTYPES[bits]), exponent.astype(jnp.int32))


def _read(x: jax.Array | LowBit) -> jax.Array:
    if not isinstance(x, LowBit):
        return x
    return x.levels.astype(jnp.float32) * fixed_point.power_of_two(x.exponent.astype(jnp.float32))


def _updated(
    u: jax.Array, weights: jax.Array, residual: jax.Array, exponent: jax.Array, words: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights, residual, number of saturations) after one update."""
    unit = fixed_point.power_of_two((RESIDUAL_BITS - exponent).astype(jnp.float32))
    # Beyond 2**20 the master saturates anyway, and integers must not overflow.
    delta = jnp.clip(jnp.round(u.astype(jnp.float32) * unit), -(2.0**20), 2.0**20).astype(jnp.int32)
    held = weights.astype(jnp.int32) << RESIDUAL_BITS
    if words is None:
        exact = held + residual.astype(jnp.int32) + delta
        master = jnp.clip(exact, *_MASTER_RANGE)
        new = (master + 2 ** (RESIDUAL_BITS - 1)) >> RESIDUAL_BITS
        left = master - (new << RESIDUAL_BITS)
    else:
        exact = (held + delta + (words >> (32 - RESIDUAL_BITS)).astype(jnp.int32)) >> RESIDUAL_BITS
        new, left = jnp.clip(exact, -(2**7), 2**7 - 1), jnp.zeros_like(exact)
        master = new
    return new.astype(jnp.int8), left.astype(jnp.int8), jnp.sum(master != exact, dtype=jnp.int32)


def _words(seed: int | None, count: jax.Array, index: int, shape: tuple[int, ...]) -> jax.Array | None:
    """Random words of one array at one step, None without a seed."""
    if seed is None:
        return None
    # Odd multipliers keep steps and arrays apart.
    first = jnp.uint32(seed) + count.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    return rounding.random_words(jnp.stack([first, jnp.uint32(index) * jnp.uint32(0x85EBCA6B) + first]), shape)
