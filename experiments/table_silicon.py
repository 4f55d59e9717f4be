"""Published chips: what the cost model says, with nothing fitted, beside what the chips report.

    python -m experiments.table_silicon                    # all chips; takes a minute or two
    python -m experiments.table_silicon --only unpu rapid
    python -m experiments.table_silicon --page docs/systems.md --plot docs/images/silicon.svg

Ours is core power (no DRAM) at full use of the array: a 3 x 3 convolution over 32 x 32 outputs, its channels four times
the side of the square array, under the cheapest of the mappings of `make_tilings` that fits. Intervals are the central
90 % over samples of all constants and of all assumptions together. Ratios inside a chip come first: they need the least
of what is not public. Calibrated is the same with one factor per node, fitted on the *other* chips of that node.

Aim: median error of efficiency within 35 %, every chip within 2.5x, 80 % inside intervals no wider than 4x; ratios
within 15 % median; calibrated within 20 %.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import sys
from collections.abc import Mapping as Map
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
import yaml
from rich.console import Console
from rich.table import Table

from codesign.config import Count
from experiments import command_line
from experiments.dram_traffic import dram_per_mac
from hw.accesses import count
from hw.arithmetic import make_mac, partial_sum_bits, product_cycles, product_energy
from hw.chip import Chip
from hw.chips import PRESETS, Preset
from hw.cost import price
from hw.mapping import Mapping
from hw.operation import LOOPS, Operation
from hw.technology import clock_frequency, sample_technologies, unknown
from hw.units import MM2

CHANNELS, OUTPUTS, TAPS = 4.0, 32.0, 3.0
UNITS = {
    "efficiency": "TOPS/W", "throughput": "GOPS", "area": "mm2", "ratio": "x", "speedup": "x", "table": "x",
    "dram": "words/MAC",
}  # fmt: skip
RATIOS = {"ratio": "efficiency", "speedup": "throughput"}
STATISTICS = ("n", "median_error", "worst_ratio", "inside_interval", "median_interval_ratio")
PARTS = {
    "ratios": "ratios inside a chip",
    "throughput": "throughput",
    "speedups": "throughput over that of wider operands",
    "look_up_tables": "energy of look-up MACs over plain ones",
    "uncalibrated": "efficiency, uncalibrated",
    "calibrated": "efficiency, one factor per node fitted on other chips",
    "area": "area",
    "dram": "DRAM accesses of a MAC",
}
PARTS_OF_ENERGY = ("MACs", "registers", "local", "shared", "clock and control", "leakage")
MARKS = ("<!-- table_silicon -->", "<!-- end of table_silicon -->")
PERCENTILES = (5, 95)
# Published figures are rounded to three digits.
ROUNDING = 5e-3


class Peak(NamedTuple):
    """What a chip does at full use of its array; each of shape (n,), the first entry without doubt, then the samples.

    `energy` is the first entry's alone: joules per product by `PARTS_OF_ENERGY`, shape (6,).
    """

    efficiency: np.ndarray
    energy: np.ndarray
    throughput: np.ndarray
    area: np.ndarray
    table: np.ndarray


@dataclass(frozen=True)
class Row:
    """One published figure beside ours, in `unit`; `compared` where it enters the statistics of its kind.

    `energy_pj` is what one product costs us in that mode at that supply, by `PARTS_OF_ENERGY`.
    """

    kind: str
    name: str
    published: float
    ours: float
    low: float
    high: float
    unit: str
    inside: bool
    compared: bool
    confidence: str
    source: str
    energy_pj: dict[str, float]

    @property
    def ratio(self) -> float:
        """Ours over published."""
        return self.ours / self.published


def read_headlines() -> dict[str, list[dict[str, Any]]]:
    """What the chips report, by preset."""
    return yaml.safe_load((importlib.resources.files("hw") / "chips" / "headlines.yaml").read_text())


def make_tilings() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tilings of the workload over register, local, shared memory and DRAM: factors (m, 4, 8), order, keep (m, 4, 3).

    Which operands rest in the registers, how much of each loop is done there, in the local and in the shared memory, and
    whether weights or outputs rest while the loops run.
    """
    index = {loop: i for i, loop in enumerate(LOOPS)}
    orders = [[index[loop] for loop in order] for order in ("PQRSCKNG", "CRSPQKNG")]
    factors, ranks, keeps = [], [], []
    choices = itertools.product(
        ((1, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)),  # operands in the registers
        (1, 4, 16), (1, 4),  # outputs and channels there
        (1, 4, 32), (1, 3), (1, 4), (1, 4),  # rows of outputs, of taps, channels in and out in the local memory
        (2, 3), (2, 3), orders,  # where the rest of the rows and of the channels runs
    )  # fmt: skip
    for registers, p0, c0, q1, taps1, c1, k1, rows_at, channels_at, order in choices:
        nothing_left = (rows_at > 2 and q1 == OUTPUTS) or (channels_at > 2 and c0 * c1 == k1 == CHANNELS)
        if c0 * c1 > CHANNELS or nothing_left:
            continue
        temporal = np.ones((4, len(LOOPS)))
        temporal[0, [index["P"], index["C"]]] = p0, c0
        temporal[1, [index[loop] for loop in "PQRSCK"]] = OUTPUTS / p0, q1, taps1, taps1, c1, k1
        temporal[rows_at, index["Q"]] = OUTPUTS / q1
        temporal[2, [index["R"], index["S"]]] = TAPS / taps1
        temporal[channels_at, [index["C"], index["K"]]] = CHANNELS / (c0 * c1), CHANNELS / k1
        factors.append(temporal)
        ranks.append(np.tile(np.argsort(order), (4, 1)))
        keeps.append([registers, (1, 1, 1), (1, 1, 1), (1, 1, 1)])
    return np.array(factors), np.array(ranks, np.int32), np.array(keeps, float)


