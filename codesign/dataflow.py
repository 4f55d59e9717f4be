"""What lies between the products of a program: chains of element-wise work, and what their backward passes need.

A *chain* is all work of the vector unit that leads to one operand of a product or to the results. It is fused: it
reads values that products, arguments or earlier chains have made and writes what others need of it. A reduction
(mean, variance, softmax) is a barrier: what is read before and again after it is read twice. Reshapes, transpositions
and casts are *views*: they move nothing, and a view is the value that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import jax.numpy as jnp

from nets.jaxpr import Equation, Program, Value

_VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "name", "optimization_barrier",
    "reduce_precision", "reshape", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_SELECTIONS = {"dynamic_slice", "gather", "slice"}  # read no more than they give
_MOVES = {"broadcast_in_dim", "concatenate", "iota", "pad", "rev", "split", *_SELECTIONS}
_BARRIERS = {"argmax", "argmin", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}
# What the backward pass of a primitive needs: nothing; a bit per element, which side of a comparison won; the place of
# the winner in a window. That of all others needs their inputs.
_LINEAR = {"add", "add_any", "cumsum", "neg", "reduce_sum", "reduce_window_sum", "sub", *_MOVES, *_VIEWS}
_COMPARING = {"abs", "clamp", "max", "min", "select_n", "sign"}
_WINDOWED = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}


@dataclass(frozen=True)
class Use:
    """A value where it is used.

    Attributes:
      value: the value, never a view.
      varies: whether a gradient flows back from there.
    """

    value: Value
    varies: bool


@dataclass(eq=False)
class Chain:
    """Element-wise work between products.

    Attributes:
      name: what it makes: "conv2/inputs", "conv2/weights" or "results".
      reads: elements read of each value that others have made.
      varying: those of them that a gradient flows back to.
      writes: values that others need.
      num_ops: element operations: for each equation, the elements of its largest array.
      num_sweeps: passes over its inputs, one more for each barrier in a row.
      mask_bits: what its backward pass needs where all else is linear: a bit for each result of a ReLU, log2 of the
        window for each maximum. A ReLU before a pooling keeps its mask at the pooled size: all other errors are zero.
      recalled: if something else is not linear, the values that are kept, for its backward pass to recompute it.
    """

    name: str
    reads: dict[Value, int] = field(default_factory=dict)
    varying: set[Value] = field(default_factory=set)
    writes: list[Value] = field(default_factory=list)
    num_ops: int = 0
    num_sweeps: int = 1
    mask_bits: int = 0
    recalled: set[Value] = field(default_factory=set)


@dataclass(frozen=True)
class Dataflow:
    """A program as products and chains.

    Attributes:
      nodes: in order of execution, each a `Chain` or the index of a product.
      operands: weights and inputs of each product.
      results: of each product.
      outputs: of the program.
      varying: values that depend on what is trained and that a result depends on: those with a gradient.
    """

    nodes: tuple[Chain | int, ...]
    operands: tuple[tuple[Use, Use], ...]
    results: tuple[Value, ...]
    outputs: tuple[Use, ...]
    varying: Collection[Value]


def follow(program: Program, trained: Collection[Value]) -> Dataflow:
    """The products and chains of a program.

    Args:
      program: from `flatten` with `enter_calls`.
      trained: which of its parameters are trained.
    """
    return _Follower(program, trained).dataflow()


def _varying(program: Program, trained: Collection[Value]) -> set[Value]:
    """The values with a gradient."""
    equations = [equation for equation in program.walk() if equation.primitive != "stop_gradient"]
    dependent, needed = set(trained), set(program.outputs)
    for equation in equations:
        if not dependent.isdisjoint(equation.inputs):
            dependent.update(v for v in equation.outputs if jnp.issubdtype(v.dtype, jnp.floating))
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.outputs):
            needed.update(equation.inputs)
    return dependent & needed


class _Follower:
    """Assigns every equation but products and views to the first chain that needs it."""

    def __init__(self, program: Program, trained: Collection[Value]) -> None:
        self._program = program
        self._varying = _varying(program, trained)
        self._origins: dict[Value, Value] = {}
        self._equations: list[Equation] = []
        self._maker: dict[Value, int] = {}
        self._users: dict[Value, list[Equation]] = {}
        self._chain_of: dict[int, Chain] = {}
        for equation in program.walk():
            self._add(equation)

    def _add(self, equation: Equation) -> None:
        if equation.primitive in _VIEWS and equation.inputs[0].size == equation.outputs[0].size:
            self._origins |= zip(equation.outputs, map(self._origin, equation.inputs), strict=True)
            return
        self._maker |= dict.fromkeys(equation.outputs, len(self._equations))
        self._equations.append(equation)
        for value in equation.inputs:
            self._users.setdefault(self._origin(value), []).append(equation)

    def dataflow(self) -> Dataflow:
        nodes: list[Chain | int] = []
        operands, results = [], []
        for equation in self._equations:
            if equation.product is not None:
                product = self._program.products[equation.product]
                sides = equation.inputs if product.weights_operand == 0 else equation.inputs[::-1]
                for role, value in zip(("weights", "inputs"), sides, strict=True):
                    nodes += self._chain(f"{product.name}/{role}", [value])
                nodes.append(equation.product)
                operands.append((self._use(sides[0]), self._use(sides[1])))
                results.append(equation.outputs[0])
        nodes += self._chain("results", self._program.outputs)
        outputs = tuple(map(self._use, self._program.outputs))
        return Dataflow(tuple(nodes), tuple(operands), tuple(results), outputs, self._varying)

    def _origin(self, value: Value) -> Value:
        """What a view shows; any other value is its own origin."""
        return self._origins.get(value, value)

    def _use(self, value: Value) -> Use:
        """Notes that something outside of a value's chain needs it."""
        origin = self._origin(value)
        chain = self._chain_of.get(self._maker.get(origin, -1))
        if chain is not None and origin not in chain.writes:
            chain.writes.append(origin)
        return Use(origin, value in self._varying)

    def _chain(self, name: str, targets: Iterable[Value]) -> list[Chain]:
        """The chain of all equations behind the targets that no other chain has; none if there are none."""
        pending, indices = [self._origin(v) for v in targets], set()
        while pending:
            index = self._maker.get(pending.pop())
            if index is None or index in self._chain_of or index in indices:
                continue
            equation = self._equations[index]
            if equation.product is None:
                indices.add(index)
                pending += map(self._origin, equation.inputs)
        chain = Chain(name)
        self._chain_of |= dict.fromkeys(indices, chain)
        equations = [self._equations[i] for i in sorted(indices)]
        self._fill(chain, equations)
        self._differentiate(chain, equations)
        return [chain] if indices else []

    def _fill(self, chain: Chain, equations: list[Equation]) -> None:
        """What the forward pass of a chain reads and does."""
        sweep: dict[Value, int] = {}  # during which pass over its inputs a value of the chain is known
        reads: dict[Value, dict[int, int]] = {}
        for equation in equations:
            inputs = [self._origin(v) for v in equation.inputs if v.constant is None or v.size > 1]
            now = max((sweep.get(v, 0) for v in inputs), default=0)
            for value in inputs:
                if value not in sweep:
                    taken = equation.outputs[0].size if equation.primitive in _SELECTIONS else value.size
                    elements = reads.setdefault(value, {})
                    elements[now] = max(elements.get(now, 0), min(taken, value.size))
                    self._use(value)
            sweep |= dict.fromkeys(equation.outputs, now + (equation.primitive in _BARRIERS))
            if equation.primitive not in _MOVES | _VIEWS:
                chain.num_ops += max(v.size for v in (*equation.inputs, *equation.outputs))
        chain.reads = {value: sum(elements.values()) for value, elements in reads.items()}
        chain.num_sweeps = max((len(elements) for elements in reads.values()), default=1)

    def _differentiate(self, chain: Chain, equations: list[Equation]) -> None:
        """What the backward pass of a chain needs."""
        varying = [
            equation
            for equation in equations
            if not self._varying.isdisjoint(equation.inputs) and not self._varying.isdisjoint(equation.outputs)
        ]
        gradients = {self._origin(v) for equation in varying for v in equation.inputs if v in self._varying}
        chain.varying = gradients & chain.reads.keys()
        chain.mask_bits = sum(self._mask_bits(e) for e in varying if e.primitive in _COMPARING | _WINDOWED)
        if all(self._is_linear(e) for e in varying if e.primitive not in _COMPARING | _WINDOWED):
            return
        needed: set[Value] = set()
        for equation in reversed(equations):
            if equation in varying or not needed.isdisjoint(equation.outputs):
                needed.update(map(self._origin, equation.inputs))
        chain.recalled = needed & chain.reads.keys()

    def _mask_bits(self, equation: Equation) -> int:
        """Bits that the backward pass of a comparison needs."""
        (out, *_), primitive = equation.outputs, equation.primitive
        if primitive in _WINDOWED:
            window = equation.params.get("window_dimensions", (equation.inputs[0].size // out.size,))
            return out.size * math.ceil(math.log2(math.prod(window)))
        users = self._users.get(out, [])
        is_pooled = len(users) == 1 and users[0].primitive in _WINDOWED
        return users[0].outputs[0].size if is_pooled else out.size

    def _is_linear(self, equation: Equation) -> bool:
        """Whether its backward pass needs no value but what can be had again from arguments and parameters."""
        if equation.primitive in ("mul", "div"):
            scales = equation.inputs[1:] if equation.primitive == "div" else equation.inputs
            return any(v not in self._varying and v.producer is None for v in scales)
        return equation.primitive in _LINEAR
