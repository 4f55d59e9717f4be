"""What `export` writes of a finished run, for other tools."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from codesign import rundir
from codesign.config import Config, load_config
from codesign.design import with_values
from codesign.exchange import write_layers
from codesign.network_file import read_network
from codesign.onnx_export import export_onnx, write_onnx
from codesign.optional import require
from codesign.problem import batch_size, load_chip, load_model, load_tasks, trace_network
from codesign.summary import chip_values, read_bits
from codesign.timeloop_designs import write_timeloop_designs
from codesign.tracing import Workload
from nets.data import Dataset
from nets.jaxpr import find_products
from nets.training import Forward, Params, Rest, split_model

_STAGE = re.compile(r"\w[\w ./-]{0,99}")  # names folders


def export_run(directory: Path, format_: str, out: Path | None = None, samples: int = 1) -> list[Path]:
    """Write a finished run in the format of another tool.

    Args:
      directory: of the run.
      format_: a key of `FORMATS`.
      out: file or folder to write; by default one in the run's directory.
      samples: images per call of the ONNX graph.

    Returns:
      Paths of what was written.

    Raises:
      ValueError: no finished run, or something in it without counterpart in that format.
      FileNotFoundError: no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no such directory: {directory}; give a run directory, such as those in runs/")
    rundir.read_result(directory)  # tells whether it is finished
    return FORMATS[format_](directory, out, samples)


def _write_onnx(directory: Path, out: Path | None, samples: int) -> list[Path]:
    """The network of the joint design."""
    _, dataset, forward, params, rest = _load(directory)

    def network(params: Params, images: jax.Array) -> jax.Array:
        return forward(params, rest, images, None, False)[0]

    images = jax.ShapeDtypeStruct((samples, *dataset.input_shape), jnp.float32)
    products = find_products(network, params, images)
    params, rest, precision = read_network(directory / rundir.NETWORK, params, rest, products)
    path = out or directory / "network.onnx"
    write_onnx(export_onnx(network, params, precision, images), path)
    return [path]


def _write_csv(directory: Path, out: Path | None, samples: int) -> list[Path]:
    """The table of layers, with the bits of the joint design."""
    path = out or directory / "layers.csv"
    with rundir.blaming(directory / rundir.DESIGN) as source:
        bits = read_bits(rundir.read_design(source).get("bits", {}))
        workload = _workload(directory)
        if (num := workload.num_products) != len(bits):
            raise ValueError(f"expected the bits of {num} layers, got those of {len(bits)}; is it that of this model?")
    write_layers(workload, path, bits)
    return [path]


def _write_timeloop(directory: Path, out: Path | None, samples: int) -> list[Path]:
    """Chip, problem and mapping of every operation of the joint design's training step."""
    base = load_chip(load_config(directory / rundir.CONFIG).chip)
    with rundir.blaming(directory / rundir.DESIGN) as source:
        design = rundir.read_design(source)
        chip = with_values(base, chip_values(design.get("chip", {})))
        return write_timeloop_designs(_workload(directory), chip, design, out or directory / "timeloop")


def _write_tensorboard(directory: Path, out: Path | None, samples: int) -> list[Path]:
    """Every number of metrics.jsonl as a scalar, a run of TensorBoard for each stage."""
    writer_type = require("tensorboardX", "exchange").SummaryWriter
    folder = out or directory / "tensorboard"
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"expected an empty folder, got {folder} with files in it; remove it or name another with --out"
        )
    records = rundir.read_metrics(directory)
    if not records:
        raise ValueError(f"{directory / rundir.METRICS}: expected lines of metrics, found none; restore the file")
    for number, record in enumerate(records, start=1):
        if not (_STAGE.fullmatch(str(record.get("stage"))) and isinstance(record.get("epoch"), int)):
            raise ValueError(f"{directory / rundir.METRICS}, line {number}: expected a stage and its epoch; remove it")
    paths = []
    for stage in dict.fromkeys(str(record["stage"]) for record in records):
        paths.append(folder / stage.replace("/", "."))
        with writer_type(str(paths[-1])) as writer:
            for record in records:
                if record["stage"] != stage:
                    continue
                for name, value in _scalars(record).items():
                    writer.add_scalar(name, value, int(record["epoch"]))
    return paths


def _scalars(record: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, those of the chip by "chip/rows" and the like."""
    chip = record.get("chip")
    nested = {f"chip/{name}": value for name, value in (chip.items() if isinstance(chip, dict) else ())}
    return {
        name: value for name, value in (record | nested).items() if isinstance(value, int | float) and name != "epoch"
    }


def _load(directory: Path) -> tuple[Config, Dataset, Forward, Params, Rest]:
    """Settings, data and untrained network of a run."""
    config = load_config(directory / rundir.CONFIG)
    dataset = load_tasks(config).methods
    return config, dataset, *split_model(load_model(config.model.name, dataset, config.train.seed))


def _workload(directory: Path) -> Workload:
    config, dataset, forward, params, rest = _load(directory)
    return trace_network(forward, params, rest, dataset, batch_size(config, dataset), config.train.optimizer)


FORMATS: dict[str, Callable[[Path, Path | None, int], list[Path]]] = {
    "onnx": _write_onnx,
    "timeloop": _write_timeloop,
    "tensorboard": _write_tensorboard,
    "csv": _write_csv,
}
