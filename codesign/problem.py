"""From settings to a problem: data, network, traced workload, design space, and the state that training starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from codesign.config import ChipConfig, Config, PrecisionConfig, TrainConfig
from codesign.cooptimize import State, Task, search_neighbours
from codesign.design import DEFAULT_VARIABLES, DesignSpace, physical_values, with_values
from codesign.evaluation import evaluate, initial_prices
from codesign.objective import BUDGETS
from codesign.tracing import Workload, trace
from hw.arithmetic import make_mac
from hw.chip import Chip
from hw.chips import CHIPS, PRESETS
from hw.technology import make_technology, unknown
from hw.units import MILLIWATT, MM2
from nets.data import Dataset, stratified_places, take
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.noise import no_noise
from nets.personalisation import make_personalisation
from nets.precision import LayerRule, Precision, PrecisionRules, QuantState, init_precision
from nets.training import Forward, Params, Rest, cross_entropy, split_model

_BUDGET_SETTINGS = {
    "area": ("area_mm2", MM2),
    "latency": ("latency_ms", 1e-3),
    "energy": ("energy_uj", 1e-6),
    "power": ("power_mw", MILLIWATT),
}
_FREE_VARIABLES = {
    "bandwidth": ("local_bandwidth_bits", "shared_bandwidth_bits"),
    "shared_kib": ("shared_kib", "resident_fraction"),
    "banks": ("local_banks", "shared_banks"),
}
CHIP_NUMBERS = ("rows", "columns", "local_kib", "shared_kib", "vdd")
_CALIBRATION_SAMPLES = 256
# Of the shared SRAM, for tensors that stay between operations: the default of make_chip, which published chips do not tell.
RESIDENT = 0.5


class Tasks(NamedTuple):
    """The two datasets of a run: what the network is pretrained on, and what all methods then train on and are judged by."""

    pretraining: Dataset
    methods: Dataset


def load_tasks(config: Config) -> Tasks:
    """One dataset for both, or with a writer: pretraining on everybody, methods on a few samples of the writer.

    The writer's evaluation examples are halved, class by class: one half to choose on, the other to report.

    Raises:
      ValueError: a dataset that cannot be read, a batch larger than it, more of the writer's samples than there are.
    """
    everybody = load_dataset(config.data.name)
    if config.train.batch_size > len(everybody.train.labels):
        raise ValueError(
            f"train.batch_size: expected at most {len(everybody.train.labels)}, the training samples of {everybody.name}, "
            f"got {config.train.batch_size}; lower it"
        )
    if config.data.writer is None:
        return Tasks(everybody, everybody)
    per_class = max(1, config.data.writer_samples // everybody.num_classes)
    try:
        personal = make_personalisation(everybody, config.data.writer, per_class)
    except ValueError as error:
        raise ValueError(
            f"data.writer {config.data.writer}, data.writer_samples {config.data.writer_samples} ({per_class} of each "
            f"class): {error}"
        ) from None
    judged = stratified_places(personal.evaluation.labels) % 2 == 0
    writer = dataclasses.replace(
        personal.dataset,
        name=f"{everybody.name}, {'writer' if personal.writer else 'user'} {config.data.writer}",
        train=personal.adaptation,
        validation=take(personal.evaluation, ~judged),
        test=take(personal.evaluation, judged),
        test_users=None,
    )
    return Tasks(personal.dataset, writer)


def batch_size(config: Config, dataset: Dataset) -> int:
    """Samples per step: what the settings ask for, or all there are."""
    return min(config.train.batch_size, len(dataset.train.labels) // 2 * 2)


def load_model(name: str, dataset: Dataset, seed: int) -> nnx.Module:
    """A reference network by name, or whatever `module:function` of the user's own returns.

    Raises:
      ValueError: the module or function cannot be imported, the function does not return an NNX module, or the module
        does not map images of the dataset to its logits.
    """
    if ":" not in name:
        return make_model(name, dataset.input_shape, dataset.num_classes, seed)
    module_name, function = name.split(":", 1)
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.name {name!r}: {error}; give module:function that can be imported from here") from None
    call = f"{function}({dataset.input_shape}, {dataset.num_classes}, seed)"
    with _one_line(f"model.name {name!r}: expected {call} to return a model"):
        model = factory(dataset.input_shape, dataset.num_classes, seed)
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"model.name {name!r}: expected a flax.nnx.Module, got {type(model).__name__}; return the model"
        )
    _check_logits(name, model, dataset)
    return model


def _check_logits(name: str, model: nnx.Module, dataset: Dataset) -> None:
    """Refuse a model that does not map images of the dataset to logits."""
    images = jax.ShapeDtypeStruct((2, *dataset.input_shape), jnp.float32)
    forward, params, rest = split_model(model)
    with _one_line(f"model.name {name!r}: expected a model that takes images {images.shape} and nothing else"):
        logits = jax.eval_shape(lambda x: forward(params, rest, x, None, False)[0], images)
    expected = (2, dataset.num_classes)
    if getattr(logits, "shape", None) != expected:
        got = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(
            f"model.name {name!r}: expected logits of shape {expected} for 2 images of {dataset.name}, got {got}; the last "
            "layer needs one output per class"
        )


@contextlib.contextmanager
def _one_line(expectation: str) -> Iterator[None]:
    """Errors of the user's own code, whatever they are, as a `ValueError` of one line."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise ValueError(f"{expectation}, got {type(error).__name__}: {lines[0]}; correct the model") from error


