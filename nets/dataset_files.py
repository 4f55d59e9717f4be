"""Datasets from local files: IDX (the format of MNIST, plain or gzipped) and NumPy's npz.

Files come from anywhere, so nothing in them is trusted: every read checks what it got, never unpickles, and complains
in one line that names the file, what was expected, what was found and what to do.
"""

import difflib
import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from nets.data import Dataset, Examples, load_digits_dataset, make_dataset, make_examples, stratified_places, take

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NPZ_SPLITS = ("train", "validation", "test")


def load_dataset(source: str | Path, *, num_classes: int | None = None, standardise: bool = False) -> Dataset:
    """Load the dataset called "digits", a folder of IDX files, or an npz file.

    Args:
      source: "digits", or the path of a folder (see `load_idx_dataset`) or of an npz file (see `load_npz_dataset`).
      num_classes: of a dataset from files; None counts the labels of its training split.
      standardise: see `nets.data.make_dataset`; the digits never are.

    Returns:
      The dataset.

    Raises:
      ValueError: nothing there, or what the loaders raise.
    """
    if str(source) == "digits":
        return load_digits_dataset()
    path = Path(source)
    if path.is_dir():
        return load_idx_dataset(path, num_classes=num_classes, standardise=standardise)
    if path.is_file():
        return load_npz_dataset(path, num_classes=num_classes, standardise=standardise)
    hint = "did you mean 'digits'?" if difflib.get_close_matches(str(source).lower(), ["digits"]) else "check the path"
    raise ValueError(f"{source}: expected 'digits', a folder of IDX files or an npz file, found nothing there; {hint}")


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
    return _assemble(folder, splits, num_classes, standardise)


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
    return _assemble(path, splits, num_classes, standardise)


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
        f"give that file instead: {others[0]}" if len(others) == 1 else "put the four IDX files of the dataset there"
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


def _assemble(path: Path, splits: dict[str, Examples], num_classes: int | None, standardise: bool) -> Dataset:
    train = splits["train"]
    if num_classes is None:
        num_classes = _count_classes(f"{path}, train split", train.labels)
    if "validation" in splits:
        validation = splits["validation"]
    else:
        is_validation = stratified_places(train.labels) % 6 == 0
        train, validation = take(train, ~is_validation), take(train, is_validation)
    return make_dataset(str(path), train, validation, splits["test"], num_classes, standardise)


def _count_classes(what: str, labels: np.ndarray) -> int:
    """One more than the largest label, if all below it occur: a stray label would otherwise add empty classes."""
    found = np.unique(labels)
    if not np.array_equal(found, np.arange(len(found))):
        raise ValueError(
            f"{what}: expected labels 0, 1, 2, ... without gaps, got {found[0]} to {found[-1]}, {len(found)} "
            "different ones; mend them, or set num_classes if some classes have no example"
        )
    return len(found)
