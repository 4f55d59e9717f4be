"""CIFAR-10 as it is published: the binary or the python version, a folder or the archive (.tar.gz) itself."""

import tarfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from nets.data import Dataset, Examples, assemble_dataset, make_examples
from nets.plain_pickle import read_plain_pickle

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_NUM_CLASSES = 10
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_LARGEST = 64 * 2**20  # bytes of a file of either version: 30.7 MB, and names in the python one
_FIRST_FILES = (_BATCHES[0], f"{_BATCHES[0]}.bin")


def is_cifar(path: Path) -> bool:
    """Whether a path is a folder with the first file of CIFAR-10, or a tar archive, plain or gzipped."""
    if path.is_dir():
        return any((path / name).is_file() for name in _FIRST_FILES)
    return path.name.endswith((".tar.gz", ".tgz", ".tar"))


def load_cifar_dataset(path: str | Path, *, num_classes: int | None = None, standardise: bool = False) -> Dataset:
    """Load CIFAR-10 from data_batch_1 to 5 and test_batch, with ".bin" the binary and without the python version.

    Nothing of an archive is unpacked to disk, and the pickles of the python version are read, not run
    (`nets.plain_pickle`). Every sixth training image, stratified by label, becomes the validation split.

    Args:
      path: of the folder that holds the files, or of the archive.
      num_classes: number of labels; None for 10, or for as many as a cut-down copy has.
      standardise: see `nets.data.make_dataset`.

    Returns:
      The dataset, images of shape (n, 32, 32, 3).

    Raises:
      ValueError: a missing, truncated or foreign file, labels out of range.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009; the formats by its web page.
    """
    path = Path(path)
    if path.is_dir():
        files = {file.name: file for file in path.iterdir() if file.is_file()}
        return _load(path, {name: file.read_bytes for name, file in files.items()}, num_classes, standardise)
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            readers = {name: partial(_read_member, archive, member) for name, member in members.items()}
            too_large = [name for name, member in members.items() if member.size > _LARGEST]
            if too_large:
                raise ValueError(f"{path}: expected the files of CIFAR-10, got {too_large[0]} of more than 64 MiB")
            return _load(path, readers, num_classes, standardise)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a readable tar archive, got {error}; fetch the file again") from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a regular file"
    return file.read()


def _load(
    path: Path, readers: Mapping[str, Callable[[], bytes]], num_classes: int | None, standardise: bool
) -> Dataset:
    """The dataset of whichever version is there; readers by file name."""
    suffix, decode = (".bin", _decode_binary) if _FIRST_FILES[1] in readers else ("", _decode_python)

    def read(name: str) -> Examples:
        what = f"{path}, {name}{suffix}"
        if name + suffix not in readers:
            raise ValueError(f"{what}: expected this file of CIFAR-10, found none; put it there")
        images, labels = decode(what, readers[name + suffix]())
        if labels.max(initial=0) >= _NUM_CLASSES:
            raise ValueError(f"{what}: expected labels from 0 to 9, got {labels.max()}; the file is damaged")
        return make_examples(what, images.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1), labels)

    batches = [read(name) for name in _BATCHES]
    train = Examples(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return assemble_dataset(str(path), {"train": train, "test": read("test_batch")}, num_classes, standardise)


def _decode_binary(what: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label and 3072 pixels."""
    if not data or len(data) % (1 + _PIXELS):
        raise ValueError(
            f"{what}: expected records of {1 + _PIXELS} bytes, got {len(data)} bytes; the file is truncated or another"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0]


def _decode_python(what: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary with data (n, 3072) and labels."""
    try:
        content = read_plain_pickle(data)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: expected a pickled dictionary of arrays, got {reason}; fetch it again") from error
    content = content if isinstance(content, dict) else {}
    images, labels = (content.get(key.encode(), content.get(key)) for key in ("data", "labels"))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
        images = None
    if images is None or not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{what}: expected data of shape (n, {_PIXELS}) and a list of labels; it is no CIFAR-10")
    if any(not 0 <= label < _NUM_CLASSES for label in labels):
        raise ValueError(f"{what}: expected labels from 0 to 9, got others; the file is damaged")
    return images, np.array(labels, np.int64)
