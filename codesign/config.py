"""Typed settings of a run: frozen dataclasses, read from YAML, overridden on the command line, checked first.

The defaults are the demo: LeNet on scikit-learn's digits, co-designed from the `edge_trainer` chip.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import reprlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from codesign.rundir import read_yaml

MODELS = ("lenet", "mlp", "resnet8", "resnet20", "ds_cnn", "mobilenet_vww")  # `nets.models.MODELS`, without its imports


@dataclass(frozen=True)
class Between:
    """Closed range that a number must lie in; stands in the annotation of the field it limits."""

    low: float
    high: float


Count = Annotated[int, Between(1, 10**9)]
Seed = Annotated[int, Between(0, 2**32 - 1)]
Bits = Annotated[int, Between(2, 16)]
Share = Annotated[float, Between(0.0, 1.0)]
# The bounds keep out zero, negative numbers, infinities and NaN without forbidding any chip or budget one could mean.
Positive = Annotated[float, Between(1e-12, 1e12)]
# Volts: beyond, the laws of clock and leakage end in infinities, or tell of what nobody builds.
Supply = Annotated[float, Between(0.2, 2.0)]


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "lenet"
    """lenet, mlp, resnet8, resnet20, ds_cnn, mobilenet_vww, or module:function of your own, called with input_shape,
    num_classes and seed."""


@dataclass(frozen=True)
class DataConfig:
    """The data it learns from."""

    name: str = "digits"
    """digits (comes with scikit-learn), the path of a dataset in any format of docs/own-data.md, or module:function."""
    writer: Seed | None = None
    """Personalise to this synthetic writer (a seed), or user where data come by user, after training on everybody; None: not."""
    writer_samples: Count = 40
    """Samples of that writer to adapt on, the same number of each class (of a user at most half of the class)."""


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    pretrain_epochs: Count = 20
    """Passes over the training set in float32, which all methods start from."""
    epochs: Count = 60
    """Passes over the training set in the joint phase (and of every baseline)."""
    finetune_epochs: Annotated[int, Between(0, 10**6)] = 20
    """Passes with bits and chip frozen, after the design was made buildable."""
    batch_size: Count = 128
    """Samples per optimiser step; energy and latency of a training step are those of this batch."""
    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """Update rule of the weights; the chip pays for its state."""
    learning_rate: Positive = 5e-3
    """Peak learning rate of the weights."""
    augment: bool = True
    """Shift training images at random by up to a pixel."""
    seed: Seed = 0
    """Seed of initial weights, shuffles, augmentation and rounding."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Bit widths of the layers: where they start, how far they may go."""

    weights: Bits = 8
    """Initial bits of weights."""
    inputs: Bits = 8
    """Initial bits of layer inputs."""
    input_grad: Bits = 8
    """Initial bits of the backward error that input gradients are computed from."""
    weight_grad: Bits = 8
    """Initial bits of the backward error that weight gradients are computed from."""
    learn: bool = True
    """Learn the bits per layer; otherwise they stay as given."""
    min_bits: Bits = 2
    """Fewest bits any operand may get."""
    max_bits: Bits = 12
    """Most bits any operand may get."""
    noise_budget: Positive = 0.1
    """Gradient noise that low-bit backward errors may add, as the share by which it is like a smaller batch."""


@dataclass(frozen=True)
class ChipConfig:
    """The chip: a preset, what to change in it, and what the search may change. None keeps the preset's value."""

    preset: str = "edge_trainer"
    """Name of a chip in hw/chips."""
    node_nm: Positive | None = None
    """Technology node in nanometres."""
    rows: Count | None = None
    """Initial rows of the MAC array."""
    columns: Count | None = None
    """Initial columns of the MAC array."""
    local_kib: Positive | None = None
    """Initial local SRAM, which feeds the array, in KiB."""
    shared_kib: Positive | None = None
    """Initial shared SRAM in KiB."""
    vdd: Supply | None = None
    """Initial supply voltage in volts."""
    free: tuple[Literal["rows", "columns", "register_bytes", "local_kib", "shared_kib", "bandwidth", "vdd"], ...] = (
        "rows",
        "columns",
        "register_bytes",
        "local_kib",
        "shared_kib",
        "bandwidth",
        "vdd",
    )
    """What the search may change; an empty list keeps the chip."""


