"""The tensors of a training step: what each is called, how large it is, whose bits it takes, how it is kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from codesign.dataflow import Chain, Dataflow
from nets.jaxpr import Program, Value

WEIGHTS, INPUTS, INPUT_GRAD, WEIGHT_GRAD = range(4)  # columns of a table of bits (P, 4)


@dataclass(frozen=True)
class Tensor:
    """What one tensor of a step is.

    Attributes:
      name: unique.
      kind: "weights", "activation", "error", "weight_gradient", "master", "state" or "other".
      elements: number of elements.
      widths: entries (product, column) of a table of bits (P, 4); its elements take the widest. If empty, they take
        `fixed_bits`.
      fixed_bits: width where nothing in the table decides.
      persistent: whether it lives from step to step.
      origin: tensor of which it is a kept copy, None if it is none.
      external: whether it enters or leaves the chip.
    """

    name: str
    kind: str
    elements: int
    widths: frozenset[tuple[int, int]] = frozenset()
    fixed_bits: float = 32.0
    persistent: bool = False
    origin: int | None = None
    external: bool = False


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters that are stored and updated together: the weights of products, or all that feed chains only.

    Attributes:
      name: path of the weights, or "other parameters" (biases, scales).
      size, num_trained: number of elements, and of those that are trained.
      widths: as in `Tensor`; empty for the others, of which there is only the master copy.
      num_gradients: how many products and chains give a gradient of it.
    """

    name: str
    size: int
    num_trained: int
    widths: frozenset[tuple[int, int]]
    num_gradients: int