@jax.jit
def evaluate_peak(chips: Chip, bits: jax.Array) -> jax.Array:
    """Joules per product of chips (n,) at widths (n, 3), split into `PARTS_OF_ENERGY`, shape (n, 6).

    At the cheapest mapping that fits; infinite where none does.
    """
    factors, ranks, keeps = (jnp.asarray(array) for array in make_tilings())

    def of_chip(args: tuple[Chip, jax.Array]) -> jax.Array:
        chip, bits = args
        leakage, frequency = chip.leakage_power(), chip.frequency()
        columns, rows = chip.fanout.prod(axis=0)
        one = jnp.ones((), bits.dtype)
        bounds = jnp.stack([one, one, CHANNELS * columns, CHANNELS * rows, *(one * OUTPUTS,) * 2, *(one * TAPS,) * 2])
        taps = jnp.full(2, OUTPUTS * TAPS, bits.dtype)
        operation = Operation(bounds, jnp.ones(2), jnp.ones(2), taps, jnp.array([0.0, 0.0, 1.0]))
        spatial = jnp.ones((len(chip.kinds), 2, len(LOOPS)))
        spatial = spatial.at[:, 0, LOOPS.index("K")].set(chip.fanout[:, 0])
        spatial = spatial.at[:, 1, LOOPS.index("C")].set(chip.fanout[:, 1])

        def of_tiling(temporal: jax.Array, order: jax.Array, keep: jax.Array) -> jax.Array:
            accesses = count(operation, Mapping(temporal, spatial, order, keep))
            cost = price(chip, operation, accesses, bits, jnp.ones(2), jnp.zeros(3))
            # Core power is measured with data on the chip: neither joules nor cycles of DRAM.
            seconds = jnp.maximum(cost.compute_cycles, cost.level_cycles[:-1].max()) / frequency
            memories = cost.access_energy[:-1].sum(axis=1)
            joules = jnp.stack([cost.mac_energy, *memories, cost.control_energy, leakage * seconds])
            # The array is filled exactly, up to rounding of its side.
            fits = cost.violation.sum() < 1e-3
            return jnp.where(fits, joules / cost.macs, jnp.inf)

        joules = jax.vmap(of_tiling)(factors, ranks, keeps)
        return joules[jnp.argmin(joules.sum(axis=1))]

    return jax.lax.map(of_chip, (chips, bits))


def sample_chip(preset: Preset, samples: int) -> tuple[list[dict[str, float]], list[Any]]:
    """Assumed numbers and technologies of a preset: the chosen ones, then `samples` draws of both."""
    assumed, rng = preset.assumed(), np.random.default_rng(0)
    draws = [{key: it.value for key, it in assumed.items()}]
    for _ in range(samples):
        bounds = {key: np.log([it.low, it.value, it.high]) for key, it in assumed.items()}
        draws.append({key: float(np.exp(rng.triangular(*three))) for key, three in bounds.items()})
    drawn = sample_technologies(jax.random.key(0), samples, preset.technology())
    return draws, [preset.technology(), *(jax.tree.map(lambda x: x[i], drawn) for i in range(samples))]  # noqa: B023


@functools.cache
def measure(name: str, mode: str, vdd: float | None, samples: int) -> Peak:
    """A published chip in one mode at one supply, as `measure_preset` finds it."""
    return measure_preset(PRESETS[name], mode, vdd, samples)


