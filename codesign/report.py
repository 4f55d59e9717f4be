"""report.html of a run: one file without scripts or outside resources, for someone new to such results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from codesign import plots, rundir
from codesign.columns import COLUMNS, METRICS, OPERATION_COLUMNS, summary_rows
from codesign.uncertainty import NUM_SAMPLES, QUANTILES

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
