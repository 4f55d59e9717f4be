"""Technology: sourced constants of one process, and how they scale with node and supply voltage.

A `Technology` is a table of named constants in SI units, a pytree of floats, so that `vmap` runs any cost over sampled
technologies. Values, error bounds, ranges of validity and sources are in `hw/data/*.yaml`.
"""

import dataclasses
import difflib
import functools
import importlib.resources
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from hw.units import UNITS

NODE_RANGE_NM = (7, 65)
PROCESSES = ("general", "low_power")
DEVICES = ("hp", "lop", "lstp")


@dataclass(frozen=True)
class Constant:
    """One constant with its error bounds; value, low and high in `unit` (SI once it is in a `Technology`)."""

    value: float
    low: float
    high: float
    unit: str
    range: str
    source: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Technology:
    """Constants of one process in SI units and bits, by dotted name: `technology["sram.energy.k"]`.

    Attributes:
      values: constants, each shape () (or with a leading axis of samples, see `sample_technologies`).
      node_nm: feature size in nanometres.
      process: "general" or "low_power": nominal supply and threshold of the logic.
      device: transistors of the SRAM cells, "hp", "lop" or "lstp" (high performance, low operating, low standby power).
      dram: kind of the external memory.
    """

    values: dict[str, jax.Array | float]
    node_nm: float = dataclasses.field(metadata={"static": True})
    process: str = dataclasses.field(metadata={"static": True})
    device: str = dataclasses.field(metadata={"static": True})
    dram: str = dataclasses.field(metadata={"static": True})

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(unknown("constant", name, self.values))
        return self.values[name]

    def constant(self, name: str) -> Constant:
        """The sourced record behind a constant. Raises ValueError for an unknown name."""
        self[name]
        return load_constants(self.node_nm, self.process, self.device, self.dram)[name]

    def source(self, name: str) -> str:
        """Where a constant comes from. Raises ValueError for an unknown name."""
        return self.constant(name).source


def make_technology(
    node_nm: float = 28, *, process: str = "general", device: str = "lstp", dram: str = "LPDDR4"
) -> Technology:
    """The constants of one process.

    Args:
      node_nm: feature size, 7 to 65; between tabulated nodes constants are interpolated geometrically. beyond
        them the nearest holds. SRAM laws are fitted for 65 to 22 nm and extrapolate below.
      process: "general" (GP, HPC) or "low_power" (LP) logic.
      device: SRAM cell transistors; foundries' cells leak little, hence "lstp".
      dram: external memory, "DDR3" to "HBM3".

    Raises:
      ValueError: a node out of range, an unknown process, device or DRAM kind; the message names the nearest known one.
    """
    smallest, largest = NODE_RANGE_NM
    if not smallest <= node_nm <= largest:
        nearest = largest if node_nm > largest else smallest
        raise ValueError(f"expected node_nm from {smallest} to {largest}, got {node_nm:g}; the nearest is {nearest}")
    _check("process", process, PROCESSES)
    _check("device", device, DEVICES)
    _check("dram", dram, _tables()["dram.energy"]["options"])
    constants = load_constants(node_nm, process, device, dram)
    return Technology({name: constant.value for name, constant in constants.items()}, node_nm, process, device, dram)


def sample_technologies(key: jax.Array, num: int, technology: Technology | None = None) -> Technology:
    """Draws `num` technologies: every constant log-triangular in [low, high] with its mode at the value.

    A constant that was given another value than its process has takes its bounds with it.

    Constants are drawn once per technology, so whatever shares a constant moves together. Costs of the samples:
    `jax.vmap(lambda t: evaluate(replace(chip, technology=t), ...))(samples)`.

    Args:
      key: PRNG key.
      num: number of samples.
      technology: the process to sample around; default `make_technology()`.

    Returns:
      A technology whose values have shape (num,).
    """
    technology = make_technology() if technology is None else technology
    constants = load_constants(technology.node_nm, technology.process, technology.device, technology.dram)
    names = sorted(constants)
    low, mode, high = np.array([(constants[n].low, constants[n].value, constants[n].high) for n in names]).T[..., None]
    uniform = np.asarray(jax.random.uniform(key, (len(names), num)))
    own = np.array([technology[name] for name in names], float)[:, None]
    drawn = own * _triangular_factor(uniform, np.log(low / mode), np.log(high / mode))
    return dataclasses.replace(technology, values={n: jnp.asarray(row) for n, row in zip(names, drawn, strict=True)})


def logic_energy_scale(technology: Technology, vdd: jax.Array | float) -> jax.Array:
    """Dynamic energy of logic relative to 45 nm at 0.9 V: node ratio at nominal voltage, then vdd squared. Shape ().

    Source: Stillmaker & Baas 2017 for the ratio, at nominal voltage only: their polynomials in vdd are not monotone.
    """
    return technology["node.energy"] * (vdd / technology["node.vdd"]) ** 2