def measure_preset(preset: Preset, mode: str, vdd: float | None, samples: int) -> Peak:
    """A preset in one mode at one supply.

    Raises:
      ValueError: no mapping fits the chip as it is assumed to be.
    """
    draws, technologies = sample_chip(preset, samples)
    chips = [preset.make(mode, vdd, values, its) for values, its in zip(draws, technologies, strict=True)]
    widths = [(*preset.bits(mode, values), preset.bits(mode, values)[1]) for values in draws]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]), *chips)
    joules = np.asarray(evaluate_peak(stacked, jnp.array(widths, jnp.float32)), float)
    if not np.isfinite(joules[0]).all():
        raise ValueError(f"{preset.title}, {mode}: no mapping of the workload fits; enlarge its registers or SRAM")
    speed = [
        float(chip.num_macs() * chip.frequency() / product_cycles(chip.mac, jnp.array(width[:2], jnp.float32)))
        for chip, width in zip(chips, widths, strict=True)
    ]
    return Peak(
        # A sample whose memories are too small for every mapping says nothing about the chip.
        efficiency=np.where(np.isfinite(joules).all(axis=1), 2e-12 / joules.sum(axis=1), np.nan),
        energy=joules[0],
        throughput=2e-9 * np.array(speed),
        area=np.array([float(chip.area().total) for chip in chips]) / MM2,
        table=np.array([look_up_energy(chip, width) for chip, width in zip(chips, widths, strict=True)]),
    )


def look_up_energy(chip: Chip, bits: Sequence[float]) -> float:
    """Energy of a product on the chip's MACs over that on plain ones of just these widths, an accumulator each."""
    if chip.mac.style != "lut":
        return np.nan
    widths = jnp.array(bits[:2], jnp.float32)
    sum_bits = partial_sum_bits(chip.mac, widths, jnp.float32(512))
    plain = make_mac("fixed", (float(bits[0]), float(bits[1])))
    ours, theirs = (product_energy(mac, chip.technology, chip.vdd, widths, sum_bits) for mac in (chip.mac, plain))
    return float(ours / theirs)


def make_row(name: str, headline: Map[str, Any], samples: int) -> Row:
    """One headline beside ours."""
    kind, mode, vdd = headline["kind"], headline["mode"], headline["vdd"]
    peak = measure(name, mode, vdd, samples)
    supply = "" if vdd is None else f", {vdd:g} V"
    label = f"{kind}, {mode}{supply}"
    if kind in RATIOS:
        of = RATIOS[kind]
        base = measure(name, headline["base_mode"], headline["base_vdd"], samples)
        values = getattr(peak, of) / getattr(base, of)
        over = "" if headline["base_vdd"] is None else f", {headline['base_vdd']:g} V"
        label = f"{of}, {mode}{supply} over {headline['base_mode']}{over}"
    elif kind == "dram":
        values, label = dram_per_mac(name, mode, vdd, headline["network"]), f"DRAM accesses, {headline['network']}"
    else:
        values = getattr(peak, kind)
    low, high = np.nanpercentile(values[1:], PERCENTILES)
    published = float(headline["published"])
    return Row(
        kind=kind, name=label, published=published, ours=float(values[0]), low=float(low), high=float(high),
        unit=UNITS[kind], inside=_is_inside(published, low, high),
        compared=not headline.get("derived", False) and not headline.get("sparsity", 0.0),
        confidence=headline["confidence"], source=headline["source"],
        energy_pj=dict(zip(PARTS_OF_ENERGY, (1e12 * peak.energy).tolist(), strict=True)),
    )  # fmt: skip


