"""report.html of a run: one file without scripts or outside resources, for someone new to such results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from codesign import plots, rundir
from codesign.uncertainty import NUM_SAMPLES, QUANTILES


@dataclass(frozen=True)
class Column:
    """A column of the summary: its key in a row, how it is headed, written and explained."""

    key: str
    label: str
    unit: str
    meaning: str
    scale: float = 1.0
    digits: str = ".3g"

    @property
    def heading(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def show(self, row: Mapping[str, Any]) -> str:
        """The row's value as text; a dash where it has none."""
        value = row.get(self.key)
        return self._number(value) if isinstance(value, int | float) else str(value or "–")

    def show_interval(self, row: Mapping[str, Any]) -> str:
        """Low and high of the row's value as text; empty where it has none."""
        low, high = row.get("intervals", {}).get(self.key, (None, None))
        return "" if low is None else f"{self._number(low)}–{self._number(high)}"

    def _number(self, value: float) -> str:
        scaled = value * self.scale
        return f"{scaled:.0f}" if abs(scaled) >= 1000 else f"{scaled:{self.digits}}"


COLUMNS = (
    Column("accuracy", "accuracy", "%", "test samples classified correctly", 100.0, ".2f"),
    Column("bits_mean", "mean bits", "", "bit width of the products' operands, averaged over all of them"),
    Column("energy_uj", "energy", "µJ", "energy of one training step (one batch: forward, backward, update)"),
    Column("latency_ms", "latency", "ms", "time of one training step"),
    Column(
        "edp_js", "EDP", "µJ\N{NO-BREAK SPACE}ms",
        "energy-delay product of a training step: their product (in files edp_js, in J s: 1 µJ ms is 1e-9 J s)", 1e9,
    ),
    Column("edp_ratio", "EDP to joint", "×", "EDP as a multiple of that of the joint design", 1.0, ".2f"),
    Column("order_holds", "order holds", "%", "share of the samples in which this method's EDP lies on the same side of "
           "the joint design's as here", 100.0, ".0f"),
    Column("edp_to_bound", "EDP to bound", "×", "EDP as a multiple of a lower bound: no mapping of the same operations on "
           "the same chip comes below it", 1.0, ".2f"),
    Column("area_mm2", "area", "mm²", "silicon area of the chip"),
    Column("power_mw", "power", "mW", "average power during training"),
    Column("gap", "gap", "%", "what making the design buildable added to the EDP of the last iterate", 100.0, "+.1f"),
)  # fmt: skip

OPERATION_COLUMNS = (
    Column("energy_uj", "energy", "µJ", "energy of the operation in a training step, without leakage"),
    Column("energy_to_bound", "energy to bound", "×", "as a multiple of its lower bound", 1.0, ".2f"),
    Column("latency_ms", "latency", "ms", "its time in a training step"),
    Column("latency_to_bound", "latency to bound", "×", "as a multiple of its lower bound", 1.0, ".2f"),
    Column(
        "limited_by", "limited by", "", "the resource that takes all of this time: the MACs, or a memory's bandwidth"
    ),
)

# Metrics that are compared with the joint design's, and shown of a step, with the key of their multiple of the bound.
METRICS = {"energy_uj": "energy_to_bound", "latency_ms": "latency_to_bound", "edp_js": "edp_to_bound", "area_mm2": "",
           "power_mw": ""}  # fmt: skip

INTERVALS = (
    f"Small numbers are intervals, the {100 * QUANTILES[0]:.0f}th to {100 * QUANTILES[1]:.0f}th percentile of {NUM_SAMPLES} "
    "technologies: every constant of the cost model is drawn between its low and high (hw/data), bits, chip and mappings "
    "held. Values are those of the constants as stated, which may lie near an end where sources differ to one side. The "
    "draws are the same for every design, so two designs are compared by 'order holds' and not by whether intervals overlap."
)

METHODS = {
    "joint": "weights, bit widths and chip optimised together, every operation under its best mapping",
    "sequential": "bit widths first, on the starting chip; then chip and mapping for those bits",
    "uniform8": "8 bits everywhere on the starting chip, whatever the budgets",
    "float32": "32-bit floating point, on the floating-point variant of the starting chip",
    "random": "the best of randomly drawn chips, with the bits of joint and as many mappings tried in all",
    "joint_without_bits": "joint, but with the bit widths held at their initial values",
    "joint_without_chip": "joint, but with the chip held as it was at the start",
}

