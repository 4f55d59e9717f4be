"""The pictures of a run, from plain numbers: every function returns a matplotlib Figure, drawn without global state.

Colours are Paul Tol's "bright" set and a pale green, distinct under the common colour-vision deficiencies;
points also differ in marker and bars in order, so that no figure depends on colour alone. Thin lines across a mark or the end
of a bar are its interval.
"""

import functools
import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from codesign.pareto import non_dominated

# Text and lines, and what lies behind them: `to_svg` replaces exactly these by the page's own colours.
INK, PAPER = "#1b1f25", "#fefefd"
PALETTE = ("#ee6677", "#4477aa", "#228833", "#aa3377", "#888888", "#66ccee", "#ccbb44", "#a8dfa0")
_MARKERS = "*osDv^PX"
_COMPONENTS = ("mac", "register", "local", "shared", "dram", "control", "vector", "leakage")
METHODS = ("joint", "sequential", "uniform8", "float32", "random", "joint_without_bits", "joint_without_chip")
PASSES = {"forward": "o", "input_grad": "s", "weight_grad": "^"}
OPERANDS = {
    "weights": "weights",
    "inputs": "inputs",
    "input_grad": "error for\ninput_grad",
    "weight_grad": "error for\nweight_grad",
}
_CURVES = {
    "loss": "training\nloss",
    "validation_accuracy": "validation\naccuracy (%)",
    "energy_uj": "energy of\na step (µJ)",
    "latency_ms": "latency of\na step (ms)",
    "area_mm2": "chip area\n(mm²)",
    "bits_mean": "mean\nbits",
}
_WIDTH = 5.6  # inches: shown at this size in two columns, at two thirds of it on a phone
_STYLE: dict[Any, Any] = {
    "font.size": 11.0,
    "axes.titlesize": 11.0,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.hashsalt": "codesign",  # the same figure gives the same file
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def _styled[**P](draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def training_curves(history: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Loss, accuracy, and what the chip costs while it is being found, by epoch.

    The accuracy panel starts where the last two thirds of training do, so that methods can be told apart.

    Args:
      history: method -> {"epoch": (t,), and any of "loss", "validation_accuracy" (fraction), "energy_uj",
        "latency_ms", "area_mm2", "bits_mean": (t,)}; NaN and None are gaps.
    """
    shown = [name for name in _CURVES if any(name in curves for curves in history.values())]
    styles = _method_styles(history)
    figure, axes = _panels(rows=len(shown), height=0.9 + 1.3 * len(shown), sharex=True)
    for name, ax in zip(shown, axes, strict=True):
        late: list[float] = []
        for method, curves in history.items():
            if name in curves:
                values = np.asarray(curves[name], float) * (100.0 if name == "validation_accuracy" else 1.0)
                late.extend(values[len(values) // 3 :])
                marker = "." if len(values) < 12 else None  # a stretch of one epoch has no line
                epochs = np.asarray(curves["epoch"], float)
                ax.plot(epochs, values, color=styles[method][0], marker=marker, label=_label(method))
        if name == "validation_accuracy" and np.isfinite(late).any():
            ax.set_ylim(bottom=np.nanmin(late) - 1.0)
        else:
            _scale_axis(ax, "y", ax.dataLim.intervaly)
        ax.set_ylabel(_CURVES[name])
    for ax in axes[-1:]:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, axes)
    figure.align_ylabels()
    return figure


@_styled
def accuracy_energy(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against energy of a training step, with the front of the points no other point beats in both.

    Args:
      points: dicts with "label" (method), "energy_uj" and "accuracy" (fraction), and maybe "interval", [low, high] of the
        energy; several may share a label.
    """
    figure, (ax,) = _panels(height=4.0)
    styles = _method_styles(point["label"] for point in points)
    energy = np.array([point["energy_uj"] for point in points], float)
    accuracy = 100.0 * np.array([point["accuracy"] for point in points], float)
    if len(points):
        front = non_dominated(np.stack([energy, -accuracy], 1))
        order = np.flatnonzero(front)[energy[front].argsort()]
        ax.step(
            energy[order], accuracy[order], where="post", color=INK, alpha=0.45, linewidth=1.0, label="Pareto front"
        )
        ends = [end for point in points for end in point.get("interval", [])]
        _scale_axis(ax, "x", (min([*energy, *ends]), max([*energy, *ends])))
    for point in points:
        if "interval" in point:
            color = styles[point["label"]][0]
            ax.hlines(100.0 * point["accuracy"], *point["interval"], color=color, linewidth=2.4, alpha=0.5)
    for label, (color, marker) in styles.items():
        mine = np.array([point["label"] == label for point in points])
        size = 170 if marker == "*" else 60 if mine.sum() == 1 else 30
        ax.scatter(
            energy[mine], accuracy[mine], s=size, marker=marker, color=color, edgecolor=PAPER,
            linewidth=0.8, label=_label(label), zorder=3 if mine.sum() == 1 else 2,
        )  # fmt: skip
    ax.set_xlabel("energy of a training step (µJ)")
    ax.set_ylabel("test accuracy (%)")
    ax.margins(0.1, 0.12)
    _legend_below(figure, [ax])
    return figure


@_styled
def design_front(
    points: Sequence[Mapping[str, Any]], best: Mapping[str, Any], base: Mapping[str, Any], knee: int
) -> Figure:
    """Energy against latency of designs that no other beats in energy, latency and area; the darker, the larger the chip.

    Args:
      points: the front, dicts with "energy_uj", "latency_ms" and "area_mm2".
      best, base: two more such, the best by the objective and the chip that the search began with.
      knee: index of the front's knee.
    """
    figure, (ax,) = _panels(height=4.2)
    energy, latency, area = (
        np.array([p[key] for p in points], float) for key in ("energy_uj", "latency_ms", "area_mm2")
    )
    shades = ax.scatter(energy, latency, c=area, cmap="viridis_r", s=26, edgecolor=PAPER, linewidth=0.5, zorder=2)
    marked = {"best": (best, "*", PALETTE[0]), "knee": (points[knee], "D", PALETTE[3]), "base chip": (base, "X", INK)}
    for label, (point, marker, color) in marked.items():
        ax.scatter(
            [point["energy_uj"]], [point["latency_ms"]], s=130 if marker == "*" else 60, marker=marker, color=color,
            edgecolor=PAPER, linewidth=0.8, label=label, zorder=3,
        )  # fmt: skip
    _scale_axis(ax, "x", (min([*energy, base["energy_uj"]]), max([*energy, base["energy_uj"]])))
    _scale_axis(ax, "y", (min([*latency, base["latency_ms"]]), max([*latency, base["latency_ms"]])))
    ax.set_xlabel("energy (µJ)")
    ax.set_ylabel("latency (ms)")
    figure.colorbar(shades, ax=ax, label="chip area (mm²)")
    _legend_below(figure, [ax])
    return figure


@_styled
def bits_per_layer(table: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bit widths, one row per layer in order of execution, one column per operand.

    Args:
      table: layer -> {"weights", "inputs", "input_grad", "weight_grad": bits}; a missing operand leaves a gap.
    """
    bits = np.array([[row.get(name, np.nan) for name in OPERANDS] for row in table.values()], float).reshape(-1, 4)
    figure, (ax,) = _panels(height=1.1 + 0.3 * max(len(table), 1))
    present = bits[np.isfinite(bits)]
    low, high = (present.min(), present.max()) if present.size else (0.0, 1.0)
    # Half a bit of margin gives a map with one colour when all are equal.
    ax.pcolormesh(bits, cmap="viridis", vmin=low - 0.5, vmax=high + 0.5, edgecolors=PAPER, linewidth=2.0)
    for (row, column), value in np.ndenumerate(bits):
        if np.isfinite(value):
            color = "#ffffff" if value - low + 0.5 < 0.55 * (high - low + 1.0) else "#000000"
            ax.text(column + 0.5, row + 0.5, f"{value:.3g}", ha="center", va="center", color=color)
    ax.set_xticks(np.arange(4) + 0.5, list(OPERANDS.values()), fontsize=9.5)
    ax.set_yticks(np.arange(len(table)) + 0.5, [_shortened(name) for name in table])
    ax.set_ylim(max(len(table), 1), 0)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return figure


@_styled
def energy_breakdown(
    energy_j: ArrayLike,
    layers: Sequence[str],
    passes: Sequence[str],
    components: Sequence[str],
    intervals_j: ArrayLike | None = None,
) -> Figure:
    """Where the energy of a training step goes: a panel per pass, a bar per layer, a segment per component.

    Args:
      energy_j: (layers, passes, components) in joules.
      layers, passes, components: their names.
      intervals_j: (2, layers, passes), low and high of the bars.
    """
    values, unit, scale = _prefixed(np.asarray(energy_j, float), "J")
    expected = (len(layers), len(passes), len(components))
    if values.shape != expected:
        raise ValueError(f"expected energies of shape {expected} (layers, passes, components), got {values.shape}")
    height = 1.5 + 0.26 * max(len(layers), 1)
    figure, axes = _panels(columns=len(passes), height=height, sharey=True, sharex=True)
    for index, (name, ax) in enumerate(zip(passes, axes, strict=True)):
        _stack(ax, values[:, index], components)
        if intervals_j is not None:
            _whiskers(ax, np.asarray(intervals_j, float)[:, :, index] * scale)
        ax.set_title(_plain(name))
        ax.set_xlabel(f"energy ({unit})")
        ax.xaxis.set_major_locator(MaxNLocator(3))
    if len(axes):
        axes[0].set_yticks(range(len(layers)), [_shortened(name) for name in layers])
    _legend_below(figure, axes[:1])
    return figure


@_styled
def roofline(
    points: Sequence[Mapping[str, Any]], peaks: Mapping[str, float], bandwidths: Mapping[str, float]
) -> Figure:
    """Speed of each operation against its operations per byte of shared SRAM traffic, and the chip's ceilings.

    Args:
      points: dicts with "name", "pass", "operations_per_byte" and "operations_per_second"; a MAC is two operations.
      peaks: label -> operations per second of the full MAC array, for instance at several bit widths.
      bandwidths: label -> bytes per second of a memory.
    """
    intensity = np.array([point["operations_per_byte"] for point in points], float)
    speed = np.array([point["operations_per_second"] for point in points], float)
    flats, slopes = np.array(list(peaks.values()), float), np.array(list(bandwidths.values()), float)
    _, unit, scale = _prefixed(flats, "operations/s")
    speed, flats, slopes = speed * scale, flats * scale, slopes * scale
    ridges = (flats[:, None] / slopes[None]).ravel()
    left, right = min([*intensity, *ridges]) / 3, max([*intensity, *ridges]) * 6
    figure, (ax,) = _panels(height=4.2)
    for slope in slopes:
        ax.plot([left, flats.max() / slope], [slope * left, flats.max()], color=INK, linewidth=1.2)
    for flat in flats:
        ax.plot([flat / slopes.max(), right], [flat, flat], color=INK, linewidth=1.2)
    for name, marker in PASSES.items():
        mine = np.array([point["pass"] == name for point in points], bool)
        if mine.any():
            color = PALETTE[list(PASSES).index(name)]
            ax.scatter(
                intensity[mine], speed[mine], marker=marker, s=42, color=color, edgecolor=PAPER, linewidth=0.6,
                label=name, zorder=3,
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(left, right)
    ax.set_ylim(min([*speed, *flats]) / 3, flats.max() * 2.5)
    _label_ceilings(ax, dict(zip(peaks, flats, strict=True)), dict(zip(bandwidths, slopes, strict=True)))
    _scale_axis(ax, "x", ax.get_xlim())
    _scale_axis(ax, "y", ax.get_ylim())
    ax.set_xlabel("operations per byte of shared SRAM traffic")
    ax.set_ylabel(f"speed ({unit})")
    _legend_below(figure, [ax])
    return figure


@_styled
def area_breakdown(
    areas: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Chip area by component, one bar per design.

    Args:
      areas: design -> {component: mm2}.
      intervals: design -> [low, high] of the whole in mm2.
    """
    components = list(dict.fromkeys(name for parts in areas.values() for name in parts))
    values = np.array([[parts.get(name, 0.0) for name in components] for parts in areas.values()], float)
    values = values.reshape(len(areas), len(components))
    figure, (ax,) = _panels(height=1.5 + 0.36 * max(len(areas), 1))
    _stack(ax, values, components)
    totals = values.sum(1)
    bounds = np.array([(intervals or {}).get(name, (np.nan, np.nan)) for name in areas], float).reshape(-1, 2)
    _whiskers(ax, bounds.T)
    for index, total in enumerate(totals):
        ax.annotate(f" {total:.3g}", (np.nanmax([total, *bounds[index]]), index), va="center")
    ax.set_yticks(range(len(areas)), [_label(name) for name in areas])
    ax.margins(x=0.14)
    ax.set_xlabel("area (mm²)")
    _legend_below(figure, [ax])
    return figure


def to_svg(figure: Figure, identity: str | None = None) -> str:
    """The figure as text of an SVG element.

    Args:
      figure: any figure of this module.
      identity: None for a file of its own, on a white ground; a name, unique in its page, for a figure inside an HTML
        page, which takes the text colour around it and the page's `--paper` as ground.
    """
    with matplotlib.rc_context(_STYLE), io.StringIO() as buffer:
        ground = "white" if identity is None else "none"
        figure.savefig(buffer, format="svg", facecolor=ground, metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
    if identity is None:
        return svg
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r'\bid="', f'id="{identity}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{identity}-", svg)
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", svg, count=1)


def _panels(
    *, rows: int = 1, columns: int = 1, height: float, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure((_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    if not rows * columns:
        return figure, []
    return figure, list(figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flat)


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return str(text).replace("$", r"\$")


def _shortened(layer: str) -> str:
    """The end of a long layer path, which tells layers apart, so that labels leave room for the figure."""
    return _plain(layer if len(layer) <= 24 else "…" + layer[-23:])


def _label(method: str) -> str:
    return _plain(method.replace("_", " "))


def _method_styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method; the stretch before all methods has the colour of the text."""
    places = _places(methods, METHODS)
    return {name: (INK if name == "pretrain" else PALETTE[i], _MARKERS[i]) for name, i in places.items()}


def _places(names: Iterable[str], known: Sequence[str]) -> dict[str, int]:
    """Place of each name in the palette: a known one has the same in every figure, others take what is left."""
    wanted = list(dict.fromkeys(names))
    fixed = {name: known.index(name) for name in wanted if name in known}
    rest = itertools.cycle([i for i in reversed(range(len(PALETTE))) if i not in fixed.values()] or range(len(PALETTE)))
    return {name: fixed[name] if name in fixed else next(rest) for name in wanted}


def _prefixed(values: np.ndarray, unit: str) -> tuple[np.ndarray, str, float]:
    """Values scaled so that the largest reads well, the unit they then have, and the scale."""
    prefixes = dict(zip(range(-15, 13, 3), ("f", "p", "n", "µ", "m", "", "k", "M", "G", "T"), strict=True))
    if "/" in unit:
        prefixes |= {3: "thousand ", 6: "million ", 9: "billion ", 12: "trillion "}
    largest = np.abs(values).max(initial=0.0)
    exponent = 3 * int(np.floor(np.log10(largest) / 3)) if largest > 0 else 0
    exponent = min(max(exponent, min(prefixes)), max(prefixes))
    return values * 10.0**-exponent, prefixes[exponent] + unit, 10.0**-exponent


def _scale_axis(ax: Axes, which: Literal["x", "y"], interval: ArrayLike) -> None:
    """Logarithmic with readable ticks where positive values span more than a factor of four; else left linear."""
    low, high = np.asarray(interval, float)
    if not 0 < 4 * low < high < np.inf:
        return
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    decades = np.log10(high / low)
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if decades < 1.2 else (1, 3) if decades < 2.4 else (1,), numticks=12)
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _stack(ax: Axes, values: np.ndarray, components: Sequence[str]) -> None:
    """Horizontal stacked bars: values (bars, components)."""
    left, places = np.zeros(len(values)), _places(components, _COMPONENTS)
    for index, name in enumerate(components):
        ax.barh(
            range(len(values)), values[:, index], left=left, height=0.72, color=PALETTE[places[name]], edgecolor=PAPER,
            linewidth=0.4, label=_plain(name),
        )  # fmt: skip
        left = left + values[:, index]
    ax.set_ylim(len(values) - 0.4, -0.6)  # the first bar on top
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)


def _whiskers(ax: Axes, intervals: np.ndarray) -> None:
    """A line from low to high, (2, bars), across the end of each bar; none where it is empty or NaN."""
    low, high = intervals
    shown = np.flatnonzero(high > low)
    ax.hlines(shown, low[shown], high[shown], color=INK, linewidth=1.1, alpha=0.75)


def _label_ceilings(ax: Axes, peaks: Mapping[str, float], slopes: Mapping[str, float]) -> None:
    """Names on the lines of a roofline: peaks at the right end, bandwidths along their slope."""
    ordered = sorted(peaks.items(), key=lambda item: item[1])
    for index, (label, height) in enumerate(ordered):
        # A peak just below another one has its name under its line.
        crowded = index + 1 < len(ordered) and ordered[index + 1][1] < 2 * height
        ax.annotate(
            _plain(label), (1, height), xycoords=("axes fraction", "data"), xytext=(0, -3 if crowded else 3),
            textcoords="offset points", ha="right", va="top" if crowded else "bottom",
        )  # fmt: skip
    for label, slope in slopes.items():
        x = max(ax.get_xlim()[0], ax.get_ylim()[0] / slope) * 1.25
        ax.text(
            x, slope * x * 1.12, _plain(label), rotation=np.degrees(np.arctan(slope)), transform_rotates_text=True,
            rotation_mode="anchor", ha="left", va="bottom",
        )  # fmt: skip


def _legend_below(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend under all panels, in as many columns as fit the width."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        longest = max(len(label) for label in entries)
        columns = max(1, min(len(entries), int(60 / (longest + 5))))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=10)