@dataclass(frozen=True)
class SearchConfig:
    """The search for mappings (how each operation is tiled and ordered on the chip)."""

    candidates: Count = 4
    """Mappings kept per operation, K; every joint step evaluates all of them."""
    refresh_every: Count = 100
    """Joint steps between two searches for new candidates."""
    refresh_evaluations: Count = 384
    """Mappings tried per operation and chip in such a search, which starts from those it has."""
    noise_every: Count = 200
    """Joint steps between two measurements of the noise that low-bit errors add to gradients."""
    evaluations: Count = 1600
    """Mappings tried per operation and chip where it counts: at the start, in polishing and (fourfold) at the end."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised beside the task loss, and the limits the design must keep. None is no limit."""

    cost_weights: tuple[Positive, ...] = (0.03, 0.1, 0.3)
    """Weights of log(energy x latency) of a training step against the task loss; one is chosen on validation data."""
    area_mm2: Positive | None = None
    """Largest chip area in mm2."""
    latency_ms: Positive | None = None
    """Longest training step in ms."""
    energy_uj: Positive | None = None
    """Most energy of a training step in uJ."""
    power_mw: Positive | None = None
    """Highest average power of a training step in mW."""


@dataclass(frozen=True)
class BaselinesConfig:
    """What the joint result is compared with, in the same run."""

    include: tuple[
        Literal["float32", "uniform8", "sequential", "random", "joint_without_bits", "joint_without_chip"], ...
    ] = ("float32", "uniform8", "sequential")
    """Baselines to run."""
    sequential_weights: tuple[Positive, ...] = (0.01, 0.03, 0.1, 0.2, 0.3)
    """Penalties on bit operations that the sequential baseline chooses from, on validation data."""
    random_chips: Count | None = None
    """Chips that the random baseline draws; None: as many as make its evaluations those of the joint search."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    precision: PrecisionConfig = PrecisionConfig()
    chip: ChipConfig = ChipConfig()
    search: SearchConfig = SearchConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    out: str | None = None
    """Run directory to create; None makes the next free runs/MODEL-DATA-NUMBER."""


def load_config(path: Path) -> Config:
    """Read a YAML file; what it leaves out keeps its default.

    Raises:
      ValueError: not YAML, an unknown key, a wrong type or a value out of range; one line with path and remedy.
      FileNotFoundError: no such file.
    """
    data = read_yaml(path)
    return config_from_dict({} if data is None else data, source=str(path))


def config_from_dict(data: Any, source: str = "config") -> Config:
    """Config of a nested dict with plain values.

    Raises:
      ValueError: as `load_config`; `source` says where in the message.
    """
    config = _section(Config, data, "", source)
    check_config(config, source)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain values, which `config_from_dict` turns back into an equal Config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump_config(config: Config) -> str:
    """YAML text that `load_config` reads back."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=False)


