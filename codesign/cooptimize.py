"""The joint loop: one jitted step moves weights, bit widths and chip together, mappings at their best throughout.

`Task` holds what never changes, `State` what does, `Phase` which parts of the state a stretch of training may move. The
methods that are compared (joint, sequential, fixed bits, fixed chip) are sequences of phases of this one loop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from codesign import mapper
from codesign.design import Design, DesignSpace
from codesign.evaluation import begin_search
from codesign.objective import (
    augmented_lagrangian,
    bit_operations,
    excesses,
    next_multiplier,
    next_prices,
    step_cost,
)
from codesign.tracing import Workload
from hw.chip import Chip
from nets.noise import NoiseModel, make_noise_measurement
from nets.precision import Precision, QuantState
from nets.training import Array, Forward, accuracy, apply_gradient, cross_entropy
from nets.transform import quantize

_STIFFNESS = 1.0  # of the augmented Lagrangian, in nats of loss per squared nat of excess
_DUAL_RATE = 0.1  # of the multipliers, per step
_MARGIN = 0.98  # budgets are held a little tighter than asked, so that the last iterate lies inside them


@dataclass(frozen=True)
class Task:
    """What a run is about; static, compared by identity.

    Attributes:
      forward: the network, `(params, rest, images, key, train) -> (logits, rest)`.
      workload: its traced training step at the run's batch size.
      space: the chips that may be chosen.
      optimizer: makes the weights' transformation for a number of steps.
      budgets: limits in SI units on fields of `StepCost`.
      noise_budget: log of the share of extra gradient noise that low-bit errors may add.
      precision_rate, design_rate: Adam step sizes, in bits (log2) and in units of the unconstrained design.
      min_bits, max_bits: range of every learned width.
      num_candidates: mappings kept per operation for the chip as it stands.
      evaluations: mappings tried per operation and chip in a search from scratch.
      refresh_evaluations: mappings tried per operation and chip in one from the candidates at hand.
    """

    forward: Forward
    workload: Workload
    space: DesignSpace
    optimizer: Callable[[int], optax.GradientTransformation]
    budgets: MappingABC[str, float]
    noise_budget: float
    precision_rate: float = 0.03
    design_rate: float = 0.04
    min_bits: int = 2
    max_bits: int = 12
    num_candidates: int = 4
    evaluations: int = 1600
    refresh_evaluations: int = 128

    @functools.cached_property
    def slots(self) -> mapper.Slots:
        """Where mappings of this chip can have factors."""
        return mapper.make_slots(self.space.base)

    @functools.cached_property
    def tables(self) -> mapper.Tables:
        """Factor values that the mapper tries."""
        return mapper.make_tables(self.workload.step.operations)

    @functools.cached_property
    def neighbours(self) -> Callable[[Design], list[Chip]]:
        """`DesignSpace.neighbours`, jitted."""
        return jax.jit(self.space.neighbours)

    @functools.cached_property
    def quantised(self) -> Callable[..., tuple[jax.Array, Any]]:
        """The network's quantised twin: `(params, precision, quant_state, key, rest, images) -> (logits, rest)`."""
        return quantize(lambda params, rest, images, key: self.forward(params, rest, images, key, True))

    @functools.cached_property
    def quantised_evaluation(self) -> Forward:
        """The same outside training, as a `Forward` whose params are (params, precision, quant_state)."""
        twin = quantize(lambda params, rest, images: self.forward(params, rest, images, None, False))

        def forward(groups, rest, images, key, train):
            return twin(
                *groups, jax.random.key(0), rest, images
            )  # nothing is rounded at random without a backward pass

        return forward

    @functools.cached_property
    def measured_noise(self) -> Callable[..., NoiseModel]:
        """`measure(params, precision, quant_state, (key, rest), images, labels) -> NoiseModel`."""

        def loss_fn(params, precision, quant_state, key_and_rest, images, labels):
            key, rest = key_and_rest
            logits, _ = self.quantised(params, precision, quant_state, key, rest, images, key)
            return cross_entropy(logits, labels)

        return make_noise_measurement(loss_fn)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


StepFunction = Callable[..., tuple["State", dict[str, jax.Array]]]
"""`(state, images, labels, key) -> (state, metrics)`."""


