"""Answers of the search benchmark as Timeloop inputs, so that an independent tool can score them again.

One file for every layer, with the flat `arch: {arithmetic, storage}` of Timeloop's model, the problem and the mapping; run
`timeloop-model FILE`. Energies per access and bandwidths are those of `experiments.gemmini`. The registers' bandwidth is
given for all of them together there, and here for each that the mapping uses.
"""

from pathlib import Path
from typing import Any

import yaml

from codesign.exchange import timeloop_problem
from codesign.mapspace import Nest
from codesign.timeloop_designs import timeloop_level, timeloop_mapping
from experiments import gemmini
from hw.mapping import Mapping

_LEVELS = ("Registers", "Accumulator", "Scratchpad", "DRAM")


def timeloop_input(chip: tuple[int, ...], nest: Nest, mapping: Mapping) -> dict[str, Any]:
    """Architecture, problem and mapping of one layer."""
    operation = nest.operation()
    return {
        "arch": _architecture(chip, round(float(mapping.spatial.prod()))),
        **timeloop_problem(operation),
        "mapping": timeloop_mapping(_LEVELS, operation, mapping),
    }


def write_timeloop_inputs(folder: Path, inputs: list[dict[str, Any]]) -> None:
    """One file per layer, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(inputs):
        (folder / f"layer{i:02d}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _architecture(chip: tuple[int, ...], macs_used: int) -> dict[str, Any]:
    pe, sp_kib, acc_kib = chip
    registers = timeloop_level("Registers", pe * pe, pe, 8) | {
        "entries": 1,
        "vector_access_energy": gemmini.REGISTER_PJ,
        "shared_bandwidth": gemmini.REGISTER_BANDWIDTH / macs_used,
    }
    accumulator = timeloop_level("Accumulator", pe, pe, 8 * gemmini.WORD_BYTES) | {
        "entries": acc_kib * 1024 // gemmini.WORD_BYTES // pe,
        "vector_access_energy": gemmini.accumulator_pj(acc_kib, pe),
        "shared_bandwidth": gemmini.ACCUMULATOR_BANDWIDTH,
    }
    scratchpad = timeloop_level("Scratchpad", 1, 1, 8) | {
        "entries": sp_kib * 1024,
        "vector_access_energy": gemmini.scratchpad_pj(sp_kib),
        "shared_bandwidth": gemmini.SCRATCHPAD_BANDWIDTH * pe,
    }
    dram = timeloop_level("DRAM", 1, 1, 8) | {
        "technology": "DRAM",
        "vector_access_energy": gemmini.DRAM_PJ,
        "shared_bandwidth": gemmini.DRAM_BANDWIDTH,
    }
    arithmetic = {"name": "MACs", "instances": pe * pe, "meshX": pe, "word_bits": 8, "energy": gemmini.MAC_PJ}
    return {"arithmetic": arithmetic, "storage": [registers, accumulator, scratchpad, dram]}
