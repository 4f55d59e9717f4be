"""Datasets from local files: finds out their format; IDX (of MNIST, plain or gzipped) and NumPy's npz are read here.

Files come from anywhere, so nothing in them is trusted: every read checks what it got, never unpickles, and complains
in one line that names the file, what was expected, what was found and what to do.
"""

import difflib
import gzip
import importlib
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nets.cifar import is_cifar, load_cifar_dataset
from nets.csv_files import load_csv_dataset
from nets.data import Dataset, assemble_dataset, load_digits_dataset, make_examples
from nets.image_folders import is_image_folder, load_image_folder
from nets.user_files import is_user_folder, load_user_dataset

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NPZ_SPLITS = ("train", "validation", "test")


def load_dataset(source: str | Path, *, num_classes: int | None = None, standardise: bool = False) -> Dataset:
    """Load a dataset, whatever its format.

    Args:
      source: "digits"; the path of a file or folder, whose format is found out: IDX, npz, CIFAR-10, images by class,
        CSV, JSON by user; or "module:function", a function of the user's own that returns a `Dataset`.
      num_classes: of a dataset from files; None counts the labels of its training split.
      standardise: see `nets.data.make_dataset`; the digits and datasets of a function never are.

    Returns:
      The dataset.

    Raises:
      ValueError: nothing there, or what the loaders raise.
    """
    if str(source) == "digits":
        return load_digits_dataset()
    path = Path(source)
    options: dict[str, Any] = {"num_classes": num_classes, "standardise": standardise}
    if path.is_dir():
        return _folder_loader(path)(path, **options)
    if path.is_file():
        return _file_loader(path)(path, **options)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", str(source)):
        return _call(str(source))
    hint = "did you mean 'digits'?" if difflib.get_close_matches(str(source).lower(), ["digits"]) else "check the path"
    raise ValueError(
        f"{source}: expected 'digits', a file or folder of a dataset, or module:function, found nothing there; {hint}"
    )


def _folder_loader(path: Path) -> Callable[..., Dataset]:
    """Who reads a folder, by what lies in it; IDX, the first format, also explains what is missing."""
    if is_cifar(path):
        return load_cifar_dataset
    if (path / "train.csv").is_file():
        return load_csv_dataset
    if is_user_folder(path):
        return load_user_dataset
    if is_image_folder(path):
        return load_image_folder
    return load_idx_dataset


def _file_loader(path: Path) -> Callable[..., Dataset]:
    if is_cifar(path):
        return load_cifar_dataset
    return {".csv": load_csv_dataset, ".json": load_user_dataset}.get(path.suffix.lower(), load_npz_dataset)


def _call(source: str) -> Dataset:
    """What a function of the user's own returns; its errors, whatever they are, in one line."""
    module, _, name = source.partition(":")
    try:
        dataset = getattr(importlib.import_module(module), name)()
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(f"{source}: expected it to return a Dataset, got {type(error).__name__}: {reason}") from error
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{source}: expected a nets.data.Dataset, got {type(dataset).__name__}; return what collect_dataset makes"
        )
    return dataset


def load_idx_dataset(folder: str | Path, *, num_classes: int | None = None, standardise: bool = False) -> Dataset:
    """Load a folder of four IDX files under their usual names, each plain or gzipped (".gz").

    The names are {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, as of MNIST and Fashion-MNIST.
    Every sixth training example, stratified by label, becomes the validation split (MNIST: 50 000 / 10 000 / 10 000).

    Args:
      folder: where the files are.
      num_classes: number of labels; None counts those of the training split.
      standardise: see `nets.data.make_dataset`.

    Returns:
      The dataset, images of shape (n, height, width, 1).

    Raises:
      ValueError: a missing, truncated or foreign file, images and labels that do not belong together, bad labels.
    """
    folder = Path(folder)
    splits = {}
    for split, (images_name, labels_name) in IDX_NAMES.items():
        images, labels = read_idx(_find_idx(folder, images_name)), read_idx(_find_idx(folder, labels_name))
        splits[split] = make_examples(f"{folder}, {split} files", images, labels)
    return assemble_dataset(str(folder), splits, num_classes, standardise)


def load_npz_dataset(path: str | Path, *, num_classes: int | None = None, standardise: bool = False) -> Dataset:
    """Load one npz file with arrays x_train, y_train, x_test, y_test and, if it has them, x_validation, y_validation.

    Images x are (n, height, width) or (n, height, width, channels), bytes or floats in [0, 1]; labels y are whole
    numbers, (n,) or (n, 1). Without a validation split, every sixth training example, stratified by label, becomes it.

    Args:
      path: of the file.
      num_classes: number of labels; None counts those of the training split.
      standardise: see `nets.data.make_dataset`.

    Returns:
      The dataset.

    Raises:
      ValueError: a missing, truncated or foreign file, pickled contents, missing arrays, wrong shapes or dtypes, NaN,
        pixels out of range, bad labels.
    """
    path = Path(path)
    arrays = _read_npz(path)
    splits = {}
    for split in NPZ_SPLITS:
        names = (f"x_{split}", f"y_{split}")
        missing = [name for name in names if name not in arrays]
        if split == "validation" and len(missing) == 2:
            continue
        if missing:
            raise ValueError(
                f"{path}: expected an array {missing[0]!r}, got {', '.join(arrays) or 'no arrays'}; save with "
                "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
            )
        splits[split] = make_examples(f"{path}, {split} split", *(arrays[name] for name in names))
    return assemble_dataset(str(path), splits, num_classes, standardise)


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzipped.

    The format: two zero bytes, the type (0x08 for unsigned bytes), the number of axes, each axis as a 32-bit big-endian
    number, then the data in row-major order.

    Args:
      path: of the file.

    Returns:
      The array, uint8.

    Raises:
      ValueError: not an IDX file of unsigned bytes, or shorter or longer than its header says.

    Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits, section "file formats".
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a readable IDX file, got {error}; fetch the file again") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes (00 00 08 and 1 to 4 axes), got a file that begins with "
            f"{data[:4].hex(' ') or 'nothing'}; is it the right file?"
        )
    header = 4 + 4 * data[3]
    shape = tuple(int(size) for size in np.frombuffer(data[4:header].ljust(header - 4, b"\0"), ">u4"))
    if len(data) != header + math.prod(shape):
        raise ValueError(
            f"{path}: expected {header + math.prod(shape)} bytes for an array of shape {shape}, got {len(data)}; "
            "the file is truncated or damaged, fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _find_idx(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    others = sorted(folder.glob("*.npz"))
    advice = (
        f"give that file instead: {others[0]}"
        if len(others) == 1
        else "put the four IDX files of the dataset there, or another of the formats of docs/own-data.md"
    )
    raise ValueError(f"{folder}: expected a file {name} or {name}.gz, found none; {advice}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # What zipfile raises for a damaged archive ranges from BadZipFile to RuntimeError (encrypted, unknown compression).
    damage = (OSError, EOFError, ValueError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("a single array")
            return dict(loaded)
    except damage as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path}: expected an npz file of plain arrays, got {reason}; save it with numpy.savez, or fetch it again"
        ) from error