def load_chip(config: ChipConfig) -> Chip:
    """The preset with the settings' own numbers in place of its own.

    Raises:
      ValueError: an unknown preset, or numbers that no chip can have.
    """
    if config.preset in PRESETS:
        raise ValueError(
            f"chip.preset: expected a chip to start a search from, {' or '.join(CHIPS)}, got the published chip "
            f"{config.preset!r}; `cost --chip {config.preset}` tells what a network costs on it"
        )
    if config.preset not in CHIPS:
        raise ValueError(f"chip.preset: {unknown('chip', config.preset, [*CHIPS, *PRESETS])}")
    chip = CHIPS[config.preset]()
    if config.node_nm is not None:
        technology = make_technology(config.node_nm)
        vdd = jnp.asarray(technology["supply.vdd"], chip.vdd.dtype)
        chip = dataclasses.replace(chip, technology=technology, vdd=vdd)
    given = {name: getattr(config, name) for name in CHIP_NUMBERS}
    return with_values(chip, {name: jnp.asarray(float(value)) for name, value in given.items() if value is not None})


def load_published(config: ChipConfig, bits: float, mode: str | None = None, mechanisms: Sequence[str] = ()) -> Chip:
    """A published chip in a mode, at the settings' supply or its own.

    Args:
      config: its preset is one of `PRESETS`; of the rest only the supply can be set.
      bits: of the operands.
      mode: one of the preset's; by default the narrowest for these bits.
      mechanisms: those of `hw.chips.mechanisms` of which the chip must have one.

    Raises:
      ValueError: an unknown mode, mechanisms that the chip lacks, or a setting for what the preset tells.
    """
    preset = PRESETS[config.preset]
    preset.require_one(*mechanisms)
    if own := [name for name in (*CHIP_NUMBERS, "node_nm") if name != "vdd" and getattr(config, name) is not None]:
        raise ValueError(
            f"expected {preset.title} as it was published, got {', '.join(own)} for it; of it only vdd is free"
        )
    chip = preset.make(preset.mode_for(bits) if mode is None else mode, config.vdd)
    return dataclasses.replace(chip, resident_fraction=jnp.asarray(RESIDENT))


def design_space(chip: Chip, free: tuple[str, ...]) -> DesignSpace:
    """The quantities that the settings free, under the names of `codesign.design`, in ranges that hold the chip itself."""
    names, values = free_variables(free), physical_values(chip)
    variables = {name: it.holding(values[name]) for name, it in DEFAULT_VARIABLES.items() if name in names}
    return DesignSpace(chip, variables)


def free_variables(free: Sequence[str]) -> list[str]:
    """The quantities of `codesign.design` that settings of `chip.free` name."""
    return [name for setting in free for name in _FREE_VARIABLES.get(setting, (setting,))]


def budgets(config: Config, base: Chip) -> dict[str, float]:
    """Limits in SI units; without any setting, the area of the base chip, so that no gain is bought with area."""
    return asked_budgets(config) or {"area": float(base.area().total)}


def asked_budgets(config: Config) -> dict[str, float]:
    """The limits that the settings name, in SI units."""
    limits = {}
    for name in BUDGETS:
        setting, unit = _BUDGET_SETTINGS[name]
        if (value := getattr(config.objective, setting)) is not None:
            limits[name] = value * unit
    return limits


def describe_budgets(limits: Mapping[str, float]) -> str:
    """Limits in the units of the settings, for people: "area_mm2 <= 0.932"."""
    shown = [(setting, limits[name] / unit) for name, (setting, unit) in _BUDGET_SETTINGS.items() if name in limits]
    return ", ".join(f"{setting} <= {value:.4g}" for setting, value in shown)


def weight_optimizer(config: TrainConfig) -> Callable[[int], optax.GradientTransformation]:
    """The weights' transformation for a number of steps: the learning rate falls to zero along a cosine."""
    makers: Mapping[str, Callable[[Any], optax.GradientTransformation]] = {
        "sgd": optax.sgd,
        "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
        "adam": optax.adam,
    }
    return lambda num_steps: makers[config.optimizer](
        optax.cosine_decay_schedule(config.learning_rate, max(num_steps, 1))
    )


def calibrate(
    forward: Forward, params: Params, rest: Rest, dataset: Dataset, rule: LayerRule
) -> tuple[Precision, QuantState]:
    """Formats of one rule for every layer, fitted to a calibration batch of the training set."""
    images, labels = (x[:_CALIBRATION_SAMPLES] for x in dataset.train)

    def network(params, rest, images):
        return forward(params, rest, images, None, False)[0]

    rules = PrecisionRules({"*": rule})
    return init_precision(
        network,
        rules,
        params,
        rest,
        jnp.asarray(images),
        loss=lambda logits: cross_entropy(logits, jnp.asarray(labels)),
    )


