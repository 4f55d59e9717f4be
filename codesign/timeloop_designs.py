"""A design as Timeloop inputs: for each operation one file with chip, problem and mapping, and those back.

`timeloop-model FILE` scores it: flat `arch: {arithmetic, storage}`, innermost level first, energies and bandwidths those that
our laws give for this chip. Three things have no exact counterpart there:

- Timeloop counts words of one width. A word has the width of the operation's widest operand, so what narrow operands
  gain is lost, and a mapping may exceed a level's entries that holds it in bits; energies per word are those of that width.
- A loop that runs along both axes of the array takes a level more, which keeps nothing: columns above it, rows below.
- Factors that do not divide their loop are written with the rest of the last pass ("N=5,3").
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from codesign.exchange import operations_of, read_timeloop_problem, timeloop_problem
from codesign.rundir import blaming, read_yaml, write_atomic
from codesign.summary import read_bits, read_mapping
from codesign.tracing import Workload
from hw.arithmetic import product_energy
from hw.chip import Chip
from hw.mapping import Mapping, make_mapping
from hw.operation import LOOPS, OPERANDS, Operation

SPACES = ("Weights", "Inputs", "Outputs")
_ROWS = "_rows"  # ends the name of the level between the columns and the rows of a fan-out


def write_timeloop_designs(workload: Workload, chip: Chip, design: MappingABC[str, Any], folder: Path) -> list[Path]:
    """One file for each operation of a training step: `000-conv1-forward.yaml`.

    Args:
      workload: the traced training step.
      chip: the designed chip.
      design: content of design.yaml, of which bits and mappings are taken.
      folder: where the files go.

    Raises:
      ValueError: the design has no mapping of an operation, or one that does not cover it, or no bits.
    """
    mappings = design.get("mappings")
    if not isinstance(mappings, MappingABC):
        raise ValueError(f"expected mappings of operations in the design, got {mappings!r:.80}")
    widths = np.asarray(workload.operation_bits(read_bits(design.get("bits", {}))))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, (operation, label) in enumerate(zip(operations_of(workload), workload.labels, strict=True)):
        if label not in mappings:
            raise ValueError(f"expected a mapping of {label} in the design, got none; is it that of this model?")
        read = read_mapping(mappings[label], chip.names)
        mapping = make_mapping(operation, read.temporal, read.spatial, read.order, read.keep)
        name = f"{i:03d}-{workload.names[i].replace('/', '.')}-{workload.passes[i]}.yaml"
        content = timeloop_design(chip, operation, mapping, widths[i])
        paths.append(folder / name)
        write_atomic(paths[-1], yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))
    return paths


def timeloop_design(chip: Chip, operation: Operation, mapping: Mapping, bits: np.ndarray) -> dict[str, Any]:
    """Architecture, problem and mapping of one operation; all concrete.

    Args:
      chip: the chip.
      operation: the nest.
      mapping: on the chip's levels.
      bits: (3,), widths of the operands.
    """
    spatial = np.asarray(mapping.spatial)
    split = [l for l in range(len(chip.names)) if ((spatial[l] > 1).sum(axis=0) == 2).any()]
    word_bits = int(np.ceil(np.max(bits)))
    return {
        "arch": _architecture(chip, word_bits, bits[np.asarray(operation.accumulated) == 0], split),
        **timeloop_problem(operation),
        "mapping": timeloop_mapping(chip.names, operation, mapping, split),
    }


def read_timeloop_design(path: Path) -> tuple[Operation, Mapping]:
    """The operation and its mapping of a file as `write_timeloop_designs` writes it.

    Raises:
      ValueError: no such content; a mapping that does not cover the problem.
      FileNotFoundError: no such file.
    """
    operation, content = read_timeloop_problem(path), read_yaml(path)
    with blaming(path):
        try:
            names = [level["name"] for level in content["arch"]["storage"]]
            return operation, _read_mapping(operation, names, content["mapping"])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"expected arch, problem and mapping of Timeloop, got none that can be read: {error!r}"
            ) from None


def _architecture(chip: Chip, word_bits: int, read_widths: np.ndarray, split: Sequence[int]) -> dict[str, Any]:
    fanout, instances = np.asarray(chip.fanout), np.asarray(chip.instances())
    capacity, per_cycle = np.asarray(chip.limits())[: len(chip.names)], np.asarray(chip.bits_per_cycle())
    energy = np.asarray(chip.energy_per_bit()).mean(axis=1) * word_bits * 1e12
    storage: list[dict[str, Any]] = []
    for l, name in enumerate(chip.names):
        mesh = int(fanout[l + 1 :, 0].prod())
        if l in split:
            columns = mesh * int(fanout[l, 0])
            storage.append(
                timeloop_level(name + _ROWS, int(instances[l] * fanout[l, 0]), columns, word_bits) | {"entries": 1}
            )
        level = timeloop_level(name, int(instances[l]), mesh, word_bits)
        level |= {"vector_access_energy": float(energy[l]), "shared_bandwidth": float(per_cycle[l]) / word_bits}
        storage.append(
            level | ({"entries": int(capacity[l] // word_bits)} if np.isfinite(capacity[l]) else {"technology": "DRAM"})
        )
    mac = {"name": "MACs", "instances": int(fanout.prod()), "meshX": int(fanout[:, 0].prod()), "word_bits": word_bits}
    product = product_energy(chip.mac, chip.technology, chip.vdd, jnp.asarray(read_widths), chip.mac.accumulator_bits)
    return {"arithmetic": mac | {"energy": float(product) * 1e12}, "storage": storage}


def timeloop_level(name: str, instances: int, mesh: int, word_bits: int) -> dict[str, Any]:
    """A memory level without its size and prices; `mesh` of its instances stand side by side."""
    return {
        "name": name,
        "instances": instances,
        "meshX": mesh,
        "word_bits": word_bits,
        "block_size": 1,
        "cluster_size": 1,
    }


def timeloop_mapping(
    names: Sequence[str], operation: Operation, mapping: Mapping, split: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """A mapping in Timeloop's words: outermost level first; permutations run from inner to outer.

    Args:
      names: of the levels, innermost first.
      operation: the nest.
      mapping: of it; concrete.
      split: levels below which one loop runs along both axes, and which need a level of rows below.
    """
    temporal, spatial = (np.rint(np.asarray(x)).astype(int) for x in (mapping.temporal, mapping.spatial))
    rests = _rests(operation, temporal, spatial)
    entries: list[dict[str, Any]] = []
    for l in reversed(range(len(names))):
        inner_first = [LOOPS[d] for d in np.argsort(np.asarray(mapping.order[l]))]
        entries.append(_directive(names[l], "temporal", temporal[l], rests[l][2], inner_first))
        columns = [d for i, d in enumerate(LOOPS) if spatial[l, 0, i] > 1]
        permutation = columns + [d for d in LOOPS if d not in columns]
        keeps = [name for name, kept in zip(SPACES, np.asarray(mapping.keep[l]), strict=True) if kept]
        if l in split:
            entries.append(_directive(names[l], "spatial", spatial[l, 0], rests[l][0], permutation) | {"split": 8})
            entries += _passed(names[l], keeps)
            rows = names[l] + _ROWS
            entries.append(_directive(rows, "temporal", np.ones(8, int), np.ones(8, int), list(LOOPS)))
            entries.append(_directive(rows, "spatial", spatial[l, 1], rests[l][1], list(LOOPS)) | {"split": 0})
            entries += _passed(rows, [])
        else:
            both, rest = spatial[l].prod(axis=0), rests[l][:2].prod(axis=0)
            if both.prod() > 1:
                entries.append(_directive(names[l], "spatial", both, rest, permutation) | {"split": len(columns)})
            entries += _passed(names[l], keeps)
    return entries


def _passed(name: str, keeps: list[str]) -> list[dict[str, Any]]:
    """What a level does not keep."""
    bypass = [space for space in SPACES if space not in keeps]
    return [{"target": name, "type": "bypass", "keep": keeps, "bypass": bypass}] if bypass else []


def _directive(name: str, kind: str, factors: np.ndarray, rests: np.ndarray, permutation: list[str]) -> dict[str, Any]:
    texts = [
        f"{loop}={factor}" if factor == rest else f"{loop}={factor},{rest}"
        for loop, factor, rest in zip(LOOPS, factors, rests, strict=True)
    ]
    return {"target": name, "type": kind, "factors": " ".join(texts), "permutation": "".join(permutation)}


def _rests(operation: Operation, temporal: np.ndarray, spatial: np.ndarray) -> np.ndarray:
    """Iterations of every factor in its last pass, (L, 3, 8): columns, rows, time."""
    left = np.rint(np.asarray(operation.bounds)).astype(int)
    rests = np.ones((len(temporal), 3, len(LOOPS)), int)
    for l in range(len(temporal)):
        # From the inside: rows lie below columns, both below the loops in time.
        for place, factors in ((1, spatial[l, 1]), (0, spatial[l, 0]), (2, temporal[l])):
            rests[l, place] = (left - 1) % factors + 1
            left = -(-left // factors)
    return rests


def _read_mapping(operation: Operation, names: Sequence[str], entries: Sequence[Any]) -> Mapping:
    own = [name for name in names if not name.endswith(_ROWS)]
    temporal, spatial = np.ones((len(own), len(LOOPS))), np.ones((len(own), 2, len(LOOPS)))
    order, keep = np.tile(np.arange(len(LOOPS)), (len(own), 1)), np.ones((len(own), len(OPERANDS)))
    for entry in entries:
        target, kind = entry["target"], entry["type"]
        if target not in names:
            raise ValueError(f"expected targets {', '.join(names)} in the mapping, got {target!r}; name a level")
        l, is_rows = own.index(target.removesuffix(_ROWS)), target.endswith(_ROWS)
        if kind == "bypass":
            if not is_rows:
                keep[l] = [space in entry["keep"] for space in SPACES]
            continue
        factors = {text[0]: int(text[2:].partition(",")[0]) for text in entry["factors"].split()}
        values, permutation = np.array([factors.get(loop, 1) for loop in LOOPS]), entry["permutation"]
        if sorted(permutation) != sorted(LOOPS) or kind not in ("temporal", "spatial"):
            raise ValueError(
                f"expected temporal, spatial or bypass and a permutation of {''.join(LOOPS)}, got {entry!r}"
            )
        if kind == "spatial":
            along_x = [loop in permutation[: entry["split"]] for loop in LOOPS]
            spatial[l] *= np.where(np.array([along_x, np.logical_not(along_x)]), values, 1)
        elif not is_rows:
            temporal[l], order[l] = values, [permutation.index(loop) for loop in LOOPS]
    return make_mapping(operation, temporal, spatial, order, keep)
