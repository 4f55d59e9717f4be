"""A function's program, rewritten so that its backward pass keeps less: masks, and low-bit activations.

What lies between products is cut at ReLUs and max poolings. Those keep packed masks; the pieces between them, such as a
normalisation with the addition of a shortcut, keep the outputs of products that they start from at low bits.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from nets.jaxpr import Equation, Program, Value, is_relu, join_equations
from nets.saved_activations import LocalFormat, keep_low_bit, masked_max_pool, masked_relu


def keep_less(
    program: Program, masks: Sequence[bool], saved: Sequence[LocalFormat | None], names: Sequence[str]
) -> Program:
    """A program with the same results that keeps less for its backward pass.

    Regions under `jax.checkpoint` keep next to nothing anyway and stay as they are.

    Args:
      program: of `flatten`.
      masks: per product, whether ReLUs and max poolings after it keep packed masks; where `saved` is set they do.
      saved: per product, how what follows it keeps its output, None as it is.
      names: per product, its name, for messages.

    Returns:
      The program, of which the products, the values and their meaning are the same.
    """
    masked = [mask or fmt is not None for mask, fmt in zip(masks, saved, strict=True)]
    equations = _with_masks(program, masked)
    if any(fmt is not None for fmt in saved):
        equations = _with_low_bits(program, equations, saved, names)
    return dataclasses.replace(program, equations=tuple(equations))


def _with_masks(program: Program, masked: Sequence[bool]) -> list[Equation]:
    """ReLUs, max poolings and a ReLU straight before a max pooling replaced by masked ones."""
    readers: dict[Value, list[Equation]] = {}
    for equation in program.equations:
        for value in equation.inputs:
            readers.setdefault(value, []).append(equation)
    merged = set()
    equations = []
    for equation in program.equations:
        is_masked = bool(equation.inputs) and _follows(equation.inputs[0], masked)
        if equation in merged or not is_masked:
            equations += [] if equation in merged else [equation]
        elif is_relu(equation):
            (out,) = equation.outputs
            only = readers.get(out, [])
            if len(only) == 1 and _pool_window(only[0]) and out not in program.outputs:
                merged.add(only[0])
                run = _one(partial(masked_max_pool, window=_pool_window(only[0]), relu=True))
                equation = dataclasses.replace(only[0], primitive="masked_pool", inputs=equation.inputs, run=run)
            else:
                equation = dataclasses.replace(equation, primitive="masked_relu", run=_one(masked_relu))
            equations.append(equation)
        elif window := _pool_window(equation):
            run = _one(partial(masked_max_pool, window=window))
            equations.append(dataclasses.replace(equation, primitive="masked_pool", run=run))
        else:
            equations.append(equation)
    return equations


def _with_low_bits(
    program: Program, equations: Sequence[Equation], saved: Sequence[LocalFormat | None], names: Sequence[str]
) -> list[Equation]:
    """Connected equations between cuts joined into one each, which keeps its inputs at low bits."""
    readers: dict[Value, set[Equation]] = {}
    for equation in equations:
        for value in equation.inputs:
            readers.setdefault(value, set()).add(equation)
    # A stage counts the cuts before: those that end in it come first, then what lies between, in order of execution.
    ordered = []
    for stage, index, piece in _pieces(equations):
        if _is_cut(piece[0]):
            ordered.append((stage, 0, index, piece[0]))
            continue
        members = set(piece)
        written = [value for equation in piece for value in equation.outputs]
        wanted = [v for v in written if v in program.outputs or readers.get(v, members) - members]
        joined = join_equations(piece, wanted, "kept")
        ordered.append((stage, 1, index, _keeping(joined, saved, names) if wanted else joined))
    return [equation for *_, equation in sorted(ordered, key=lambda entry: entry[:3])]


def _pieces(equations: Sequence[Equation]) -> list[tuple[int, int, list[Equation]]]:
    """Cuts, each alone, and connected equations of the same stage: (stage, place of the first, equations)."""
    stage_of: dict[Value, int] = {}
    writer: dict[Value, int] = {}
    stages: list[int] = []
    group = list(range(len(equations)))

    def root(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for index, equation in enumerate(equations):
        is_cut = _is_cut(equation)
        stages.append(max((stage_of.get(value, 0) for value in equation.inputs), default=0) + is_cut)
        for value in equation.inputs:
            other = writer.get(value)
            if not is_cut and other is not None and stages[other] == stages[index] and not _is_cut(equations[other]):
                first, second = sorted((root(other), root(index)))
                group[second] = first
        stage_of.update(dict.fromkeys(equation.outputs, stages[index]))
        writer.update(dict.fromkeys(equation.outputs, index))
    members: dict[int, list[Equation]] = {}
    for index, equation in enumerate(equations):
        members.setdefault(root(index), []).append(equation)
    return [(stages[first], first, piece) for first, piece in members.items()]


def _is_cut(equation: Equation) -> bool:
    """Whether an equation stays by itself: it holds a product, or has a backward rule that keeps little."""
    return (
        equation.product is not None
        or bool(equation.body)
        or equation.primitive in ("masked_relu", "masked_pool", "reduce_window_max")
    )


def _keeping(joined: Equation, saved: Sequence[LocalFormat | None], names: Sequence[str]) -> Equation:
    """An equation that keeps the outputs of products among its inputs at low bits."""
    formats = [
        None
        if value.path is not None or value.producer is None or not jnp.issubdtype(value.dtype, jnp.floating)
        else saved[value.producer]
        for value in joined.inputs
    ]
    if not any(formats):
        return joined
    layers = sorted({names[value.producer] for value in joined.inputs if value.producer is not None})

    def run(*arrays: Any) -> Sequence[Any]:
        try:
            return keep_low_bit(joined.run, formats)(*arrays)
        except ValueError as error:
            raise ValueError(f"{error} (in what is saved of the output of {', '.join(layers)})") from error

    return dataclasses.replace(joined, run=run)


def _follows(value: Value, chosen: Sequence[bool]) -> bool:
    return value.path is None and value.producer is not None and chosen[value.producer]


def _pool_window(equation: Equation) -> tuple[int, ...] | None:
    """The window of a max pooling over windows side by side, None for any other equation."""
    if equation.primitive != "reduce_window_max":
        return None
    params = equation.params
    window = tuple(params["window_dimensions"])
    dilations = (*params["base_dilation"], *params["window_dilation"])
    plain = all(d == 1 for d in dilations) and all(pair == (0, 0) for pair in map(tuple, params["padding"]))
    return window if plain and tuple(params["window_strides"]) == window else None


def _one(fn: Callable) -> Callable[..., Sequence[Any]]:
    """`fn` as the `run` of an equation with one result."""
    return lambda *arrays: [fn(*arrays)]