def initial_rule(config: PrecisionConfig) -> LayerRule:
    """The rule that learned bits start from."""
    return LayerRule(config.weights, config.inputs, config.input_grad, config.weight_grad, learn=config.learn)


def trace_network(
    forward: Forward, params: Params, rest: Rest, dataset: Dataset, batch_size: int, optimizer: str, **options: Any
) -> Workload:
    """The workload of a network at a batch size; further `options` are those of `codesign.trace`."""

    def network(params, rest, images, key):
        return forward(params, rest, images, key, True)[0]

    images = jax.ShapeDtypeStruct((batch_size, *dataset.input_shape), jnp.float32)
    return trace(network, params, rest, images, jax.random.key(0), optimizer=optimizer, **options)


def float_sibling(chip: Chip) -> Chip:
    """The chip with fp32 MACs and register ports wide enough for them, for the float32 baseline."""
    ports = chip.bandwidth_bits.at[0].set(jnp.maximum(chip.bandwidth_bits[0], 128.0))
    return dataclasses.replace(chip, mac=make_mac("fp32"), bandwidth_bits=ports)


def make_task(config: Config, dataset: Dataset) -> tuple[Task, State]:
    """The task of all methods and the state before any training, whose structure every later state has.

    Raises:
      ValueError: the model, chip or budgets are impossible; one line says which setting.
    """
    model = load_model(config.model.name, dataset, config.train.seed)
    forward, params, rest = split_model(model)
    chip = load_chip(config.chip)
    workload = trace_network(forward, params, rest, dataset, batch_size(config, dataset), config.train.optimizer)
    task = Task(
        forward=forward,
        workload=workload,
        space=design_space(chip, config.chip.free),
        optimizer=weight_optimizer(config.train),
        budgets=budgets(config, chip),
        noise_budget=math.log1p(config.precision.noise_budget),
        min_bits=config.precision.min_bits,
        max_bits=config.precision.max_bits,
        num_candidates=config.search.candidates,
        evaluations=config.search.evaluations,
        refresh_evaluations=config.search.refresh_evaluations,
    )
    precision, quant_state = calibrate(forward, params, rest, dataset, initial_rule(config.precision))
    bits = precision.bits()
    key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
    design = task.space.initial()
    prices = initial_prices(chip, bits.dtype)
    mappings = search_neighbours(task, design, bits, prices, key, start=None, evaluations=task.evaluations)
    state = State(
        params=params,
        rest=rest,
        precision=precision,
        quant_state=quant_state,
        design=design,
        opt_state=(),
        multipliers={name: jnp.zeros(()) for name in (*task.budgets, "noise")},
        mappings=mappings,
        prices=prices,
        noise=no_noise(len(precision.names)),
    )
    return task, state


def check_budgets(task: Task, state: State, names: Mapping[str, float]) -> None:
    """Refuse budgets that are out of reach before any training, each on its own.

    Area is exact: the smallest chip of the space. For the others a handful of extreme chips at the lowest widths is costed;
    a budget that none of them meets is refused with the best value found.

    Args:
      names: the budgets that the user set, in SI units.

    Raises:
      ValueError: names the setting, its value and the nearest that was found.
    """
    if not names:
        return
    bits = jnp.full((len(state.precision.names), 4), float(task.min_bits))
    work = task.workload.step, task.workload.operation_bits(bits), task.workload.tensor_bits(bits)
    options: dict[str, Any] = {"slots": task.slots, "tables": task.tables, "num_best": task.num_candidates}
    found = [
        evaluate(chip, *work, jax.random.key(i), evaluations=task.evaluations, **options).cost
        for i, chip in enumerate(_extreme_chips(task.space))
    ]
    legal = [cost for cost in found if float(cost.violation.sum()) == 0.0]
    for name, limit in names.items():
        nearest = min(float(getattr(cost, name)) for cost in (found if name == "area" else legal))
        if nearest > limit:
            setting, unit = _BUDGET_SETTINGS[name]
            raise ValueError(
                f"objective.{setting}: expected a budget that a design can meet, got {limit / unit:.4g}; the nearest found "
                f"has {nearest / unit:.4g}, raise it at least to that"
            )


def _extreme_chips(space: DesignSpace) -> list[Chip]:
    """The smallest chip, the largest, the base chip, and each of them at the lowest and at the highest supply."""
    values = physical_values(space.base)
    ends = [{name: getattr(variable, end) for name, variable in space.variables.items()} for end in ("low", "high")] + [
        {name: values[name] for name in space.variables}
    ]
    supplies = (
        [space.variables["vdd"].low, space.variables["vdd"].high] if "vdd" in space.variables else [values["vdd"]]
    )
    return [
        with_values(space.base, {name: jnp.asarray(float(value)) for name, value in (end | {"vdd": vdd}).items()})
        for end in ends
        for vdd in supplies
    ]
