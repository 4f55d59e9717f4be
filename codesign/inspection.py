"""What `trace` and `cost` tell about a model before anything is trained, as plain dicts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from codesign.config import ChipConfig
from codesign.cost_report import compile_costs, describe_cost, describe_operations, inference_cost, training_cost
from codesign.evaluation import Evaluated, evaluate_chip
from codesign.onnx_reader import OnnxFunction, read_onnx
from codesign.problem import CHIP_NUMBERS, load_chip, load_model, load_published, trace_network
from codesign.tracing import Workload, trace
from codesign.zigzag_accelerators import Accelerator, read_zigzag_accelerator
from codesign.zigzag_workloads import ZigzagFunction, read_zigzag_workload
from hw.chip import Chip
from hw.chips import PRESETS
from nets import LayerRule, PrecisionRules
from nets.data import batches
from nets.dataset_files import load_dataset
from nets.low_bit_training import fit_low_bit, left_work
from nets.training import split_model

SKIPPING = ("zero skipping", "slice skipping", "zero gating")
# Of the mapper, behind a first one; each costs a tenth of a second on a small network, and compiles nothing.
_ROUNDS = 5
_READERS: dict[str, Callable[[Path, int], OnnxFunction | ZigzagFunction]] = {
    ".onnx": read_onnx,
    ".yaml": read_zigzag_workload,
    ".yml": read_zigzag_workload,
}


def trace_model(model: str, data: str, batch_size: int) -> dict[str, Any]:
    """Operations of one training step.

    Args:
      model, data: as the settings `model.name` and `data.name`; of the data only the shapes matter. Or the
        file of an ONNX graph or a ZigZag workload, whose inputs have their own shapes.
      batch_size: samples per step.

    Returns:
      "operations": the rows of `Workload.table`; "effective_macs" and "macs": their totals, without and with the
      products of which one factor is padding.

    Raises:
      ValueError: no such model or data, or a model without any convolution or product.
    """
    rows = model_workload(model, data, batch_size).table()
    totals = {name: sum(row[name] for row in rows) for name in ("effective_macs", "macs")}
    return {"model": model, "data": data, "batch_size": batch_size, "operations": rows} | totals


def cost_model(
    model: str,
    data: str,
    batch_size: int,
    bits: int,
    chip: ChipConfig,
    evaluations: int,
    skip_after_epochs: int = 0,
    mode: str | None = None,
) -> dict[str, Any]:
    """Cost of one training step, and of one inference of a single sample, with the same bits everywhere.

    Args:
      model, data, batch_size: as `trace_model`.
      bits: of weights, inputs and backward errors.
      chip: preset and what differs from it; the preset may be a published chip, or the file of a ZigZag accelerator, of which
        only the node can differ.
      evaluations: mappings tried per operation in each of six rounds.
      skip_after_epochs: epochs of training with these bits after which densities are measured; 0 skips nothing.
      mode: of a published chip, by default its narrowest for these bits.

    Returns:
      "density", the share of the work left by operation, None where nothing is skipped; "training_step" and
      "inference", each what `codesign.cost_report.describe_cost` tells, and its "operations".

    Raises:
      ValueError: as `trace_model`; or the chip cannot run an operation, such as with these bits, or skips nothing.
    """
    accelerator, key = _accelerator(chip, mode), jax.random.key(0)
    built = accelerator.chip if accelerator else _build(chip, bits, mode, skips=skip_after_epochs > 0)
    training = model_workload(model, data, batch_size)
    uniform: Any = np.full((training.num_products, 4), float(bits), np.float32)

    work = _left_work(model, data, batch_size, bits, skip_after_epochs, built) if skip_after_epochs else None

    def searched(workload: Workload) -> Evaluated:
        widths = workload.operation_bits(uniform), workload.tensor_bits(uniform)
        density = None if work is None else workload.operation_density(work)
        freedom = None if accelerator is None else accelerator.freedom(workload.step.operations)
        return evaluate_chip(
            built, workload.step, *widths, key, workload.labels, density=density, evaluations=evaluations, rounds=_ROUNDS,
            freedom=freedom,
        )  # fmt: skip

    # Searching a whole training step of one sample, of the same shapes, costs less than compiling the search again.
    with ThreadPoolExecutor(1) as beside:  # LLVM compiles one while Python traces another
        beside.submit(compile_costs, built, training, uniform)
        single = beside.submit(model_workload, model, data, 1)
        costed = {
            "training_step": training_cost(training, searched(training), uniform),
            "inference": inference_cost(single.result(), searched(single.result()), uniform),
        }
    shares = None if work is None else training.operation_density(work).prod(axis=1).tolist()
    density = None if shares is None else dict(zip(training.labels, shares, strict=True))
    told = {"model": model, "chip": chip.preset, "bits": bits, "batch_size": batch_size, "density": density}
    return told | {name: describe_cost(one) | {"operations": describe_operations(one)} for name, one in costed.items()}


def _accelerator(chip: ChipConfig, mode: str | None) -> Accelerator | None:
    """The accelerator of a file, if that is what the chip is."""
    if Path(chip.preset).suffix not in (".yaml", ".yml"):
        return None
    given = [name for name in CHIP_NUMBERS if getattr(chip, name) is not None] + ["mode"] * (mode is not None)
    if given:
        raise ValueError(f"expected the chip as its file {chip.preset} says, got {given[0]} beside it; change the file")
    return read_zigzag_accelerator(Path(chip.preset), chip.node_nm)


def _build(config: ChipConfig, bits: int, mode: str | None, *, skips: bool) -> Chip:
    if config.preset in PRESETS:
        return load_published(config, bits, mode, SKIPPING if skips else ())
    if mode is not None:
        raise ValueError(f"expected no mode for {config.preset!r}, got {mode!r}; only published chips have modes")
    return load_chip(config)


def _left_work(model: str, data: str, batch_size: int, bits: int, epochs: int, chip: Chip) -> jax.Array:
    """Densities (P, 3, 2) after training: of slices where the chip's MACs take slices, else of whole words."""
    dataset = load_dataset(data)
    forward, params, rest = split_model(load_model(model, dataset, seed=0))
    rules = PrecisionRules({"*": LayerRule(bits, bits, bits, bits, learn=False)})
    state, _ = fit_low_bit(forward, params, rest, dataset, rules, epochs=epochs, batch_size=batch_size)
    slice_width = int(chip.mac.slice_bits) if chip.mac.style == "slices" else None
    batch = next(batches(dataset, batch_size, seed=0, epoch=0))
    return left_work(forward, state, batch, slice_width)


def model_workload(model: str, data: str, batch_size: int) -> Workload:
    """The workload of a model by its name or file; arguments and errors as `trace_model`."""
    if (suffix := Path(model).suffix) in _READERS:
        graph = _READERS[suffix](Path(model), batch_size)
        return trace(graph.fn, graph.params, *graph.inputs)
    dataset = load_dataset(data)
    shapes = nnx.eval_shape(lambda: load_model(model, dataset, seed=0))  # nothing is initialised
    return trace_network(*split_model(shapes), dataset, batch_size, "sgd")