FIGURES = {
    "accuracy_energy": (
        "Accuracy against energy",
        "Each mark is a trained network on its chip: higher is more accurate, further left costs less energy per "
        "training step. The line joins the designs that no other design beats in both. Across each mark lies the interval "
        "of its energy; these move together, for what the designs have in common.",
    ),
    "training_curves": (
        "Training",
        "What happened while training, epoch by epoch. Where a method also changes bits or chip, the lower panels show "
        "its cost falling while the accuracy recovers; these costs have no intervals.",
    ),
    "bits_per_layer": (
        "Bits per layer",
        "The bit widths that were found, one row per layer. Forward, a layer multiplies its inputs by its weights; "
        "backward, it receives an error, quantised once for the gradient of its inputs and once for that of its "
        "weights. Fewer bits make every product and every memory access cheaper. A blank is a product that training "
        "does not need.",
    ),
    "energy_breakdown": (
        "Where the energy goes",
        "Energy of one training step on the final chip. Each layer runs up to three passes: forward, and backward for "
        "the gradients of its inputs and of its weights. Moving data (DRAM, SRAM) often costs more than the products "
        "themselves (MAC). The line across the end of a bar is the interval of the whole bar.",
    ),
    "roofline": (
        "Roofline",
        "How fast each operation runs, against how many operations it does per byte that it moves to or from the shared "
        "SRAM. The sloping line is what the shared SRAM can deliver, the flat ones what the MAC array can compute "
        "at two widths.",
    ),
    "area_breakdown": ("Silicon area", "What the area of each chip is spent on, with the interval of the whole."),
}

GLOSSARY = {
    "MAC": "multiply-accumulate: the multiplication and addition that convolutions and matrix products consist of.",
    "MAC array": "a grid of rows × columns of MAC units that work in parallel.",
    "mapping": "how the loops of an operation are cut into tiles and ordered over array and memories.",
    "EDP": "energy-delay product, energy times latency; halving either halves it.",
    "bound": "what an operation costs at least on the chip, whatever its mapping; it may not be reachable.",
    "interval": "what a number may be, for all that is known of the constants behind it.",
    "SRAM, DRAM": "memory on the chip (small, cheap to access) and outside it (large, expensive to access).",
    "training step": "one update of the weights: forward pass, backward pass and optimiser on one batch.",
}

_STEPS = {"a training step": "training_step", "an inference of one sample": "inference"}
_UNITS = {
    "kib": "KiB", "bits": "bits", "mm2": "mm²", "um2": "µm²", "nm": "nm", "v": "V", "mhz": "MHz", "ghz": "GHz",
    "j": "J", "uj": "µJ", "nj": "nJ", "pj": "pJ", "s": "s", "ms": "ms", "us": "µs", "ns": "ns", "w": "W", "mw": "mW",
    "js": "J s",
}  # fmt: skip


# What drawing and rendering raise where a number, list or entry is of another kind, or not there.
_DAMAGES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError)


def write_report(directory: Path) -> Path:
    """Make report.html and figures/*.svg of a finished run from its result.json and metrics.jsonl.

    Raises:
      FileNotFoundError: no result.json.
      ValueError: a file is damaged.
    """
    result = rundir.read_result(directory)
    records = rundir.read_metrics(directory)
    try:
        if history := history_from_metrics(records):
            result.setdefault("figures", {}).setdefault("training_curves", {"history": history})
        figures = draw_figures(result.get("figures", {}))
        drawings = {name: plots.to_svg(figure) for name, figure in figures.items()}
        html = render(result, figures)
    except _DAMAGES as error:
        where = f"{directory / rundir.RESULT} or {rundir.METRICS}"
        raise ValueError(f"damaged: {where} does not hold a report's data ({error!r}); run it again") from error
    for name, drawing in drawings.items():
        rundir.write_atomic(directory / "figures" / f"{name}.svg", drawing)
    rundir.write_atomic(directory / rundir.REPORT, html)
    return directory / rundir.REPORT