class TensorTable:
    """Tensors of one program, each made when it is first asked for; methods return its index in `tensors`.

    What the backward pass needs of the forward pass is a kept copy, but for what lies in DRAM anyway (arguments,
    parameters, constants): of that it is the tensor itself. Values that feed no product (logits, statistics) have the
    width of the master weights.
    """

    def __init__(
        self, program: Program, flow: Dataflow, trained: Collection[Value], gradient_bits: float, master_bits: float
    ) -> None:
        self.tensors: list[Tensor] = []
        self._ids: dict[str, int] = {}
        self._flow = flow
        self._gradient_bits, self._master_bits = gradient_bits, master_bits
        self._outputs = {use.value for use in flow.outputs}
        self._results = {value: index for index, value in enumerate(flow.results)}
        chains = [node for node in flow.nodes if isinstance(node, Chain)]
        self._makers = {value: chain for chain in chains for value in chain.writes}
        self._readers: dict[Value, list[Chain]] = {}
        for chain in chains:
            for value in chain.reads:
                self._readers.setdefault(value, []).append(chain)
        self._operands: dict[Value, list[tuple[int, int]]] = {}
        for index, operands in enumerate(flow.operands):
            for column, use in enumerate(operands):
                self._operands.setdefault(use.value, []).append((index, column))
        self._names = {value: str(value.path) for value in program.parameters}
        self._names |= {value: f"argument {i}" for i, value in enumerate(program.arguments)}
        self._names |= {value: f"{program.products[i].name}/outputs" for value, i in self._results.items()}
        for chain in chains:
            self._names |= {v: f"{chain.name}{f' {i}' if i else ''}" for i, v in enumerate(chain.writes)}
        self._groups = self._group(program.parameters, set(trained))

    def _group(self, parameters: Collection[Value], trained: set[Value]) -> dict[Value, ParameterGroup]:
        """The group of every parameter that something reads."""
        members = {str(v.path): [v] for v in parameters if v in self._operands}
        members["other parameters"] = [v for v in parameters if v not in self._operands and v in self._readers]
        groups: dict[Value, ParameterGroup] = {}
        for name, values in members.items():
            gradients = sum(use.value in values and use.varies for pair in self._flow.operands for use in pair)
            gradients += sum(v in chain.varying for v in values for chain in self._readers.get(v, ()))
            group = ParameterGroup(
                name=name,
                size=sum(v.size for v in values),
                num_trained=sum(v.size for v in values if v in trained),
                widths=frozenset(entry for v in values for entry in self._operands.get(v, ())),
                num_gradients=gradients,
            )
            groups |= dict.fromkeys(values, group)
        return groups

    def group(self, value: Value) -> ParameterGroup | None:
        """The group of a parameter, None for any other value."""
        return self._groups.get(value)

    def value(self, value: Value) -> int:
        """What holds a value."""
        group = self.group(value)
        if group is not None:
            return self.parameters(group)
        widths, is_leaf = self._widths(value), self._is_leaf(value)
        is_weights = value.path and widths and all(column == WEIGHTS for _, column in widths)
        tensor = Tensor(
            name=self._names.setdefault(value, f"constant {len(self._names)}"),
            kind="weights" if is_weights else "activation" if widths else "other",
            elements=value.size,
            widths=widths,
            fixed_bits=8.0 * value.dtype.itemsize if is_leaf else self._master_bits,
            persistent=value.constant is not None,
            external=value in self._outputs or (is_leaf and value.constant is None),
        )
        return self._add(tensor)

    def kept(self, value: Value) -> int:
        """Where the backward pass finds a value of the forward pass."""
        origin = self.value(value)
        if self._is_leaf(value):
            return origin
        tensor = self.tensors[origin]
        return self._add(
            Tensor(f"{tensor.name} kept", tensor.kind, tensor.elements, tensor.widths, tensor.fixed_bits, origin=origin)
        )

    def mask(self, chain: Chain) -> int:
        """What a chain keeps for its backward pass instead of its inputs, in single bits."""
        return self._add(Tensor(f"{chain.name} mask", "other", chain.mask_bits, fixed_bits=1.0))

    def error(self, value: Value, user: str = "") -> int:
        """The gradient of a value that one of its users gives, or without a user the sum of all.

        That of parameters is summed in one place.
        """
        group = self.group(value)
        if group is not None:
            return self.gradient(group)
        uses = len(self._operands.get(value, ())) + len(self._readers.get(value, ())) + (value in self._outputs)
        name = f"{self._names[value]} gradient" + (f" from {user}" if user and uses > 1 else "")
        return self._add(Tensor(name, "error", value.size, self._error_widths(value), self._gradient_bits))

    def parameters(self, group: ParameterGroup) -> int:
        """Parameters as the forward pass reads them."""
        if not group.widths:
            return self.master(group)
        return self._add(Tensor(group.name, "weights", group.size, group.widths, persistent=True))

    def gradient(self, group: ParameterGroup) -> int:
        name = f"{group.name} gradient"
        return self._add(Tensor(name, "weight_gradient", group.num_trained, fixed_bits=self._gradient_bits))

    def master(self, group: ParameterGroup) -> int:
        name = f"{group.name} master"
        return self._add(Tensor(name, "master", group.size, fixed_bits=self._master_bits, persistent=True))

    def state(self, group: ParameterGroup, num_states: int) -> int:
        """All states that the optimiser keeps of a group."""
        name, elements = f"{group.name} state", group.num_trained * num_states
        return self._add(Tensor(name, "state", elements, fixed_bits=self._master_bits, persistent=True))

    def _add(self, tensor: Tensor) -> int:
        if tensor.name not in self._ids:
            self._ids[tensor.name] = len(self.tensors)
            self.tensors.append(tensor)
        return self._ids[tensor.name]

    def _is_leaf(self, value: Value) -> bool:
        """Whether nothing in the program makes it."""
        return value not in self._makers and value not in self._results

    def _widths(self, value: Value) -> frozenset[tuple[int, int]]:
        """The operands of products that a value is, or else leads to through a chain, or else through several."""
        if value in self._operands:
            return frozenset(self._operands[value])
        led_to = [v for chain in self._readers.get(value, ()) for v in chain.writes]
        nearest = [v for v in led_to if v in self._operands] or led_to
        return frozenset(entry for v in nearest for entry in self._widths(v))

    def _error_widths(self, value: Value) -> frozenset[tuple[int, int]]:
        """The errors of the products whose results a value is, or is made of by its chain, or else by chains before."""
        if value in self._results:
            index = self._results[value]
            weights, inputs = self._flow.operands[index]
            exists = {INPUT_GRAD: inputs.varies, WEIGHT_GRAD: weights.varies}
            return frozenset((index, column) for column, does in exists.items() if does)
        if value not in self._makers:
            return frozenset()
        sources = self._makers[value].varying
        nearest = [v for v in sources if v in self._results] or sources
        return frozenset(entry for v in nearest for entry in self._error_widths(v))
