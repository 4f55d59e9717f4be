"""The network that a run ends with: weights, batch statistics and the formats of every layer, in one npz file."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.rundir import write_atomic
from nets.jaxpr import Product
from nets.precision import Precision
from nets.rules import LayerRule
from nets.training import Params, Rest

_FORMATS = ("log2_step", "log2_range", "error_bits")


def write_network(path: Path, params: Params, rest: Rest, precision: Precision) -> None:
    """Write a network: arrays "params" and "rest" with the path of each leaf, "formats" with fields of `Precision`."""
    arrays = _named({"params": params, "rest": rest})
    arrays |= {f"formats.{name}": np.asarray(getattr(precision, name)) for name in _FORMATS}
    arrays["formats.signed"] = np.asarray(precision.signed)
    arrays["formats.names"] = np.asarray(precision.names)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def read_network(
    path: Path, params: Params, rest: Rest, products: tuple[Product, ...]
) -> tuple[Params, Rest, Precision]:
    """Read a network back.

    Args:
      path: of the file.
      params, rest: of the same model, whose structure, shapes and dtypes they have.
      products: of the model.

    Raises:
      ValueError: no such file, a damaged one, or one of another model.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as loaded:
            arrays = dict(loaded)
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected the network of a finished run, got {reason}; run it again") from error
    names = tuple(product.name for product in products)
    template = {"params": params, "rest": rest}
    shapes = {key: (leaf.shape, leaf.dtype) for key, leaf in _named(template).items()}
    shapes |= {f"formats.{name}": ((len(names), 2), np.dtype(np.float32)) for name in _FORMATS}
    stored_names = np.asarray(names)
    shapes |= {
        "formats.signed": ((len(names), 2), np.dtype(bool)),
        "formats.names": (stored_names.shape, stored_names.dtype),
    }
    found = {key: (array.shape, array.dtype) for key, array in arrays.items() if key in shapes}
    if found != shapes or tuple(arrays["formats.names"].tolist()) != names:
        raise ValueError(f"{path}: expected the network of this run's model, got that of another; run it again")
    leaves, structure = jax.tree.flatten(template)
    values = [jnp.asarray(arrays[key]) for key in _named(template)]
    restored = jax.tree.unflatten(structure, values[: len(leaves)])
    precision = Precision(
        log2_step=jnp.asarray(arrays["formats.log2_step"]),
        log2_range=jnp.asarray(arrays["formats.log2_range"]),
        error_bits=jnp.asarray(arrays["formats.error_bits"]),
        names=names,
        param_paths=tuple(product.param_path for product in products),
        signed=tuple((bool(weights), bool(inputs)) for weights, inputs in arrays["formats.signed"]),
        learned=((False, False),) * len(names),
        frozen=True,
        rules=(LayerRule(learn=False),) * len(names),
    )
    return restored["params"], restored["rest"], precision


def _named(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their path, in the order of `jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
