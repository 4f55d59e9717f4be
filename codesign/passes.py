"""The passes of a training step over a dataflow: which work runs in which order, and which tensors it touches.

Order: forward; then from the last product to the first the weight gradient, the input gradient and the chain before it;
and the update of weights as soon as all their uses have given their gradients (an optimiser that needs all gradients
first, such as clipping by a global norm, would have to wait). The gradient of the results is taken as given.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from codesign.dataflow import Chain, Dataflow
from codesign.tensors import ParameterGroup, TensorTable
from nets.jaxpr import Program, Value

# States per weight, and element operations of one update, a multiplication with an addition counted as one:
# momentum and Adam as in Goodfellow et al., Deep learning, algorithms 8.2 and 8.7, bias correction in the step size.
OPTIMIZERS = {"sgd": (0, 1), "momentum": (1, 2), "adam": (2, 9)}


@dataclass(frozen=True)
class ProductSlot:
    """One pass of a product, with the tensors of its weights, inputs and outputs."""

    product: int
    pass_: str
    tensors: tuple[int, int, int]


@dataclass(frozen=True)
class VectorSlot:
    """Work of the vector unit, with the elements of each tensor that it reads and writes."""

    name: str
    pass_: str
    num_ops: float
    reads: Counter[int] = field(default_factory=Counter)
    writes: Counter[int] = field(default_factory=Counter)


Slot = ProductSlot | VectorSlot


def forward_slots(flow: Dataflow, table: TensorTable, *, keep: bool) -> list[Slot]:
    """The forward pass; with `keep` its chains write the masks that the backward pass needs."""
    slots: list[Slot] = []
    for node in flow.nodes:
        if isinstance(node, Chain):
            slot = VectorSlot(node.name, "forward", node.num_ops)
            for value, elements in node.reads.items():
                slot.reads[table.value(value)] += elements
            for value in node.writes:
                slot.writes[table.value(value)] += value.size
            if keep and node.varying and node.mask_bits and not node.recalled:
                slot.writes[table.mask(node)] += node.mask_bits
            slots.append(slot)
        else:
            weights, inputs = (table.value(use.value) for use in flow.operands[node])
            slots.append(ProductSlot(node, "forward", (weights, inputs, table.value(flow.results[node]))))
    return slots


def backward_slots(program: Program, flow: Dataflow, table: TensorTable, optimizer: str) -> list[Slot]:
    """Backward passes and updates, in order of execution."""
    return _Backward(program, flow, table, optimizer).slots


class _Backward:
    """Walks the nodes backward and collects, for every value, the gradients that its users give."""

    def __init__(self, program: Program, flow: Dataflow, table: TensorTable, optimizer: str) -> None:
        self.slots: list[Slot] = []
        self._program, self._flow, self._table = program, flow, table
        self._optimizer = optimizer
        self._errors: dict[Value, list[int]] = {}
        self._given: Counter[ParameterGroup] = Counter()
        for use in flow.outputs:
            if use.varies:
                self._give(use.value, "results")
        for node in reversed(flow.nodes):
            if isinstance(node, Chain):
                self._chain(node)
            else:
                self._product(node)

    def _give(self, value: Value, user: str) -> int:
        """The tensor in which a user gives the gradient of a value."""
        tensor = self._table.error(value, user)
        self._errors.setdefault(value, []).append(tensor)
        return tensor

    def _count(self, value: Value) -> None:
        """Updates a group of parameters once all its gradients are there."""
        group = self._table.group(value)
        if group is not None:
            self._given[group] += 1
            if self._given[group] == group.num_gradients:
                self._update(group)

    def _product(self, index: int) -> None:
        name = self._program.products[index].name
        (weights, inputs), result = self._flow.operands[index], self._flow.results[index]
        errors = self._errors.get(result)
        if not errors:
            return
        error = errors[0] if len(errors) == 1 else self._sum(f"{name}/outputs", result, errors)
        if weights.varies:
            gradient = self._give(weights.value, f"{name}/weights")
            self.slots.append(ProductSlot(index, "weight_grad", (gradient, self._table.kept(inputs.value), error)))
        if inputs.varies:
            gradient = self._give(inputs.value, f"{name}/inputs")
            self.slots.append(ProductSlot(index, "input_grad", (self._table.kept(weights.value), gradient, error)))
        for use in (weights, inputs):
            if use.varies:
                self._count(use.value)

    def _sum(self, name: str, value: Value, errors: list[int]) -> int:
        total = self._table.error(value)
        reads, writes = Counter(dict.fromkeys(errors, value.size)), Counter({total: value.size})
        self.slots.append(VectorSlot(name, "backward", (len(errors) - 1) * value.size, reads, writes))
        return total

    def _chain(self, chain: Chain) -> None:
        """The backward pass of a chain: as many operations as forward, and those again if it recomputes."""
        errors = {value: self._errors[value] for value in chain.writes if value in self._errors}
        if not errors:
            return
        slot = VectorSlot(chain.name, "backward", chain.num_ops * (2 if chain.recalled else 1))
        for value, tensors in errors.items():
            slot.reads.update(dict.fromkeys(tensors, value.size * chain.num_sweeps))
        for value, elements in chain.reads.items():
            if value in chain.recalled:
                slot.reads[self._table.kept(value)] += elements
        if chain.mask_bits and not chain.recalled:
            slot.reads[self._table.mask(chain)] += chain.mask_bits
        varying = [value for value in chain.reads if value in chain.varying]
        for value in varying:
            slot.writes[self._give(value, chain.name)] += value.size
        self.slots.append(slot)
        for value in varying:
            self._count(value)

    def _update(self, group: ParameterGroup) -> None:
        """Reads gradient, master copy and states, writes the latter two and the weights that products read."""
        num_states, ops = OPTIMIZERS[self._optimizer]
        table, size = self._table, group.num_trained
        slot = VectorSlot(group.name, "update", ops * size)
        slot.reads[table.gradient(group)] = size
        changed = {table.master(group): size}
        if num_states:
            changed[table.state(group, num_states)] = num_states * size
        slot.reads.update(changed)
        slot.writes.update(changed)
        if group.widths:
            slot.writes[table.parameters(group)] = size
        self.slots.append(slot)