def summarise(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """Median error, worst factor either way, share inside the interval and its median width; None without rows."""
    if not rows:
        return dict.fromkeys(STATISTICS) | {"n": 0}
    ratios = np.array([row.ratio for row in rows])
    values = (
        len(rows),
        float(np.median(np.abs(ratios - 1.0))),
        float(np.maximum(ratios, 1.0 / ratios).max()),
        float(np.mean([row.inside for row in rows])),
        float(np.median([row.high / row.low for row in rows])),
    )
    return dict(zip(STATISTICS, values, strict=True))


def calibrate(rows: Map[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Efficiencies times the factor that the other chips of the node ask for; none where there is no other chip.

    The factor is the geometric mean over chips of published over ours, each chip being the mean of its own figures.
    """
    used = {name: [row for row in chip if row.kind == "efficiency" and row.compared] for name, chip in rows.items()}
    logs = {name: float(np.mean([-np.log(row.ratio) for row in chip])) for name, chip in used.items() if chip}
    calibrated = {}
    for name in logs:
        node = PRESETS[name].node_nm.value
        others = [log for other, log in logs.items() if other != name and PRESETS[other].node_nm.value == node]
        if others:
            calibrated[name] = [_scaled(row, float(np.exp(np.mean(others)))) for row in used[name]]
    return calibrated


def _scaled(row: Row, factor: float) -> Row:
    low, high = row.low * factor, row.high * factor
    inside = _is_inside(row.published, low, high)
    return dataclasses.replace(row, ours=row.ours * factor, low=low, high=high, inside=inside)


def _is_inside(published: float, low: float, high: float) -> bool:
    return bool(low * (1.0 - ROUNDING) <= published <= high * (1.0 + ROUNDING))


def clock_row(name: str, samples: int) -> dict[str, Any] | None:
    """Clock at the highest over that at the lowest supply: measured, and by the law that chips without pairs follow."""
    pairs = PRESETS[name].clock.value
    if len(pairs) < 2:
        return None
    (low_vdd, slow), (high_vdd, fast) = pairs[0], pairs[-1]
    ratios = [
        float(clock_frequency(t, high_vdd) / clock_frequency(t, low_vdd))
        for t in sample_chip(PRESETS[name], samples)[1]
    ]
    low, high = np.percentile(ratios[1:], PERCENTILES)
    return {
        "vdd": [low_vdd, high_vdd], "published": fast / slow, "ours": ratios[0], "low": float(low), "high": float(high),
        "inside": _is_inside(fast / slow, low, high),
    }  # fmt: skip


def tabulate(names: Sequence[str], samples: int) -> dict[str, Any]:
    """All rows and statistics as one object for JSON."""
    headlines = read_headlines()
    rows = {name: [make_row(name, headline, samples) for headline in headlines[name]] for name in names}
    calibrated = calibrate(rows)
    kinds = {
        kind: [row for chip in rows.values() for row in chip if row.kind == kind and row.compared] for kind in UNITS
    }
    return {
        "uncalibrated": summarise(kinds["efficiency"]),
        "calibrated": summarise([row for chip in calibrated.values() for row in chip]),
        "ratios": summarise(kinds["ratio"]),
        "look_up_tables": summarise(kinds["table"]),
        "throughput": summarise(kinds["throughput"]),
        "speedups": summarise(kinds["speedup"]),
        "area": summarise(kinds["area"]),
        "dram": summarise(kinds["dram"]),
        "clock": {name: row for name in names if (row := clock_row(name, samples)) is not None},
        "chips": {
            name: {
                "title": PRESETS[name].title,
                "num_assumed": len(PRESETS[name].assumed()),
                "assumptions": {key: dataclasses.asdict(it) for key, it in PRESETS[name].assumed().items()},
                "rows": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows[name]],
                "calibrated": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in calibrated.get(name, ())],
            }
            for name in names
        },
        "samples": samples,
    }  # fmt: skip


def show(table: Map[str, Any]) -> None:
    """Print the table for people."""
    rich = Table(title="Published chips, uncalibrated")
    for heading in ("chip", "figure", "published", "ours", "interval", "ours / published", "inside"):
        rich.add_column(heading)
    for chip in table["chips"].values():
        for row in chip["rows"]:
            rich.add_row(chip["title"], *_cells(row))
    console = Console(width=150)
    console.print(rich)
    for part in PARTS:
        if table[part]["n"]:
            console.print(f"{PARTS[part]}: " + ", ".join(f"{key} {value:.3g}" for key, value in table[part].items()))
    for name, row in table["clock"].items():
        console.print(f"clock of {name}: {row['published']:.3g}x measured, {row['ours']:.3g}x by the law")


def _cells(row: Map[str, Any]) -> tuple[str, ...]:
    inside = ("yes" if row["inside"] else "no") if row["compared"] else "not compared"
    interval = f"{row['low']:.3g} to {row['high']:.3g}"
    return (
        row["name"],
        f"{row['published']:g} {row['unit']}",
        f"{row['ours']:.3g}",
        interval,
        f"{row['ratio']:.2f}",
        inside,
    )


def markdown(table: Map[str, Any]) -> str:
    """Statistics, figures, clocks and assumptions as Markdown."""
    lines = ["| | n | median error | worst factor | inside | width of interval |", "|---|---|---|---|---|---|"]
    for part in (part for part in PARTS if table[part]["n"]):
        n, error, worst, inside, width = (table[part][key] for key in STATISTICS)
        lines.append(f"| {PARTS[part]} | {n} | {error:.1%} | {worst:.2f}x | {inside:.0%} | {width:.2f}x |")
    lines += ["", "| chip | figure | published | ours | interval | ours / published | inside | confidence, source |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for chip in table["chips"].values():
        for row in chip["rows"]:
            cells = chip["title"], *_cells(row), f"{row['confidence']}; {row['source']}"
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| pJ per product | published | {' | '.join(PARTS_OF_ENERGY)} |", "|---" * 8 + "|"]
    for chip in table["chips"].values():
        for row in (row for row in chip["rows"] if row["kind"] == "efficiency"):
            parts = " | ".join(f"{part:.3g}" for part in row["energy_pj"].values())
            lines.append(f"| {chip['title']}, {row['name']} | {2.0 / row['published']:.3g} | {parts} |")
    lines += [
        "",
        "| clock at the highest over the lowest supply | measured | by the law | interval |",
        "|---|---|---|---|",
    ]
    for name, row in table["clock"].items():
        supplies = f"{table['chips'][name]['title']}, {row['vdd'][1]} V over {row['vdd'][0]} V"
        interval = f"{row['low']:.3g}x to {row['high']:.3g}x"
        lines.append(f"| {supplies} | {row['published']:.3g}x | {row['ours']:.3g}x | {interval} |")
    lines += ["", "| assumed | for | value | range | why |", "|---|---|---|---|---|"]
    for (name, value, low, high, reason), titles in _assumptions(table).items():
        who = "all that do not tell it" if len(titles) > 2 else ", ".join(titles)
        lines.append(f"| {name} | {who} | {value:g} | {low:g} to {high:g} | {reason} |")
    return "\n".join(lines)


def _assumptions(table: Map[str, Any]) -> dict[tuple[Any, ...], list[str]]:
    """Titles of the chips by (name, value, low, high, reason)."""
    assumptions: dict[tuple[Any, ...], list[str]] = {}
    for chip in table["chips"].values():
        for name, it in chip["assumptions"].items():
            key = name, it["value"], it["low"], it["high"], it["reason"]
            assumptions.setdefault(key, []).append(chip["title"])
    return assumptions


def replace_between(page: Path, marks: tuple[str, str], content: str) -> None:
    """Replaces what stands between two marks of a page.

    Raises:
      ValueError: the page has not these marks.
    """
    text = page.read_text()
    if any(text.count(mark) != 1 for mark in marks):
        raise ValueError(f"expected {page} to hold the lines {marks[0]} and {marks[1]} once each; add them")
    before, rest = text.split(marks[0])
    after = rest.split(marks[1])[1]
    page.write_text(f"{before}{marks[0]}\n\n{content}\n\n{marks[1]}{after}")


def plot_efficiency(table: Map[str, Any], path: Path) -> None:
    """Ours against published efficiency with intervals; the line is equality, the band a factor of 2.5."""
    import matplotlib.pyplot as plt  # half a second to import: only who plots pays for it

    figure, axis = plt.subplots(figsize=(7, 5))
    for chip in table["chips"].values():
        rows = [row for row in chip["rows"] if row["kind"] == "efficiency" and row["compared"]]
        published, ours = ([row[key] for row in rows] for key in ("published", "ours"))
        for row in rows:
            axis.plot([row["published"]] * 2, [row["low"], row["high"]], color="0.7", zorder=1)
        axis.scatter(published, ours, label=chip["title"], zorder=2)
    ends = np.array([0.1, 100.0])
    axis.plot(ends, ends, color="black", linewidth=1)
    axis.fill_between(ends, ends / 2.5, ends * 2.5, color="0.93", zorder=0)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="published TOPS/W", ylabel="ours, TOPS/W")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(
    only: tuple[str, ...] = (),
    samples: Count = 64,
    plot: Path | None = None,
    page: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compare and tabulate.

    Args:
      only: presets to compare; by default all that have headlines of their own.
      samples: draws of constants and assumptions behind an interval.
      plot: where to draw predicted against published efficiency.
      page: Markdown file whose tables are renewed, docs/systems.md.
      as_json: print one JSON object instead of the table.
    """
    known = read_headlines()
    for name in only:
        if name not in known:
            raise ValueError(unknown("chip", name, known))
    table = tabulate(only or tuple(known), samples)
    if plot is not None:
        plot_efficiency(table, plot)
    if page is not None:
        replace_between(page, MARKS, markdown(table))
    if as_json:
        print(json.dumps(table))
    else:
        show(table)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