class Phase(NamedTuple):
    """Which parts of the state a stretch of training moves, and what it pays for; static.

    Attributes:
      train: whether the network trains (without, only the chip moves and no data are read).
      quantised: whether products are quantised.
      learn_bits, learn_chip: whether precision and chip move.
      penalty: what the bits (and the chip) pay for beside the task loss.
      weight: of the logarithm of that penalty.
    """

    train: bool = True
    quantised: bool = True
    learn_bits: bool = False
    learn_chip: bool = False
    penalty: Literal["none", "edp", "bit_operations"] = "none"
    weight: float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that a run changes; a checkpoint of it is enough to go on.

    Attributes:
      params, rest: the network's arrays.
      precision, quant_state: learned widths; what the formats track.
      design: the unconstrained chip.
      opt_state: of the present phase.
      multipliers: of the budgets and of the noise constraint ("noise"), shape ().
      mappings: candidates kept per operation: those of the chip as it stood at the last refresh, behind them its neighbours'.
      prices: of a joule and of a second, shape (2,).
      noise: the measured noise of backward errors.
    """

    params: Any
    rest: Any
    precision: Precision
    quant_state: QuantState
    design: Design
    opt_state: Any
    multipliers: dict[str, jax.Array]
    mappings: mapper.Candidates
    prices: jax.Array
    noise: NoiseModel


def make_optimizer(task: Task, phase: Phase, num_steps: int) -> optax.GradientTransformation:
    """Own transformation per group: the task's for weights, Adam for bits and chip, nothing for what is frozen."""
    groups = {
        "weights": task.optimizer(num_steps) if phase.train else optax.set_to_zero(),
        "precision": optax.adam(task.precision_rate) if phase.learn_bits else optax.set_to_zero(),
        # The chip's step size falls to a tenth, so that rows and columns settle before the phase ends.
        "design": optax.adam(optax.cosine_decay_schedule(task.design_rate, max(num_steps, 1), 0.1))
        if phase.learn_chip
        else optax.set_to_zero(),
    }
    return optax.partition(groups, {name: name for name in groups})


def trained(state: State) -> dict[str, Any]:
    """The groups that the optimiser sees."""
    return {"weights": state.params, "precision": state.precision, "design": state.design}


def start_phase(task: Task, phase: Phase, state: State, num_steps: int) -> State:
    """The state at the start of a phase: fresh optimiser, multipliers kept."""
    return dataclasses.replace(state, opt_state=make_optimizer(task, phase, num_steps).init(trained(state)))


def make_step(task: Task, phase: Phase, num_steps: int) -> StepFunction:
    """The jitted step of a phase, `(state, images, labels, key) -> (state, metrics)`.

    Call it once per batch. Metrics are of the state before the update; those of the cost are in SI units. Phases that
    differ in their weight only share one compilation.
    """
    step = _make_weighted_step(task, phase._replace(weight=0.0), num_steps)
    return functools.partial(step, weight=jnp.asarray(phase.weight, jnp.float32))


@functools.lru_cache(maxsize=32)
def _make_weighted_step(task: Task, phase: Phase, num_steps: int) -> StepFunction:
    """The step of a phase for any weight, its last argument."""
    optimizer = make_optimizer(task, phase, num_steps)

    moving = {"weights": phase.train, "precision": phase.learn_bits, "design": phase.learn_chip}

    def loss_and_metrics(groups, quant_state, state: State, images, labels, key, weight):
        # What does not move needs no gradient: XLA then drops its computation.
        groups = {name: group if moving[name] else jax.lax.stop_gradient(group) for name, group in groups.items()}
        loss, metrics, rest = jnp.zeros(()), {}, state.rest
        if phase.train:
            task_loss, share, rest = _network_loss(task, phase, groups, quant_state, state, images, labels, key)
            loss, metrics = task_loss, {"loss": task_loss, "accuracy": share}
        excess, prices = {}, state.prices
        if phase.penalty != "none":
            penalty, cost_metrics, excess, prices = _penalty(task, phase, weight, groups, state)
            loss, metrics = loss + penalty, metrics | cost_metrics
        for name, value in excess.items():
            loss = loss + augmented_lagrangian(value, state.multipliers[name], _STIFFNESS)
        return loss, (metrics, rest, excess, prices)

    @jax.jit
    def step(state: State, images, labels, key, weight):
        groups = trained(state)
        gradients, (metrics, rest, excess, prices) = jax.grad(loss_and_metrics, argnums=(0, 1), has_aux=True)(
            groups, state.quant_state, state, images, labels, key, weight
        )
        groups, opt_state = apply_gradient(optimizer, gradients[0], state.opt_state, groups)
        precision = groups["precision"]
        if phase.learn_bits:
            precision = precision.clamped(task.min_bits, task.max_bits)
        is_quantised = phase.train and phase.quantised
        multipliers = {n: next_multiplier(v, state.multipliers[n], _DUAL_RATE) for n, v in excess.items()}
        new = dataclasses.replace(
            state,
            params=groups["weights"],
            rest=rest,
            precision=precision,
            quant_state=state.quant_state.updated(gradients[1]) if is_quantised else state.quant_state,
            design=groups["design"],
            opt_state=opt_state,
            multipliers=state.multipliers | multipliers,
            prices=prices,
        )
        return new, metrics

    return step


