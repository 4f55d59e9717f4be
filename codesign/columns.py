"""Columns of the tables that tell of costs, for reports and the terminal alike: without what draws, which is slow to import."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
