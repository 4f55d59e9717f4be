"""`quantize`: any JAX function to its quantised twin."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nets import ops
from nets.decomposed import Decomposed
from nets.feedback import ErrorBus
from nets.jaxpr import Product, Program, interpret, parameter_paths
from nets.merging import merge_dequantisers
from nets.precision import Precision, QuantState
from nets.rewriting import keep_less
from nets.rounding import GENERATORS


def quantize(fn: Callable, *, stochastic: bool = True, generator: str = "hash") -> Callable:
    """The quantised twin of `fn(params, *args)`.

    Every product of `fn` gets the operand formats of its row of `precision` and, in the backward pass, error formats
    of its own for input_grad and weight_grad; what its rule says about multipliers, masks and saved activations is
    done as well. Everything else stays as it is. Widths, steps and ranges are arrays: changing them compiles nothing
    anew. Frozen parameters get zero gradients; an optimiser with weight decay must be masked for them, too.

    Args:
      fn: function of `(params, *args)`; its `args` may hold batch statistics, dropout keys and data, its result may
        be any pytree of arrays.
      stochastic: round errors stochastically, which is unbiased; otherwise to nearest, which loses small gradients.
      generator: of the random words: "hash", an integer hash of each element's position, or "jax", JAX's own, which
        takes longer.

    Returns:
      `qfn(params, precision, quant_state, key, *args)` with the result of `fn`. `key` seeds stochastic rounding: use
      a fresh one at every step, or None where no gradient is taken. Differentiate with respect to `quant_state` too:
      that cotangent carries the statistics of the backward pass to `QuantState.updated`.

    Examples:
      A training step, with any optimiser for `params` and `precision`:

      >>> from nets import LayerRule, PrecisionRules, init_precision
      >>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["out"]["kernel"]
      >>> params = {"hidden": {"kernel": jnp.ones((4, 3))}, "out": {"kernel": jnp.ones((3, 2))}}
      >>> x, key = jnp.ones((8, 4)), jax.random.key(0)
      >>> precision, quant_state = init_precision(fn, PrecisionRules({"*": LayerRule()}), params, x)
      >>> qfn = quantize(fn)
      >>> loss = lambda *trees: jnp.mean(qfn(*trees, key, x) ** 2)
      >>> gradients = jax.grad(loss, argnums=(0, 1, 2))(params, precision, quant_state)
      >>> descend = lambda value, slope: value - 0.01 * slope
      >>> params, precision = jax.tree.map(descend, (params, precision), gradients[:2])
      >>> quant_state = quant_state.updated(gradients[2])
      >>> print(precision.names, precision.bits().shape)
      ('hidden', 'out') (2, 4)

    Raises:
      ValueError: for an unknown generator; when `qfn` is called, if `fn` holds a product that `precision` was not
        initialised for, or one inside a primitive that cannot be entered; when it is differentiated, if errors are to
        be rounded stochastically without a key, or a local region does not divide what is saved.
    """
    if generator not in GENERATORS:
        raise ValueError(f"expected a generator among {', '.join(GENERATORS)}, got {generator!r}; choose one of them")

    def quantized(params: Any, precision: Precision, quant_state: QuantState, key: jax.Array | None, *args: Any) -> Any:
        num_products = len(precision.names)
        params = _without_gradient(params, precision.frozen_params)
        errors = ErrorBus()
        rows = {name: row for row, name in enumerate(precision.names)}
        point_key = None if key is None else jax.random.fold_in(key, 1)
        formats = _rows(precision.formats(quant_state, point_key), num_products)
        probes = _rows(quant_state.probes, num_products)
        seeds = (
            [None] * num_products if key is None else jnp.unstack(jax.random.bits(key, (num_products, 2), jnp.uint32))
        )

        def on_product(_: int, product: Product, lhs: jax.Array, rhs: jax.Array, __: Callable) -> jax.Array:
            row = rows[product.name]
            frozen = product.param_path in precision.frozen_params
            spec = ops.Spec(
                product,
                precision.signed[row],
                precision.trains(row),
                stochastic,
                precision.rule(row),
                frozen,
                generator,
            )
            traced = [lhs, rhs, formats[row], probes[row]]
            if precision.frozen_params and not product.needs_input_grad:
                # Nothing below is trained: errors end here, and a layer that is frozen itself has no backward pass.
                stopped = range(4) if frozen else [1 - product.weights_operand]
                for place in stopped:
                    traced[place] = lax.stop_gradient(traced[place])
            if spec.rule.direct_feedback:
                place = 1 - product.weights_operand
                traced[place] = errors.receive(product, traced[place])
            return errors.send(product, ops.quantised_product(spec, *traced[:3], seeds[row], traced[3]))

        rewrite = partial(_as_ruled, precision=precision, errors=errors)
        return interpret(fn, on_product, rewrite=rewrite, frozen=precision.frozen_params)(params, *args)

    return quantized


def _as_ruled(program: Program, precision: Precision, errors: ErrorBus) -> Program:
    """A program in which what surrounds the products is as their rules have it: dequantisers, masks, what is saved."""
    names = [product.name for product in program.products]
    for name in names:
        if name not in precision.names:
            raise ValueError(
                f"expected a function whose products are {', '.join(precision.names)}, got one with a product {name!r}; "
                f"call init_precision with this function"
            )
    rules = [precision.rule(precision.names.index(name)) for name in names]
    if any(rule.direct_feedback for rule in rules):
        errors.connect(program)
    merged = [isinstance(rule.multiplier, Decomposed) and rule.multiplier.merge for rule in rules]
    if any(merged):
        program = merge_dequantisers(program, merged)
    if any(rule.masks or rule.saved for rule in rules):
        program = keep_less(program, [rule.masks for rule in rules], [rule.saved for rule in rules], names)
    return program


def _without_gradient(params: Any, paths: tuple[str, ...]) -> Any:
    """The same parameters, those at `paths` constant."""
    leaves, structure = jax.tree.flatten(params)
    held = [
        lax.stop_gradient(leaf) if path in paths else leaf
        for path, leaf in zip(parameter_paths(params), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, held)


def _rows(tree: Any, num_rows: int) -> list[Any]:
    """A pytree of arrays with a leading axis as a list of pytrees without it."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [jnp.unstack(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [column[row] for column in columns]) for row in range(num_rows)]