def _network_loss(task, phase, groups, quant_state, state, images, labels, key):
    """Cross-entropy and accuracy of a training batch, quantised or not, and the network's new other state."""
    round_key, drop_key = jax.random.split(key)
    if phase.quantised:
        precision = groups["precision"]
        logits, rest = task.quantised(
            groups["weights"], precision, quant_state, round_key, state.rest, images, drop_key
        )
    else:
        logits, rest = task.forward(groups["weights"], state.rest, images, drop_key, True)
    return cross_entropy(logits, labels), accuracy(logits, labels), rest


def _penalty(task: Task, phase: Phase, weight: jax.Array, groups, state: State):
    """Weighted logarithm of what the phase pays for, its metrics, the constraints' excesses, and the next prices."""
    bits = groups["precision"].bits()
    workload, excess, prices = task.workload, {}, state.prices
    operation_bits = workload.operation_bits(bits)
    if phase.penalty == "bit_operations":
        work = bit_operations(workload.step, operation_bits)
        penalty, metrics = weight * jnp.log(work), {"bit_operations": work}
    else:
        chip = task.space.chip(groups["design"])
        cost = step_cost(
            chip, workload.step, operation_bits, workload.tensor_bits(bits), state.mappings.accesses, state.prices
        )
        penalty = weight * (jnp.log(cost.energy) + jnp.log(cost.latency))
        excess = excesses(cost, {name: _MARGIN * limit for name, limit in task.budgets.items()})
        prices = next_prices(cost)
        metrics = {name: getattr(cost, name) for name in ("energy", "latency", "edp", "area", "power")}
    if phase.learn_bits:
        excess["noise"] = state.noise.excess(bits[:, 2:], task.noise_budget)
    return penalty, metrics | {f"excess_{name}": value for name, value in excess.items()}, excess, prices


def penalised(task: Task, phase: Phase, state: State, bits: jax.Array) -> float:
    """What a phase pays the logarithm of, at the chip and mappings of a state: EDP in J s, or bit operations of a step."""
    if phase.penalty == "bit_operations":
        return float(bit_operations(task.workload.step, task.workload.operation_bits(bits)))
    return state_edp(task, state, bits)


def state_edp(task: Task, state: State, bits: jax.Array) -> float:
    """EDP in J s of a training step at the chip and mappings of a state."""
    workload = task.workload
    work = workload.step, workload.operation_bits(bits), workload.tensor_bits(bits)
    return float(step_cost(task.space.chip(state.design), *work, state.mappings.accesses, state.prices).edp)


def search_neighbours(
    task: Task, design: Design, bits: jax.Array, prices: jax.Array, key: jax.Array, *,
    start: mapper.Candidates | None, evaluations: int,
) -> mapper.Candidates:  # fmt: skip
    """Candidates for a design: the best of its own chip, and behind them the single best of each neighbour."""
    work = task.workload.step, task.workload.operation_bits(bits), task.workload.tensor_bits(bits)
    chips, start = task.neighbours(design), jax.device_get(start)
    begun = [
        begin_search(
            chip, *work, prices, own_key, slots=task.slots, tables=task.tables, start=start,
            evaluations=neighbour_evaluations(evaluations) if i else evaluations, num_best=1 if i else task.num_candidates,
        )
        for i, (chip, own_key) in enumerate(zip(chips, _folded(key, len(chips)), strict=True))
    ]  # fmt: skip
    return mapper.with_neighbours([finish() for finish in begun])


def neighbour_evaluations(evaluations: int) -> int:
    """Mappings tried for a neighbour where the chip itself gets `evaluations`: it only shows where to grow."""
    return evaluations // 2


_widths = jax.jit(Precision.bits)


@functools.partial(jax.jit, static_argnums=1)
def _folded(key: jax.Array, num: int) -> list[jax.Array]:
    """`num` keys from one."""
    return [jax.random.fold_in(key, i) for i in range(num)]


def refresh_mappings(task: Task, state: State, key: jax.Array, evaluations: int) -> State:
    """Search anew for candidate mappings of the chip as it stands and of its neighbours, starting from those it has."""
    found = search_neighbours(
        task, state.design, _widths(state.precision), state.prices, key, start=state.mappings, evaluations=evaluations
    )
    return dataclasses.replace(state, mappings=found)


def refresh_noise(task: Task, state: State, images: Array, labels: Array, key: jax.Array) -> State:
    """Measure the noise that the present error formats add to each layer's weight gradient, on one batch."""
    noise = task.measured_noise(
        state.params, state.precision, state.quant_state, (key, state.rest), jnp.asarray(images), jnp.asarray(labels)
    )
    return dataclasses.replace(state, noise=noise)
