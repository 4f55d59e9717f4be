"""Answers of the search benchmark as Timeloop inputs, so that an independent tool can score them again.

One file for every layer, with the flat `arch: {arithmetic, storage}` of Timeloop's model, the problem and the mapping; run
`timeloop-model FILE`. Energies per access and bandwidths are those of `experiments.gemmini`. The registers' bandwidth is
given for all of them together there, and here for each that the mapping uses.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from codesign.mapspace import Array, Nest
from experiments import gemmini
from hw.operation import LOOPS

_LEVELS = ("Registers", "Accumulator", "Scratchpad", "DRAM")
_TENSORS = ("Weights", "Inputs", "Outputs")
_DIMENSIONS = "RSPQCKN"


def timeloop_input(chip: tuple[int, ...], nest: Nest, temporal: Array, spatial: Array, order: Any) -> dict[str, Any]:
    """Architecture, problem and mapping of one layer; the mapping as `Enumerator.mapping` gives it."""
    return {
        "arch": _architecture(chip, int(spatial.prod())),
        "problem": _problem(nest),
        "mapping": _mapping(temporal, spatial, order),
    }


def write_timeloop_inputs(folder: Path, inputs: list[dict[str, Any]]) -> None:
    """One file per layer, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(inputs):
        (folder / f"layer{i:02d}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _architecture(chip: tuple[int, ...], macs_used: int) -> dict[str, Any]:
    pe, sp_kib, acc_kib = chip
    words = {"word_bits": 8, "block_size": 1, "cluster_size": 1}
    storage = [
        {"name": "Registers", "entries": 1, "instances": pe * pe, "meshX": pe}
        | words
        | {"vector_access_energy": gemmini.REGISTER_PJ, "shared_bandwidth": gemmini.REGISTER_BANDWIDTH / macs_used},
        {"name": "Accumulator", "entries": acc_kib * 1024 // gemmini.WORD_BYTES // pe, "instances": pe, "meshX": pe}
        | words
        | {"word_bits": 8 * gemmini.WORD_BYTES, "vector_access_energy": gemmini.accumulator_pj(acc_kib, pe)}
        | {"shared_bandwidth": gemmini.ACCUMULATOR_BANDWIDTH},
        {"name": "Scratchpad", "entries": sp_kib * 1024, "instances": 1, "meshX": 1}
        | words
        | {"vector_access_energy": gemmini.scratchpad_pj(sp_kib)}
        | {"shared_bandwidth": gemmini.SCRATCHPAD_BANDWIDTH * pe},
        {"name": "DRAM", "technology": "DRAM", "instances": 1, "meshX": 1}
        | words
        | {"vector_access_energy": gemmini.DRAM_PJ, "shared_bandwidth": gemmini.DRAM_BANDWIDTH},
    ]
    arithmetic = {"name": "MACs", "instances": pe * pe, "meshX": pe, "word_bits": 8, "energy": gemmini.MAC_PJ}
    return {"arithmetic": arithmetic, "storage": storage}


def _problem(nest: Nest) -> dict[str, Any]:
    shape = {
        "name": "CNN_Layer",
        "dimensions": list("RSPQCKN"),
        "coefficients": [
            {"name": "Wstride", "default": 1},
            {"name": "Hstride", "default": 1},
            {"name": "Wdilation", "default": 1},
            {"name": "Hdilation", "default": 1},
        ],
        "data_spaces": [
            {"name": "Weights", "projection": [[["C"]], [["K"]], [["R"]], [["S"]]]},
            {
                "name": "Inputs",
                "projection": [
                    [["N"]],
                    [["C"]],
                    [["R", "Wdilation"], ["P", "Wstride"]],
                    [["S", "Hdilation"], ["Q", "Hstride"]],
                ],
            },
            {"name": "Outputs", "projection": [[["N"]], [["K"]], [["Q"]], [["P"]]], "read_write": True},
        ],
    }
    steps = dict(zip(("Wstride", "Hstride", "Wdilation", "Hdilation"), (*nest.stride, *nest.dilation), strict=True))
    return {"shape": shape, "instance": {d: int(nest.bounds[LOOPS.index(d)]) for d in _DIMENSIONS} | steps}


def _mapping(temporal: Array, spatial: Array, order: Any) -> list[dict[str, Any]]:
    """Outermost level first. Permutations run from inner to outer; `split` counts the loops that fan out along X."""
    keep = gemmini.Gemmini().space.keep
    entries: list[dict[str, Any]] = []
    for l in reversed(range(len(_LEVELS))):
        inner_first = [LOOPS[d] for d in np.argsort(order[l]) if LOOPS[d] in _DIMENSIONS]
        entry = {"target": _LEVELS[l], "type": "temporal", "factors": _factors(temporal[l])}
        entries.append(entry | {"permutation": "".join(inner_first)})
        if spatial[l].prod() > 1:
            along_x = [d for d in _DIMENSIONS if spatial[l, 0, LOOPS.index(d)] > 1]
            others = [d for d in _DIMENSIONS if d not in along_x]
            entry = {"target": _LEVELS[l], "type": "spatial", "factors": _factors(spatial[l].prod(axis=0))}
            entries.append(entry | {"permutation": "".join(along_x + others), "split": len(along_x)})
        if not keep[l].all():
            kept = [name for name, is_kept in zip(_TENSORS, keep[l], strict=True) if is_kept]
            passed = [name for name in _TENSORS if name not in kept]
            entries.append({"target": _LEVELS[l], "type": "bypass", "keep": kept, "bypass": passed})
    return entries


def _factors(factors: Array) -> str:
    return " ".join(f"{d}={int(factors[LOOPS.index(d)])}" for d in _DIMENSIONS)
