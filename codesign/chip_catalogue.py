"""What `chips` tells: every chip that is known here, and of one of them every number with its source, as plain dicts."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from hw.arithmetic import FLOAT_STYLES
from hw.chip import Chip
from hw.chips import CHIPS, PRESETS, Preset
from hw.chips.mechanisms import MECHANISMS
from hw.chips.preset import Fact
from hw.technology import unknown
from hw.units import KIB, MHZ, MM2

SWITCHES = {
    "fixed": "one multiplier of full width",
    "slices": "products of slices, one pair a cycle",
    "fusion": "bricks that join for wider operands",
    "subwords": "a multiplier that takes several narrow products side by side",
    "serial": "one operand bit by bit",
    "lut": "look-up tables, one operand bit by bit",
    **dict.fromkeys(FLOAT_STYLES, "floating point"),
}


def list_chips() -> list[dict[str, Any]]:
    """One row for each chip: its name for the command line, kind, title, node, modes, and how much of it is assumed."""
    made = [
        {"name": name, "kind": "to co-design from", "title": _title(make), "node_nm": make().technology.node_nm}
        for name, make in CHIPS.items()
    ]
    published = [
        {
            "name": name, "kind": "published", "title": preset.title, "node_nm": preset.node_nm.value,
            "modes": list(preset.modes), "num_assumed": len(preset.assumed()),
        }
        for name, preset in PRESETS.items()
    ]  # fmt: skip
    return made + published


def explain_chip(name: str) -> dict[str, Any]:
    """Facts with sources, modes, mechanisms, assumptions with ranges, and the chip that the cost model makes of them.

    Raises:
      ValueError: no such chip; names the nearest.
    """
    if name in CHIPS:
        nothing: dict[str, Any] = {kind: [] for kind in ("facts", "modes", "mechanisms", "assumptions")}
        chip = {"mode": "-"} | describe(CHIPS[name]())
        return {"name": name, "title": _title(CHIPS[name]), **nothing, "chips": [chip]}
    if name not in PRESETS:
        raise ValueError(unknown("chip", name, [*CHIPS, *PRESETS]))
    preset = PRESETS[name]
    return {
        "name": name,
        "title": preset.title,
        "facts": _facts(preset),
        "assumptions": [{"name": key} | dataclasses.asdict(it) for key, it in preset.assumed().items()],
        "modes": [
            {
                "mode": key, "style": mode.style, "switch": SWITCHES[mode.style],
                "num_macs": mode.num_macs or "assumed", "bits": mode.bits or "assumed", "source": mode.source,
            }
            for key, mode in preset.modes.items()
        ],
        "mechanisms": [
            {"name": key, "switch": MECHANISMS[key], "source": source} for key, source in preset.mechanisms.items()
        ],
        "chips": [{"mode": key} | describe(preset.make(key)) for key in preset.modes],
    }  # fmt: skip


def describe(chip: Chip) -> dict[str, float | str]:
    """Headline numbers of a chip."""
    sizes = np.asarray(chip.instances() * chip.size_bits)
    return {
        "num_macs": float(chip.num_macs()),
        "register_kib": float(sizes[0]) / KIB,
        "sram_kib": float(sizes[1:-1].sum()) / KIB,
        "vdd": float(chip.vdd),
        "clock_mhz": float(chip.frequency()) / MHZ,
        "area_mm2": float(chip.area().total) / MM2,
        "leakage_mw": 1e3 * float(chip.leakage_power()),
    }


def _facts(preset: Preset) -> list[Mapping[str, Any]]:
    """What is public of a preset: every field of it that is a fact."""
    facts = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    return [
        {"name": "clock (V, Hz)" if name == "clock" else name, "value": fact.value, "source": fact.source}
        for name, fact in facts.items()
        if isinstance(fact, Fact)
    ]


def _title(make: Any) -> str:
    return (inspect.getdoc(make) or "").splitlines()[0]