def history_from_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Curves for `plots.training_curves`: the numbers of all records that name a "method" and an "epoch".

    Where the epochs of a method start again, as for several tries, a gap parts the curves.
    """
    history: dict[str, dict[str, list[Any]]] = {}
    epochs = [record for record in records if "method" in record and "epoch" in record]
    for method in dict.fromkeys(str(record["method"]) for record in epochs):
        mine = [record for record in epochs if record["method"] == method]
        rows: list[Mapping[str, Any]] = []
        for before, record in zip([None, *mine], mine, strict=False):
            if before is not None and record["epoch"] <= before["epoch"]:
                rows.append({"epoch": record["epoch"]})
            rows.append(record)
        keys = dict.fromkeys(key for row in rows for key in row if key not in ("method", "step"))
        history[method] = {key: [row.get(key) for row in rows] for key in keys}
    return history


def draw_figures(data: Mapping[str, Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Figure of every entry: name of a function of `codesign.plots` -> its arguments; in the order of `FIGURES`."""
    if unknown := set(data) - set(FIGURES):
        raise ValueError(f"unknown figures {sorted(unknown)}; expected some of {list(FIGURES)}")
    return {name: getattr(plots, name)(**data[name]) for name in FIGURES if name in data}


def render(result: Mapping[str, Any], figures: Mapping[str, plots.Figure]) -> str:
    """The report as HTML.

    Args:
      result: "title"; "summary", a list of rows with "method" and keys of `COLUMNS`; "design", "config": nested dicts
        with units in key names; "operations" of the design, rows with "operation" and keys of `OPERATION_COLUMNS`, and
        "explanations", texts on some of them; "notes": sentences on assumptions and measurements. All but the title may
        be absent. "intervals" of a row are [low, high] by key.
      figures: name in `FIGURES` -> figure.
    """
    rows = summary_rows(result.get("summary", []))
    shown = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    design = dict(result.get("design", {}))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("codesign"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        title=str(result["title"]),
        rows=rows,
        columns=shown,
        best=next((row for row in rows if row["method"] == "joint"), rows[0] if rows else {}),
        methods={row["method"]: METHODS.get(row["method"], "") for row in rows},
        figures=[(name, *FIGURES[name], Markup(plots.to_svg(figure, name))) for name, figure in figures.items()],
        intervals=INTERVALS if any("intervals" in row for row in rows) else "",
        metrics=[(column, METRICS[column.key]) for column in COLUMNS if column.key in METRICS],
        steps={name: design[key] for name, key in _STEPS.items() if "intervals" in design.get(key, {})},
        operation_columns=OPERATION_COLUMNS,
        operations=result.get("operations", []),
        explanations=result.get("explanations", []),
        chip=[labelled(key, value) for key, value in _chip_quantities(design).items()],
        design=_as_yaml(design),
        config=_as_yaml(result.get("config", {})),
        notes=[str(note) for note in result.get("notes", [])],
        glossary=GLOSSARY,
    )


def summary_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their EDP against the joint design's, where both are known."""
    joint = next((row.get("edp_js") for row in rows if row["method"] == "joint"), None)
    return [_against_joint(row, joint) for row in rows]


def _against_joint(row: Mapping[str, Any], joint: float | None) -> dict[str, Any]:
    complete = dict(row)
    if joint and row.get("edp_js") is not None:
        complete["edp_ratio"] = row["edp_js"] / joint
    if compared := row.get("against_joint", {}).get("edp_js"):
        complete["order_holds"] = compared["holds"]
        complete["intervals"] = {**row.get("intervals", {}), "edp_ratio": compared["interval"]}
    return complete


def _chip_quantities(design: Mapping[str, Any]) -> dict[str, Any]:
    """What a chip is, without what it costs."""
    chip = design.get("chip", {})
    return {key: value for key, value in chip.items() if key not in METRICS and not isinstance(value, Mapping)}


def labelled(key: str, value: Any) -> tuple[str, str]:
    """("local", "32 KiB") of ("local_kib", 32): a key with its unit, read for people."""
    name, _, suffix = key.rpartition("_")
    unit = _UNITS.get(suffix, "") if name else ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return (name if unit else key).replace("_", " "), f"{text} {unit}".rstrip()


def _as_yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True) if data else ""
