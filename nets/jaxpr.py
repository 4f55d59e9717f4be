"""The one walker of jaxprs: finds the products of a function, names them, and re-evaluates the function around them.

A *product* is a `dot_general` or `conv_general_dilated` of two floating-point operands. `flatten` turns a function
into a `Program`: its forward equations in order of execution, with the calls that hold products entered (`jit`,
`custom_jvp`, `custom_vjp`, `checkpoint`), `scan` and `cond` with products in plain code (`nets.unrolling`), and all
others left whole, so that a ReLU keeps its own differentiation rule.
Everything else is a loop over that list: `find_products` reads the products, `interpret` re-evaluates the function and
hands each product to a callback, and cost tracing follows tensors from equation to equation.

Only this file touches `jax.extend.core`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from nets.unrolling import UNROLLED, unrolled

_KINDS = {"dot_general": "dot", "conv_general_dilated": "conv"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_CHECKPOINTS = {"checkpoint", "remat", "remat2"}


@dataclass(frozen=True, eq=False)
class Value:
    """One array of a `Program`, compared by identity.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      path: None if it depends on data, that is on any argument but the first. Otherwise the path of the parameter it is
        computed from, such as "conv1/kernel" (of several, that of the largest input), or "" if it is a constant.
      trained: whether it depends on a parameter that is trained, possibly among others.
      producer: index of the latest product it depends on, None if there is none.
      constant: the array itself if the program closes over it, else None.
    """

    shape: tuple[int, ...]
    dtype: Any
    path: str | None = None
    trained: bool = False
    producer: int | None = None
    constant: Any = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Product:
    """Static description of one product.

    Attributes:
      name: unique name: the path of the layer whose parameter feeds it ("conv1" for "conv1/kernel", "conv1_2" at its
        second use); without a parameter, the path that its operands' sources share, or else the last one before it,
        and its kind ("attention/dot").
      kind: "dot" (`dot_general`) or "conv" (`conv_general_dilated`).
      param_path: path of the parameter on its weights side, None if it has none.
      weights_operand: 0 if lhs is the weights side, 1 if rhs is (also where no operand comes from a parameter).
      needs_input_grad: whether its inputs depend on a trained parameter, so that training has to pass the error on to
        them.
      lhs_shape, rhs_shape, out_shape: shapes of its operands and its result.
      dtype: dtype of its result.
      params: the primitive's parameters: dimension numbers, strides, padding, dilation, groups, precision.
    """

    name: str
    kind: str
    param_path: str | None
    weights_operand: int
    needs_input_grad: bool
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: Any
    params: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, eq=False)
class Equation:
    """One equation of a `Program`.

    Attributes:
      primitive: name of the primitive, such as "add".
      inputs, outputs: the values it reads and writes.
      params: the primitive's parameters.
      product: index into `Program.products`, None if it is not a product.
      body: for a `checkpoint` that holds products the equations inside, which read and write the values of the program
        around it; empty for every other equation.
      run: evaluates it, `run(*arrays of inputs) -> arrays of outputs`; not used where there is a body.
    """

    primitive: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    product: int | None
    body: tuple["Equation", ...]
    run: Callable[..., Sequence[Any]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Program:
    """A function as a list of equations.

    Attributes:
      parameters: leaves of its first argument, in the order of `jax.tree.leaves`; each has its `path`.
      arguments: leaves of its further arguments.
      outputs: leaves of its result.
      output_tree: tree structure of its result.
      equations: in order of execution.
      products: in order of execution.
    """

    parameters: tuple[Value, ...]
    arguments: tuple[Value, ...]
    outputs: tuple[Value, ...]
    output_tree: Any
    equations: tuple[Equation, ...]
    products: tuple[Product, ...]

    def walk(self) -> Iterator[Equation]:
        """All equations in order of execution, those inside a `checkpoint` in its place."""
        pending = list(reversed(self.equations))
        while pending:
            equation = pending.pop()
            if equation.body:
                pending += reversed(equation.body)
            else:
                yield equation


def flatten(fn: Callable, params: Any, *args: Any, enter_calls: bool = False, frozen: Collection[str] = ()) -> Program:
    """Traces `fn(params, *args)` into a `Program`.

    Args:
      fn: a JAX function of arrays; static arguments must be closed over.
      params: pytree of its parameters, arrays or `jax.ShapeDtypeStruct`; its key paths name the products.
      *args: pytrees of its further arguments, likewise.
      enter_calls: enter every call, whether it holds products or not, so that the element-wise work of a ReLU or a
        softmax is seen. Such a program is for reading: calls lose their own differentiation rules.
      frozen: paths of parameters that are not trained.

    Returns:
      The program. To follow a tensor, follow a `Value` from the equation that has it among its outputs to those that
      have it among their inputs. A call without products (a ReLU, a softmax) is one equation, its jaxpr in `params`.

    Raises:
      ValueError: if a product sits inside a primitive that cannot be entered, such as `while`, or in a long `scan`.
    """
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    paths = parameter_paths(params)
    variables = closed.jaxpr.invars
    parameters = [
        _value(variable, path, trained=path not in frozen) for variable, path in zip(variables, paths, strict=False)
    ]
    arguments = [_value(variable) for variable in variables[len(paths) :]]
    flattener = _Flattener(enter_calls)
    outputs, equations = flattener.inline(closed, parameters + arguments)
    tree = jax.tree.structure(out_shape)
    return Program(
        tuple(parameters), tuple(arguments), tuple(outputs), tree, tuple(equations), tuple(flattener.products)
    )


def parameter_paths(params: Any) -> tuple[str, ...]:
    """Paths such as "conv1/kernel" of the leaves of a pytree of parameters, in the order of `jax.tree.leaves`."""
    return tuple(_path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def find_products(fn: Callable, params: Any, *args: Any, frozen: Collection[str] = ()) -> tuple[Product, ...]:
    """Every product of `fn(params, *args)`, in order of execution.

    Args:
      fn, params, args, frozen: as for `flatten`.

    Returns:
      Static descriptions, with unique names.

    Raises:
      ValueError: as `flatten`.
    """
    return flatten(fn, params, *args, frozen=frozen).products


def is_relu(equation: Equation) -> bool:
    """Whether an equation is `jax.nn.relu`: a maximum with zero under the derivative rule of that name."""
    if equation.primitive != "custom_jvp_call" or equation.params.get("name", "relu") != "relu":
        return False
    body = equation.params["call_jaxpr"].jaxpr
    while len(body.eqns) == 1 and body.eqns[0].primitive.name in _CALLS:
        body = body.eqns[0].params["jaxpr"].jaxpr
    if [eqn.primitive.name for eqn in body.eqns] != ["max"]:
        return False
    bounds = [atom for atom in body.eqns[0].invars if isinstance(atom, jex.Literal)]
    return len(bounds) == 1 and float(bounds[0].val) == 0.0


def join_equations(equations: Sequence[Equation], wanted: Iterable[Value], primitive: str) -> Equation:
    """One equation that evaluates several, none of them a product.

    Args:
      equations: in order of execution.
      wanted: values that are read elsewhere.
      primitive: a name for it.

    Returns:
      The equation; it reads what the others read and none of them writes, and writes what is wanted.
    """
    written = dict.fromkeys(value for equation in equations for value in equation.outputs)
    read = dict.fromkeys(value for equation in equations for value in equation.inputs)
    inputs = tuple(value for value in read if value not in written and value.constant is None)
    wanted = frozenset(wanted)
    outputs = tuple(value for value in written if value in wanted)

    def run(*arrays: Any) -> list[Any]:
        env = dict(zip(inputs, arrays, strict=True))
        _evaluate(equations, (), _no_products, env)
        return [_read(env, value) for value in outputs]

    return Equation(primitive, inputs, outputs, {}, None, (), run)


def _no_products(*_: Any) -> Any:
    raise AssertionError("expected equations without products")


def interpret(
    fn: Callable,
    on_product: Callable,
    keep_checkpoints: bool = True,
    rewrite: Callable[[Program], Program] = lambda program: program,
    frozen: Collection[str] = (),
) -> Callable:
    """`fn` with its products evaluated by a callback.

    Args:
      fn: function of `(params, *args)`, as for `flatten`.
      on_product: called as `on_product(index, product, lhs, rhs, default_fn)` for every product in order of execution;
        returns its result, in the shape and dtype of `default_fn(lhs, rhs)`, which evaluates the product as it stands.
      keep_checkpoints: evaluate regions under `jax.checkpoint` under it again. Without, `on_product` may keep what it
        sees, and everything is saved for the backward pass.
      rewrite: applied to the program before it is evaluated; it keeps parameters, arguments, products and outputs.
      frozen: paths of parameters that are not trained.

    Returns:
      A function of the same arguments with the same result. It works under `jit`, `grad` and `vmap`; calls without
      products keep their differentiation rules.

    Raises:
      ValueError: as `flatten`, when called.
    """

    def interpreted(params: Any, *args: Any) -> Any:
        program = rewrite(flatten(fn, params, *args, frozen=frozen))
        env = dict(zip(program.parameters + program.arguments, jax.tree.leaves((params, args)), strict=True))
        equations = program.equations if keep_checkpoints else tuple(program.walk())
        _evaluate(equations, program.products, on_product, env)
        return jax.tree.unflatten(program.output_tree, [_read(env, value) for value in program.outputs])

    return interpreted


def used_inputs(fn: Callable, *args: Any) -> tuple[bool, ...]:
    """Which arguments the result of a function depends on, as its jaxpr has it.

    Args:
      fn: a function of pytrees of arrays.
      *args: arrays or `jax.ShapeDtypeStruct`.

    Returns:
      One entry per leaf of `args`. An argument of a call counts as used if any result of the call is.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    live = {variable for variable in jaxpr.outvars if not isinstance(variable, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not live.isdisjoint(eqn.outvars):
            live.update(variable for variable in eqn.invars if not isinstance(variable, jex.Literal))
    return tuple(variable in live for variable in jaxpr.invars)


def _evaluate(equations: Sequence[Equation], products: Sequence[Product], on_product: Callable, env: dict) -> None:
    """Evaluates `equations` in order, adding the arrays of their outputs to `env`."""
    for equation in equations:
        inputs = [_read(env, value) for value in equation.inputs]
        outputs: Sequence[Any]
        if equation.product is not None:
            product = products[equation.product]
            outputs = [on_product(equation.product, product, *inputs, lambda *xs, run=equation.run: run(*xs)[0])]
        elif equation.body:
            outputs = _evaluate_checkpoint(equation, products, on_product, inputs)
        else:
            outputs = equation.run(*inputs)
        env.update(zip(equation.outputs, outputs, strict=True))


def _evaluate_checkpoint(
    equation: Equation, products: Sequence[Product], on_product: Callable, inputs: Sequence[Any]
) -> Sequence[Any]:
    """Evaluates a `checkpoint` that holds products, as a `checkpoint` again."""

    def region(*arrays: Any) -> list[Any]:
        env = dict(zip(equation.inputs, arrays, strict=True))
        _evaluate(equation.body, products, on_product, env)
        return [_read(env, value) for value in equation.outputs]

    params = equation.params
    return jax.checkpoint(region, prevent_cse=params["prevent_cse"], policy=params["policy"])(*inputs)


class _Flattener:
    """Builds the equations of a program, and finds and names its products."""

    def __init__(self, enter_calls: bool) -> None:
        self.enter_calls = enter_calls
        self.products: list[Product] = []
        self._scopes: list[str] = []

    def inline(self, closed: Any, inputs: Sequence[Value]) -> tuple[tuple[Value, ...], list[Equation]]:
        """Outputs and equations of a (closed) jaxpr at `inputs`, with calls that hold products entered."""
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env |= {var: _value(var, "", constant=const) for var, const in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> Value:
            return _value(atom, "", constant=atom.val) if isinstance(atom, jex.Literal) else env[atom]

        equations: list[Equation] = []
        for eqn in jaxpr.eqns:
            operands = tuple(map(read, eqn.invars))
            enter = _holds_product(eqn) or (self.enter_calls and eqn.primitive.name in _CALLS | _CHECKPOINTS)
            outputs, added = (self._enter if enter else self._keep)(eqn, operands, _runner(jaxpr, eqn))
            env.update(zip(eqn.outvars, outputs, strict=True))
            equations += added
        return tuple(map(read, jaxpr.outvars)), equations

    def _enter(
        self, eqn: jex.JaxprEqn, inputs: tuple[Value, ...], run: Callable
    ) -> tuple[tuple[Value, ...], list[Equation]]:
        """Outputs of a call that holds products, and the equations that stand for it."""
        name = eqn.primitive.name
        if name in UNROLLED:
            plain = unrolled(eqn, lambda inner: jex.jaxpr_as_fun(_closed(inner)))
            return self.inline(jax.make_jaxpr(plain)(*map(_shape_of, eqn.invars)), inputs)
        if name not in _CALLS | _CHECKPOINTS:
            raise ValueError(
                f"expected products in plain code, jit, custom_jvp, custom_vjp, checkpoint, scan or cond, got one "
                f"inside {name!r}; write it as a Python loop or a scan"
            )
        outputs, body = self.inline(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"], inputs)
        if name in _CALLS:
            return outputs, body
        return outputs, [Equation(name, inputs, outputs, eqn.params, None, tuple(body), run)]

    def _keep(
        self, eqn: jex.JaxprEqn, inputs: tuple[Value, ...], run: Callable
    ) -> tuple[tuple[Value, ...], list[Equation]]:
        """Outputs of an equation that is kept whole, and that equation."""
        product = self._add(eqn, *inputs) if _is_product(eqn) else None
        producers = [v.producer for v in inputs if v.producer is not None]
        producer = max(producers, default=None) if product is None else product
        path = _joint_path(inputs)
        trained = any(v.trained for v in inputs)
        outputs = tuple(_value(var, path, trained, producer) for var in eqn.outvars)
        return outputs, [Equation(eqn.primitive.name, inputs, outputs, eqn.params, product, (), run)]

    def _add(self, eqn: jex.JaxprEqn, lhs: Value, rhs: Value) -> int:
        """Records a product and returns its index."""
        kind = _KINDS[eqn.primitive.name]
        # A parameter before a constant before data; rhs where they are alike.
        weights_operand = int(max((rhs, lhs), key=lambda v: (v.path is not None, bool(v.path))) is rhs)
        path = (lhs, rhs)[weights_operand].path or None
        scope = self._shared_scope(lhs, rhs) if path is None else path.rpartition("/")[0] or path
        name = f"{scope}/{kind}".lstrip("/") if path is None else scope
        out = _value(eqn.outvars[0])
        self._scopes.append(scope)
        product = Product(
            name=self._unique(name),
            kind=kind,
            param_path=path,
            weights_operand=weights_operand,
            needs_input_grad=(rhs, lhs)[weights_operand].trained,
            lhs_shape=lhs.shape,
            rhs_shape=rhs.shape,
            out_shape=out.shape,
            dtype=out.dtype,
            params=dict(eqn.params),
        )
        self.products.append(product)
        return len(self.products) - 1

    def _shared_scope(self, lhs: Value, rhs: Value) -> str:
        """Where a product without parameter belongs."""
        sources = [self._scopes[v.producer].split("/") for v in (lhs, rhs) if v.producer is not None]
        shared: list[str] = []
        for parts in zip(*sources, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        return "/".join(shared) or (self._scopes[-1] if self._scopes else "")

    def _unique(self, name: str) -> str:
        taken = {product.name for product in self.products}
        count, unique = 1, name
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        return unique


def _value(
    atom: Any, path: str | None = None, trained: bool = False, producer: int | None = None, constant: Any = None
) -> Value:
    return Value(atom.aval.shape, atom.aval.dtype, path, trained, producer, constant)


def _closed(jaxpr: Any) -> jex.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def _shape_of(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype, weak_type=atom.aval.weak_type)


def _read(env: dict[Value, Any], value: Value) -> Any:
    return env[value] if value.constant is None else value.constant


def _joint_path(inputs: Sequence[Value]) -> str | None:
    """`Value.path` of what is computed from `inputs`."""
    paths = []
    for value in sorted(inputs, key=lambda v: -v.size):
        if value.path is None:
            return None
        paths.append(value.path)
    return next(filter(None, paths), "")


def _path_string(key_path: Sequence[Any]) -> str:
    """'conv1/kernel' for a key path; the `value` of a Flax variable is no part of it."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    if len(parts) > 1 and isinstance(key_path[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value":
        parts.pop()
    return "/".join(parts) or "param"


def _is_product(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name in _KINDS and all(jnp.issubdtype(_value(v).dtype, jnp.floating) for v in eqn.invars)


def _holds_product(eqn: jex.JaxprEqn) -> bool:
    """Whether some equation inside a call is a product."""
    inner = (jaxpr for jaxpr in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(jaxpr))
    return any(_is_product(e) or _holds_product(e) for jaxpr in inner for e in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)


def _runner(jaxpr: jex.Jaxpr, eqn: jex.JaxprEqn) -> Callable[..., Sequence[Any]]:
    """Evaluates one equation of `jaxpr`, as a jaxpr of its own (binding differs between JAX versions)."""
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))
    alone = jaxpr.replace(constvars=[], invars=variables, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    evaluate = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))

    def run(*inputs: Any) -> Sequence[Any]:
        env = {v: x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, jex.Literal)}
        return evaluate(*env.values())

    return run
