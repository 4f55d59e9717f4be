"""What follows a decomposed product channel by channel, merged into its FP16 dequantiser.

A bias, a batch normalisation with frozen statistics, or any chain of additions and multiplications by what does not
depend on the product is y = a x + c. A chip multiplies and adds once per output for all of it.
"""

import dataclasses
import operator
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nets.decomposed import dequantise_fp16
from nets.jaxpr import Equation, Program, Value

_AFFINE = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


@dataclasses.dataclass(frozen=True)
class _Link:
    """One equation of a chain: its operation, its other operand, and whether the running value comes first."""

    equation: Equation
    other: Value
    is_first: bool

    def apply(self, x: Any, other: Any) -> Any:
        """What the equation computes."""
        operation = _AFFINE[self.equation.primitive]
        return operation(x, other) if self.is_first else operation(other, x)

    def extend(self, factor: Any, term: Any, other: Any) -> tuple[Any, Any]:
        """(a, c) of a x + c after it, from those before."""
        if self.equation.primitive in ("mul", "div"):
            return self.apply(factor, other), self.apply(term, other)
        sign = -1.0 if self.equation.primitive == "sub" and not self.is_first else 1.0
        return sign * factor, self.apply(term, other)


def merge_dequantisers(program: Program, merged: Sequence[bool]) -> Program:
    """A program in which chosen products are followed by their dequantiser, and by nothing that it can do.

    Args:
      program: of `flatten`.
      merged: per product, whether it leaves its result to a dequantiser.

    Returns:
      The program. The forward pass is that of `dequantise_fp16`; the backward pass that of what it stands for, as if
      it did not round.
    """
    equations = _merged(program.equations, merged, program.outputs)
    return dataclasses.replace(program, equations=tuple(equations))


def _merged(equations: Sequence[Equation], merged: Sequence[bool], outputs: Sequence[Value]) -> list[Equation]:
    readers: dict[Value, list[Equation]] = {}
    for equation in equations:
        for value in equation.inputs:
            readers.setdefault(value, []).append(equation)
    sums: dict[Equation, Value] = {}
    dequantisers: dict[Equation, Equation] = {}  # by the last equation that each stands for
    gone: set[Equation] = set()
    for equation in equations:
        if equation.product is None or not merged[equation.product]:
            continue
        (result,) = equation.outputs
        chain = _affine_chain(equation.product, result, readers, outputs)
        last = chain[-1].equation if chain else equation
        sums[equation] = dataclasses.replace(result)
        dequantisers[last] = _dequantiser(sums[equation], chain, last.outputs)
        gone.update(link.equation for link in chain)
    rewritten = []
    for equation in equations:
        if equation in sums:
            rewritten.append(dataclasses.replace(equation, outputs=(sums[equation],)))
        elif equation.body:
            body = _merged(equation.body, merged, equation.outputs)
            rewritten.append(dataclasses.replace(equation, body=tuple(body)))
        elif equation not in gone:
            rewritten.append(equation)
        if equation in dequantisers:
            rewritten.append(dequantisers[equation])
    return rewritten


def _affine_chain(
    product: int, x: Value, readers: dict[Value, list[Equation]], outputs: Collection[Value]
) -> list[_Link]:
    """The longest chain from a product's result `x` in which nothing else reads what lies between."""
    chain: list[_Link] = []
    while x not in outputs and len(readers.get(x, ())) == 1:
        (equation,) = readers[x]
        link = _link(equation, x, product)
        if link is None:
            break
        chain.append(link)
        (x,) = equation.outputs
    return chain


def _link(equation: Equation, x: Value, product: int) -> _Link | None:
    """An equation as part of a chain, None if it is not affine in x, channel by channel."""
    if equation.primitive not in _AFFINE:
        return None
    is_first = equation.inputs[0] is x
    other = equation.inputs[is_first]
    depends = other.producer is not None and other.producer >= product
    by_channel = sum(size > 1 for size in other.shape) <= 1 and equation.outputs[0].shape == x.shape
    divides = equation.primitive == "div" and not is_first
    return _Link(equation, other, is_first) if by_channel and not depends and not divides else None


def _dequantiser(raw: Value, chain: Sequence[_Link], outputs: tuple[Value, ...]) -> Equation:
    """An equation from a product's sums to the end of the chain after it."""
    inputs = (raw, *(link.other for link in chain))

    def simulated(x: jax.Array, *others: Any) -> jax.Array:
        for link, other in zip(chain, others, strict=True):
            x = link.apply(x, other)
        return x

    @jax.custom_jvp
    def dequantised(x: jax.Array, *others: Any) -> jax.Array:
        factor, term = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
        for link, other in zip(chain, others, strict=True):
            factor, term = link.extend(factor, term, other)
        return dequantise_fp16(x, factor, term if chain else None).astype(outputs[0].dtype)

    @dequantised.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        _, tangent = jax.jvp(simulated, primals, tangents)
        return dequantised(*primals), tangent

    return Equation("dequantiser", inputs, outputs, {}, None, (), lambda *arrays: [dequantised(*arrays)])