def drive_current(technology: Technology, vdd: jax.Array | float) -> jax.Array:
    """On-current of a gate in arbitrary units, smooth from below to above threshold. Shape ().

    I = ln(1 + exp((vdd (1 + dibl) - vth) / (alpha n phi_t)))**alpha: the EKV interpolation, whose exponent alpha below
    2 stands for velocity saturation; it has no pole at vth, as the alpha-power law has.

    Source: Enz, Krummenacher & Vittoz 1995; Sakurai & Newton, JSSC 25(2) 1990.
    """
    alpha = technology["supply.alpha"]
    scale = alpha * technology["supply.slope"] * technology["supply.thermal_voltage"]
    overdrive = vdd * (1.0 + technology["supply.dibl"]) - technology["supply.vth"]
    return jax.nn.softplus(overdrive / scale) ** alpha


def clock_frequency(technology: Technology, vdd: jax.Array | float) -> jax.Array:
    """Highest clock in Hz at a supply: nominal clock times relative current over relative voltage. Shape ().

    Published chips run 1.3x to 10x slower than this near threshold (margins, SRAM): where pairs of supply and frequency
    are known, `measured_clock` follows them.
    """
    nominal_vdd = technology["supply.vdd"]
    nominal = 1.0 / (technology["clock.depth"] * technology["node.delay"])
    drive = drive_current(technology, vdd) / drive_current(technology, nominal_vdd)
    return nominal * drive * nominal_vdd / vdd


def measured_clock(technology: Technology, vdd: jax.Array, pairs: jax.Array) -> jax.Array:
    """Clock in Hz at a supply, through measured pairs: log-linear between them, beyond them as the law goes. Shape ().

    Args:
      technology: constants; they matter beyond the pairs only.
      vdd: supply in volts, shape ().
      pairs: supply in volts and clock in Hz, shape (n, 2), both rising.
    """
    supplies, logarithms = pairs[:, 0], jnp.log(pairs[:, 1])
    # Not a clip: at the ends, where chips are measured, its gradient would be a mixture. It is the law's there.
    inside = jnp.where(vdd <= supplies[0], supplies[0], jnp.where(vdd >= supplies[-1], supplies[-1], vdd))
    clock = logarithms[0]
    for below in range(len(pairs) - 1):
        share = (inside - supplies[below]) / (supplies[below + 1] - supplies[below])
        between = (1.0 - share) * logarithms[below] + share * logarithms[below + 1]
        clock = jnp.where(inside > supplies[below], between, clock)
    return jnp.exp(clock) * clock_frequency(technology, vdd) / clock_frequency(technology, inside)


def leakage_scale(technology: Technology, vdd: jax.Array | float, nominal_vdd: jax.Array | float) -> jax.Array:
    """Leakage power at `vdd` relative to that at `nominal_vdd`: V I_off(V), I_off by barrier lowering. Shape ().

    Source: subthreshold limit of the EKV current, exp(dibl V / (n phi_t)).
    """
    slope = technology["supply.slope"] * technology["supply.thermal_voltage"]
    return vdd / nominal_vdd * jnp.exp(technology["supply.dibl"] * (vdd - nominal_vdd) / slope)


@functools.cache
def load_constants(node_nm: float, process: str, device: str, dram: str) -> dict[str, Constant]:
    """All constants of one process, in SI units, by name; read once."""
    choice = {"node": node_nm, "process": process, "device": device, "dram": dram}
    constants = {name: _to_si(_select(entry, choice)) for name, entry in _tables().items()}
    node = float(node_nm)
    return constants | {"node.nm": Constant(node, node, node, "1", "feature size in nanometres", "chosen")}


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name, with the nearest known one."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"expected a known {what}, got {name!r}; the nearest is {nearest[0]!r}"


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for file in sorted((importlib.resources.files("hw") / "data").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            tables |= yaml.safe_load(file.read_text())
    return tables


def _select(entry: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    """Follows "by" to the options of this process.

    Between tabulated nodes the value is interpolated geometrically in log(node); beyond them the nearest holds.
    """
    if "by" not in entry:
        return entry
    axis, options = entry["by"], entry["options"]
    common = {key: text for key, text in entry.items() if key not in ("by", "options")}
    node = min(max(choice["node"], min(options)), max(options)) if axis == "node" else choice[axis]
    if node in options:
        return _select(common | options[node], choice)
    above = min(known for known in options if known > node)
    below = max(known for known in options if known < node)
    share = math.log(node / below) / math.log(above / below)
    left, right = options[below], options[above]
    return common | {bound: left[bound] ** (1 - share) * right[bound] ** share for bound in ("value", "low", "high")}


def _to_si(entry: dict[str, Any]) -> Constant:
    unit = UNITS[entry["unit"]]
    bounds = {bound: float(entry[bound]) * unit for bound in ("value", "low", "high")}
    return Constant(**bounds, unit=entry["unit"], range=entry["range"], source=entry["source"])


def _triangular_factor(uniform: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """exp of the inverse distribution function of a triangle from low <= 0 to high >= 0 with its mode at 0."""
    width = high - low
    rising = low + np.sqrt(uniform * width * -low)
    falling = high - np.sqrt((1.0 - uniform) * width * high)
    return np.exp(np.where(uniform * width < -low, rising, falling))


def _check(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(unknown(what, name, known))
