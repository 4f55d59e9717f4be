"""Published chips: what the cost model says, with nothing fitted, beside what the chips report.

    python -m experiments.table_silicon                    # all chips; takes five minutes
    python -m experiments.table_silicon --only unpu rapid
    python -m experiments.table_silicon --page docs/systems.md --plot docs/images/silicon.svg

Ours is core power (no DRAM) at full use of the array: a 3 x 3 convolution over 32 x 32 outputs, its channels four times
the side of the square array, under the cheapest of the mappings of `make_tilings` that fit. A figure told of a network is
compared with ours on that network. Intervals are the central 90 % over samples of all constants, times the range over the
assumptions, one moved at a time. Ratios inside a chip come first: they need the least of what is not public. Calibrated is
the same with one factor per node and kind of arithmetic, fitted on the *other* chips of that family.

Aim: median error of efficiency within 35 %, every chip within 2.5x, 80 % inside intervals no wider than 4x; ratios
within 15 % median; calibrated within 20 %.
"""

import dataclasses
import importlib.resources
import json
import sys
from collections.abc import Mapping as Map
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
import yaml

from codesign.config import Count
from experiments import command_line
from experiments.silicon.page import STATISTICS, markdown, plot_efficiency, replace_between, show
from experiments.silicon.peak import PARTS_OF_ENERGY, Peak, measure, sample_chip
from experiments.silicon.whole_networks import NetworkRun, run_network
from experiments.systems.record import between, swept
from hw.arithmetic import FLOAT_STYLES
from hw.chips import PRESETS
from hw.technology import clock_frequency, unknown

UNITS = {
    "efficiency": "TOPS/W", "throughput": "GOPS", "area": "mm2", "ratio": "x", "speedup": "x", "table": "x",
    "dram": "words/MAC", "power": "mW", "frames": "frames/s",
}  # fmt: skip
KINDS = {"dram": "DRAM accesses"}
RATIOS = {"ratio": "efficiency", "speedup": "throughput"}
MARKS = ("<!-- table_silicon -->", "<!-- end of table_silicon -->")
# Published figures are rounded to three digits.
ROUNDING = 5e-3


@dataclass(frozen=True)
class Row:
    """One published figure beside ours, in `unit`; `compared` where it enters the statistics of its kind.

    `energy_pj` is what one product costs us in that mode at that supply, by `PARTS_OF_ENERGY`. `family` is what it is
    calibrated in.
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
    family: str

    @property
    def ratio(self) -> float:
        """Ours over published."""
        return self.ours / self.published


def read_headlines() -> dict[str, list[dict[str, Any]]]:
    """What the chips report, by preset."""
    return yaml.safe_load((importlib.resources.files("hw") / "chips" / "headlines.yaml").read_text())


def make_row(name: str, headline: Map[str, Any], samples: int) -> Row:
    """One headline beside ours."""
    kind, mode, vdd = headline["kind"], headline["mode"], headline["vdd"]
    network = headline.get("network")
    found: Peak | NetworkRun = (
        run_network(name, mode, vdd, network, samples) if network else measure(name, mode, vdd, samples)
    )
    supply = "" if vdd is None else f", {vdd:g} V"
    label = f"{KINDS.get(kind, kind)}, {network or mode}{supply}"
    if kind in RATIOS:
        of = RATIOS[kind]
        base = measure(name, headline["base_mode"], headline["base_vdd"], samples)
        values = getattr(found, of) / getattr(base, of)
        over = "" if headline["base_vdd"] is None else f", {headline['base_vdd']:g} V"
        label = f"{of}, {mode}{supply} over {headline['base_mode']}{over}"
    else:
        values = getattr(found, kind)
    ours, low, high = swept(values, samples)
    published = float(headline["published"])
    return Row(
        kind=kind, name=label, published=published, ours=ours, low=low, high=high,
        unit=UNITS[kind], inside=_is_inside(published, low, high),
        compared=not any((headline.get("derived"), headline.get("sparsity"), headline["confidence"] == "low")),
        confidence=headline["confidence"], source=headline["source"],
        energy_pj=dict(zip(PARTS_OF_ENERGY, (1e12 * found.energy).tolist(), strict=True)),
        family=family(name, mode),
    )  # fmt: skip


def family(name: str, mode: str) -> str:
    """The node and the kind of arithmetic of a mode of a preset: what shares the sources of its constants."""
    preset = PRESETS[name]
    return f"{preset.node_nm.value} nm, {'floating point' if preset.modes[mode].style in FLOAT_STYLES else 'integer'}"


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
    """Efficiencies times the factor that the other chips of the family ask for; none where there is no other chip.

    The factor is the geometric mean over chips of published over ours, each chip being the mean of its own figures.
    """
    logs: dict[str, dict[str, list[float]]] = {}
    for name, chip in rows.items():
        for row in filter(_is_efficiency, chip):
            logs.setdefault(row.family, {}).setdefault(name, []).append(-float(np.log(row.ratio)))
    calibrated: dict[str, list[Row]] = {}
    for name, chip in rows.items():
        for row in filter(_is_efficiency, chip):
            others = [np.mean(its) for other, its in logs[row.family].items() if other != name]
            if others:
                calibrated.setdefault(name, []).append(_scaled(row, float(np.exp(np.mean(others)))))
    return calibrated


def _is_efficiency(row: Row) -> bool:
    return row.kind == "efficiency" and row.compared


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
        for t in sample_chip(PRESETS[name], samples)[1][: 1 + samples]
    ]
    _, low, high = between(np.array(ratios))
    return {
        "vdd": [low_vdd, high_vdd], "published": fast / slow, "ours": ratios[0], "low": low, "high": high,
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
        "power": summarise(kinds["power"]),
        "frames": summarise(kinds["frames"]),
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
