"""Checkpoints of a run: the last two states, whole or absent, tied to the config that made them."""

import contextlib
import errno
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from codesign import rundir

_FOLDER = "checkpoints"
_FINGERPRINT = "config_fingerprint"
_METRICS_BYTES = "metrics_bytes"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_METADATA_BYTES = 2**16  # of a checkpoint beside its arrays, generously


@dataclass(frozen=True)
class Checkpoint:
    """One saved state.

    Attributes:
      step: step number it was saved under.
      note: the JSON-like dict saved beside it (phase, results of finished phases).
      arrays: leaf name -> array.
    """

    step: int
    note: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def state(self, template: Any) -> Any:
        """The saved state as a pytree like `template`, whose leaves give structure, shapes, dtypes and devices.

        Raises:
          ValueError: the saved leaves are not those of `template`.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(template)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        wanted = {name for name, (_, leaf) in zip(names, leaves, strict=True) if np.size(leaf)}
        if wrong := sorted(wanted ^ set(self.arrays)):
            raise ValueError(
                f"the checkpoint of step {self.step} does not fit: {wrong[0]} is "
                f"{'missing' if wrong[0] in wanted else 'unknown'}; resume with the version that wrote it"
            )
        values = [
            _leaf_like(leaf, self.arrays[name], f"step {self.step}, {name}") if name in wanted else leaf
            for name, (_, leaf) in zip(names, leaves, strict=True)
        ]
        return jax.tree_util.tree_unflatten(structure, values)


def check_owner(directory: Path, fingerprint: str) -> None:
    """Check that a directory has no checkpoints of another config.

    Raises:
      ValueError: it has.
    """
    owner = directory / _FOLDER / _FINGERPRINT
    if owner.exists() and (found := owner.read_text().strip()) != fingerprint:
        raise ValueError(
            f"{directory} belongs to another config (fingerprint {found}, this one is {fingerprint}); resume it "
            f"without changed settings, or start a new run"
        )


class Checkpoints:
    """The checkpoints of one run directory, written one after another in the foreground."""

    def __init__(self, directory: Path, fingerprint: str):
        """Open or create DIRECTORY/checkpoints.

        Raises:
          ValueError: the directory belongs to another config.
        """
        self._directory = directory
        check_owner(directory, fingerprint)
        root = (directory / _FOLDER).absolute()
        if not (root / _FINGERPRINT).exists():
            rundir.write_atomic(root / _FINGERPRINT, fingerprint + "\n")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(root, options=options)

    def save(self, step: int, state: Any, note: Mapping[str, Any] | None = None) -> None:
        """Write the state after step `step`, larger than any step saved before, and drop all but the last two.

        Args:
          step: step number.
          state: pytree of arrays, numbers and PRNG keys.
          note: JSON-like dict to keep beside it, small.

        Raises:
          OSError: it cannot be written, as where the disk is full; the checkpoints before it are as they were.
          ValueError, TypeError: the state is nothing that a checkpoint holds.
        """
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        # Orbax refuses arrays without elements; the template of `Checkpoint.state` supplies them.
        arrays = {jax.tree_util.keystr(path): _to_numpy(leaf) for path, leaf in leaves if np.size(leaf)}
        # First the metrics, so that no checkpoint knows of lines that a power cut could lose.
        full_note = {**rundir.plain(note or {}), _METRICS_BYTES: rundir.sync_metrics(self._directory)}
        self._check_room(step, sum(array.nbytes for array in arrays.values()))
        saved = ocp.args.Composite(state=ocp.args.StandardSave(arrays), note=ocp.args.JsonSave(full_note))
        try:
            with _silent_threads():
                self._manager.save(step, args=saved, force=True)
        except Exception as error:
            if (number := _os_error(error)) is None:
                raise
            raise self._unwritten(step, number) from error

    def _check_room(self, step: int, num_bytes: int) -> None:
        """Reserve what a checkpoint will take and let go of it: on a full disk orbax's threads die one by one, and noisily."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            with tempfile.TemporaryFile(dir=self._directory) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes * 5 // 4 + _METADATA_BYTES)
        except OSError as error:
            raise self._unwritten(step, error.errno or 0) from error

    def _unwritten(self, step: int, number: int) -> OSError:
        advice = "make room on the disk" if number in _FULL else "let the directory be written to"
        return OSError(
            f"the checkpoint of step {step} in {self._directory} cannot be written ({os.strerror(number)}); {advice} and go on "
            f"with run --resume {self._directory}"
        )

    def resume(self) -> Checkpoint | None:
        """The latest readable checkpoint, with metrics.jsonl cut back to it; None, and no metrics, without one."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                saved = self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), note=ocp.args.JsonRestore())
                )
            except Exception as error:  # whatever a damaged file makes orbax raise
                warnings.warn(
                    f"checkpoint of step {step} is damaged ({type(error).__name__}); trying the one before",
                    stacklevel=2,
                )
                continue
            note = dict(saved.note)
            rundir.cut_metrics(self._directory, note.pop(_METRICS_BYTES))
            return Checkpoint(step, note, saved.state)
        rundir.cut_metrics(self._directory, 0)
        return None

    def close(self) -> None:
        """Let go of the directory."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _silent_threads() -> Iterator[None]:
    """Orbax's threads log what they raise, traceback and all, before it is raised here: once is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _os_error(error: BaseException | None) -> int | None:
    """The operating system's error behind one that orbax raises; the library below it tells it in its message alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _leaf_like(template: Any, value: np.ndarray, where: str) -> Any:
    """`value` as the kind of leaf that `template` is: PRNG key, JAX array on its devices, numpy array or number."""
    expected = _to_numpy(template)
    if (expected.shape, expected.dtype) != (value.shape, value.dtype):
        raise ValueError(
            f"the checkpoint does not fit: {where} has shape {value.shape} and type {value.dtype}, expected "
            f"{expected.shape} and {expected.dtype}; resume with the settings that wrote it"
        )
    if _is_key(template):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(template))
    if isinstance(template, jax.Array):
        return jax.device_put(value, template.sharding)
    return value if isinstance(template, np.ndarray) else value.item()