def fingerprint(config: Config) -> str:
    """Digest of everything that decides a run's numbers, hence not of where they are written."""
    settings = {key: value for key, value in config_to_dict(config).items() if key != "out"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_ranges(settings: Any, source: str) -> None:
    """Check every number in a dataclass, and in those inside it, against the `Between` of its annotation.

    Raises:
      ValueError: the first that lies outside.
    """
    for path, annotation, value in _leaves(settings):
        check_range(path, annotation, value, source)


def check_range(name: str, annotation: Any, value: Any, source: str) -> None:
    """Check a number, or a tuple of them, against the `Between` of its annotation, where it has one.

    Raises:
      ValueError: it lies outside.
    """
    limits = next((mark for mark in _marks(annotation) if isinstance(mark, Between)), None)
    for number in value if isinstance(value, tuple) else (value,):
        if limits and number is not None and not limits.low <= number <= limits.high:
            raise ValueError(
                f"{name} in {source}: expected a number from {limits.low:g} to {limits.high:g}, got {number}; "
                f"change it or leave it out for the default"
            )


def check_config(config: Config, source: str = "config") -> None:
    """Check ranges, names and combinations, which types alone do not.

    Raises:
      ValueError: the first setting that does not fit.
    """
    check_ranges(config, source)
    name = config.model.name
    if name not in MODELS and ":" not in name:
        raise ValueError(
            f"model.name in {source}: unknown model {name!r}; nearest valid name: {nearest(name, MODELS)!r} "
            f"(or module:function of your own factory)"
        )
    precision = config.precision
    for operand in ("weights", "inputs", "input_grad", "weight_grad"):
        if not precision.min_bits <= (bits := getattr(precision, operand)) <= precision.max_bits:
            raise ValueError(
                f"precision.{operand} in {source}: {bits} bits lie outside precision.min_bits to max_bits "
                f"({precision.min_bits} to {precision.max_bits}); move it inside or widen them"
            )
    if "sequential" in config.baselines.include and not config.baselines.sequential_weights:
        raise ValueError(
            f"baselines.sequential_weights in {source}: empty; give at least one or drop 'sequential' from "
            f"baselines.include"
        )
    if not config.objective.cost_weights:
        raise ValueError(f"objective.cost_weights in {source}: empty; give at least one, such as 0.1")


def nearest(name: str, valid: list[str] | tuple[str, ...]) -> str:
    """The valid dotted name most like `name`, as a whole or in its last part (a key in the wrong section)."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.split(".")[-1], candidate.split(".")[-1]).ratio()
        return whole + last

    return max(valid, key=likeness)


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, annotation, value) of every setting."""
    hints = get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], value


def _marks(annotation: Any) -> Iterator[Any]:
    """Every Annotated mark inside an annotation, through unions and tuples."""
    if get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for part in get_args(annotation):
        if get_origin(part) is not None:
            yield from _marks(part)


def _section(cls: type, data: Any, prefix: str, source: str) -> Any:
    """Instance of the dataclass `cls` from a dict, by type, depth first."""
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{prefix[:-1] or 'the whole file'} in {source}: expected a section of 'key: value' lines, "
            f"got {reprlib.repr(data)}; indent its settings below it"
        )
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in data.items():
        path = f"{prefix}{key}"[:80]
        if key not in hints:
            names = [name for name, *_ in _leaves(Config())] + [field.name for field in dataclasses.fields(Config)]
            raise ValueError(f"unknown key {path!r} in {source}; nearest valid name: {nearest(path, names)!r}")
        default = getattr(cls(), key)
        if dataclasses.is_dataclass(default):
            values[key] = _section(type(default), value, f"{path}.", source)
        else:
            try:
                values[key] = _convert(hints[key], value)
            except TypeError as error:
                raise ValueError(f"{path} in {source}: {error}; the default is {json.dumps(default)}") from None
    return cls(**values)


def _convert(annotation: Any, value: Any) -> Any:
    """`value` as the annotated type; TypeError says in words what was expected and what came."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _convert(arguments[0], value)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(arguments[0], value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected a list, got {reprlib.repr(value)}")
        return tuple(_convert(arguments[0], item) for item in value)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise TypeError(f"expected one of {', '.join(arguments)}, got {reprlib.repr(value)}")
    elif annotation is float:
        return _finite(value)
    elif type(value) is not annotation:  # not isinstance: bool is a subclass of int
        wanted = {int: "a whole number", bool: "true or false", str: "text"}[annotation]
        raise TypeError(f"expected {wanted}, got {reprlib.repr(value)}")
    return value


def _finite(value: Any) -> float:
    """A finite float; YAML reads 1e-3, without a dot, as text."""
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TypeError(f"expected a finite number, got {reprlib.repr(value)}")
    return number
