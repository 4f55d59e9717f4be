"""Any JAX function as a workload: the loop nests, vector work and tensors of a training step and of an inference."""

from __future__ import annotations

import difflib
import fnmatch
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.accumulation import accumulate
from codesign.dataflow import follow
from codesign.nests import Nest, make_nest
from codesign.passes import OPTIMIZERS, ProductSlot, Slot, VectorSlot, backward_slots, forward_slots
from codesign.tensors import INPUT_GRAD, INPUTS, WEIGHT_GRAD, WEIGHTS, Tensor, TensorTable
from hw.operation import LOOPS, OPERANDS, PASSES
from hw.schedule import Step, make_step
from nets.jaxpr import Program, Value, flatten

# Column of a table of bits (P, 4) that each operand is read at; the accumulated one is stored as its tensor is.
_READ_COLUMNS = {
    "forward": {"weights": WEIGHTS, "inputs": INPUTS},
    "input_grad": {"weights": WEIGHTS, "outputs": INPUT_GRAD},
    "weight_grad": {"inputs": INPUTS, "outputs": WEIGHT_GRAD},
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Workload:
    """What a chip has to do for one training step and for one inference of a JAX function. P products, n operations.

    Attributes:
      step: the training step.
      inference: the forward pass alone: its operations are the first of `step`, its tensors the same m.
      operand_column: (n, 3) int32, column of the table of bits that each operand is read at, -1: as it is stored.
      takes: (m, P, 4) bool, entries of the table of bits whose widest each tensor takes.
      fixed_bits: (m,), width of tensors that take none of them, else 0.
      product: (n,) int32, product of each operation: its row in the table of bits, in the order of `Precision.names`.
      tensor_product: (m,) int32, first product whose bits each tensor takes, -1 if none.
      names, passes: (n,) layer and pass of each operation.
      tensor_names, tensor_kind: (m,), see `codesign.tensors.Tensor`.
      vector_names, vector_passes: (v,), what each piece of vector work makes; "forward", "backward", "accumulate" or
        "update".
      batch: samples per training step, all micro-batches together; an inference is of one micro-batch.
      num_parameters: elements of all parameters.
    """

    step: Step
    inference: Step
    operand_column: jax.Array
    takes: jax.Array
    fixed_bits: jax.Array
    product: jax.Array
    tensor_product: jax.Array
    names: tuple[str, ...] = field(metadata={"static": True})
    passes: tuple[str, ...] = field(metadata={"static": True})
    tensor_names: tuple[str, ...] = field(metadata={"static": True})
    tensor_kind: tuple[str, ...] = field(metadata={"static": True})
    vector_names: tuple[str, ...] = field(metadata={"static": True})
    vector_passes: tuple[str, ...] = field(metadata={"static": True})
    batch: int = field(metadata={"static": True})
    num_parameters: int = field(metadata={"static": True})

    @property
    def labels(self) -> tuple[str, ...]:
        """Layer and pass of each operation in one text."""
        return tuple(f"{name} ({pass_})" for name, pass_ in zip(self.names, self.passes, strict=True))

    def tensor_bits(self, bits: jax.Array) -> jax.Array:
        """Stored width (m,) of each tensor's elements.

        Activations have the widest of their consumers' inputs, errors the widest of what their product's backward
        passes read; weight gradients, master weights, states and what feeds no product have fixed widths.

        Args:
          bits: (P, 4), of weights, inputs, and errors in input_grad and weight_grad.
        """
        return _tensor_bits(self.takes, self.fixed_bits, bits)

    @property
    def num_products(self) -> int:
        """P, the rows of a table of bits."""
        return 1 + int(np.asarray(self.product).max())

    def operation_bits(self, bits: jax.Array) -> jax.Array:
        """Widths (n, 3) of each operation's operands: those read at their product's bits, the result as it is stored.

        Args:
          bits: (P, 4), as for `tensor_bits`.
        """
        stored = self.tensor_bits(bits)
        return _operation_bits(self.product, self.operand_column, self.step.operand_tensor, stored, bits)

    def operation_density(self, density: jax.Array) -> jax.Array:
        """Share of the work left (n, 2) of each operation, as `hw.cost.price` takes it, of layers that were measured.

        Args:
          density: (P, 3, 2), by product, pass (forward, input_grad, weight_grad) and operand that is read, such as
            `nets.skipping.measured_densities` gives it; rows in the order of `Precision.names`.
        """
        return density[self.product, np.array([list(PASSES).index(pass_) for pass_ in self.passes])]

    def table(self, bits: jax.Array | None = None) -> list[dict[str, Any]]:
        """One row for each operation: layer, pass, loops, MACs without and with padding, elements of the operands.

        Args:
          bits: (P, 4), as for `tensor_bits`; if given, rows also have the operands' widths.
        """
        operations, runs = self.step.operations, np.asarray(self.step.multiplicity, np.float64)
        bounds = np.asarray(operations.bounds, np.float64).round().astype(int)
        taps = np.asarray(operations.taps, np.float64)
        elements = np.asarray(self.step.tensor_elements)[np.asarray(self.step.operand_tensor)]
        widths = None if bits is None else np.asarray(self.operation_bits(bits))
        rows = []
        for i, (name, pass_) in enumerate(zip(self.names, self.passes, strict=True)):
            row: dict[str, Any] = {
                "layer": name,
                "pass": pass_,
                "loops": " ".join(f"{loop}{n}" for loop, n in zip(LOOPS, bounds[i], strict=True) if n > 1),
                "effective_macs": round(float(runs[i] * bounds[i, :4].prod() * taps[i].prod())),
                "macs": round(float(runs[i] * bounds[i].astype(float).prod())),
            }
            row |= {operand: int(elements[i, j]) for j, operand in enumerate(OPERANDS)}
            if widths is not None:
                row |= {f"{operand}_bits": float(widths[i, j]) for j, operand in enumerate(OPERANDS)}
            rows.append(row)
        return rows

    def _repr_html_(self) -> str:
        rows = self.table()
        head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{_show(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
        macs = sum(row["effective_macs"] for row in rows)
        return (
            f"<p>{len(rows)} operations, {macs:,} MACs a training step of {self.batch} samples, "
            f"{self.num_parameters:,} parameters</p><table><tr>{head}</tr>{body}</table>"
        )


@jax.jit
def _tensor_bits(takes: jax.Array, fixed_bits: jax.Array, bits: jax.Array) -> jax.Array:
    widest = jnp.max(jnp.where(takes, bits[None], 0.0), axis=(1, 2))
    return jnp.maximum(widest, fixed_bits.astype(bits.dtype))


@jax.jit
def _operation_bits(
    product: jax.Array, column: jax.Array, operand_tensor: jax.Array, stored: jax.Array, bits: jax.Array
) -> jax.Array:
    read = jnp.take_along_axis(bits[product], jnp.maximum(column, 0), axis=1)
    return jnp.where(column >= 0, read, stored[operand_tensor])


def trace(
    fn: Callable,
    params: Any,
    *args: Any,
    trainable: Callable[[str], bool] | Sequence[str] | None = None,
    optimizer: str = "sgd",
    gradient_bits: float = 16.0,
    master_bits: float = 32.0,
    state_bits: float | None = None,
    micro_batches: int = 1,
) -> Workload:
    """The workload of training `fn` by gradient descent, and of evaluating it.

    Which passes exist follows from what is trained: a frozen layer has no weight gradient and no update, and keeps no
    inputs; input gradients stop at the lowest trained layer. Under `jax.checkpoint`, too, values are taken to be kept.

    Args:
      fn: any JAX function of `(params, *args)`, such as a network or its loss; what is not in it (a loss, if it returns
        logits) is not counted.
      params: pytree of its parameters, arrays or `jax.ShapeDtypeStruct`.
      *args: pytrees of its further arguments, a batch of data among them, likewise.
      trainable: which parameters are trained: a predicate of their paths ("conv1/kernel"), or patterns of paths or
        layers ("conv*"); all of them by default.
      optimizer: "sgd", "momentum" or "adam".
      gradient_bits: width of weight gradients.
      master_bits: width of master weights.
      state_bits: width of the optimiser's states; by default that of master weights.
      micro_batches: how many batches like `args` a training step takes the sum of gradients over, one after the other.

    Raises:
      ValueError: a function without convolution or product, an unknown optimiser, widths or a number of micro-batches
        that are not positive, a pattern that matches nothing, or a product that is no loop nest (see
        `codesign.nests.make_nest`, `nets.jaxpr.flatten`).
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"expected optimizer to be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    state_bits = master_bits if state_bits is None else state_bits
    if not (gradient_bits > 0 and master_bits > 0 and state_bits > 0):
        raise ValueError(f"expected positive widths, got {gradient_bits=}, {master_bits=}, {state_bits=}")
    if micro_batches < 1 or micro_batches != int(micro_batches):
        raise ValueError(f"expected one or more micro_batches, got {micro_batches}")
    program = flatten(fn, params, *args, enter_calls=True)
    if not program.products:
        raise ValueError("expected a function with a convolution or matrix product, got none; there is nothing to map")
    trained = _trained(program, trainable)
    flow = follow(program, trained)
    table = TensorTable(program, flow, trained, gradient_bits, master_bits)
    inference = forward_slots(flow, table, keep=False)
    training = forward_slots(flow, table, keep=True) + backward_slots(program, flow, table, optimizer)
    tensors = [replace(t, fixed_bits=state_bits) if t.kind == "state" else t for t in table.tensors]
    return _make_workload(program, tensors, inference, training, micro_batches)


def _trained(program: Program, trainable: Callable[[str], bool] | Sequence[str] | None) -> list[Value]:
    """The parameters that are trained."""
    values = [v for v in program.parameters if jnp.issubdtype(v.dtype, jnp.floating)]
    paths = [str(value.path) for value in values]
    if trainable is None:
        return values
    if callable(trainable):
        return [value for value, path in zip(values, paths, strict=True) if trainable(path)]
    names = {path: (path, path.rpartition("/")[0]) for path in paths}
    known = sorted({name for pair in names.values() for name in pair if name})
    for pattern in trainable:
        if not fnmatch.filter(known, pattern):
            nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise ValueError(
                f"expected patterns of parameters or layers, got {pattern!r}; did you mean {nearest[0]!r}?"
            )
    return [v for v, path in zip(values, paths, strict=True) if any(fnmatch.filter(names[path], p) for p in trainable)]


def _make_workload(
    program: Program,
    tensors: Sequence[Tensor],
    inference: Sequence[Slot],
    micro_batch: Sequence[Slot],
    micro_batches: int,
) -> Workload:
    training, kept, runs = accumulate(micro_batch, tensors, micro_batches)
    nests = [make_nest(product) for product in program.products]
    products = [slot for slot in training if isinstance(slot, ProductSlot)]
    vectors = [slot for slot in training if isinstance(slot, VectorSlot)]
    takes = np.zeros((len(tensors), len(nests), 4), bool)
    for i, tensor in enumerate(tensors):
        for product, column in tensor.widths:
            takes[i, product, column] = True
    columns = [[_READ_COLUMNS[s.pass_].get(operand, -1) for operand in nests[s.product].operands] for s in products]
    arrays = {
        "operand_column": np.array(columns, np.int32),
        "takes": takes,
        "fixed_bits": np.array([0.0 if t.widths else t.fixed_bits for t in tensors], jnp.result_type(float)),
        "product": np.array([slot.product for slot in products], np.int32),
        "tensor_product": np.array([min((p for p, _ in t.widths), default=-1) for t in tensors], np.int32),
    }
    return Workload(
        step=_to_step(nests, kept, training, runs, micro_batches),
        inference=_to_step(nests, tensors, inference, [1] * len(inference)),
        **jax.device_put(arrays),
        names=tuple(program.products[slot.product].name for slot in products),
        passes=tuple(slot.pass_ for slot in products),
        tensor_names=tuple(tensor.name for tensor in tensors),
        tensor_kind=tuple(tensor.kind for tensor in tensors),
        vector_names=tuple(slot.name for slot in vectors),
        vector_passes=tuple(slot.pass_ for slot in vectors),
        batch=nests[0].sizes["N"] * micro_batches,
        num_parameters=sum(value.size for value in program.parameters),
    )


def _to_step(
    nests: Sequence[Nest], tensors: Sequence[Tensor], slots: Sequence[Slot], runs: Sequence[int], micro_batches: int = 1
) -> Step:
    """The slots as arrays, each with all its runs."""
    operations = [(i, slot) for i, slot in enumerate(slots) if isinstance(slot, ProductSlot)]
    vectors = [(i, slot) for i, slot in enumerate(slots) if isinstance(slot, VectorSlot)]
    reads, writes = np.zeros((2, len(vectors), len(tensors)))
    for row, (i, slot) in enumerate(vectors):
        for table, elements in ((reads, slot.reads), (writes, slot.writes)):
            table[row, list(elements)] = [runs[i] * number for number in elements.values()]
    in_nest = [
        [slot.tensors[OPERANDS.index(operand)] for operand in nests[slot.product].operands] for _, slot in operations
    ]
    stacked = jax.tree.map(
        lambda *rows: np.stack(rows), *(nests[slot.product].operation(slot.pass_) for _, slot in operations)
    )
    return make_step(
        jax.device_put(stacked),  # stacked in numpy, for which nothing has to be compiled
        in_nest,
        [tensor.elements for tensor in tensors],
        operation_slot=[i for i, _ in operations],
        operation_pass=[list(PASSES).index(slot.pass_) for _, slot in operations],
        multiplicity=[runs[i] for i, _ in operations],
        persistent=[tensor.persistent for tensor in tensors],
        origin=[i if tensor.origin is None else tensor.origin for i, tensor in enumerate(tensors)],
        external=[float(tensor.external) for tensor in tensors],
        tensor_multiplicity=[micro_batches] * len(tensors),
        vector_slot=[i for i, _ in vectors],
        vector_ops=[runs[i] * slot.num_ops for i, slot in vectors],
        vector_reads=reads,
        vector_writes=writes,
    )


def _show(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))
