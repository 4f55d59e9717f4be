"""Image classification data: splits, normalisation, deterministic batches and augmentation.

Everything random comes from explicit seeds, so that a run can be repeated and resumed batch by batch.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """Images with their labels: a split of a dataset or one batch.

    Fields:
      images: float32, shape (n, height, width, channels), normalised as the networks see them.
      labels: int32, shape (n,), in [0, num_classes).
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A classification task with three disjoint splits; choices are made on `validation`, `test` is only reported.

    Fields:
      name: what it is called in reports.
      train, validation, test: the splits.
      num_classes: number of labels.
      mean, scale: shape (channels,); networks see (pixels - mean) / scale of pixels in [0, 1].
      test_users: int32, shape (n,), whose each example of the test split is, where the data come by user: users
        0, 1, ..., none of whom occurs in another split; else None.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    mean: np.ndarray
    scale: np.ndarray
    test_users: np.ndarray | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Undo the normalisation: images as networks see them to pixels in [0, 1], same shape."""
        return images * self.scale + self.mean

    def from_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Normalise pixels in [0, 1] to images as networks see them, float32 of the same shape."""
        return ((pixels - self.mean) / self.scale).astype(np.float32)


def make_examples(what: str, images: np.ndarray, labels: np.ndarray) -> Examples:
    """Check raw images and labels and bring them into one form.

    Args:
      what: they are called this in errors, such as a file and a split.
      images: shape (n, height, width) or (n, height, width, channels), bytes or floats in [0, 1].
      labels: whole numbers >= 0, shape (n,) or (n, 1).

    Returns:
      Pixels in [0, 1] with labels, not yet normalised.

    Raises:
      ValueError: no images, another shape or dtype, NaN, pixels outside [0, 1], negative labels.
    """
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"{what}: expected images of shape (n, height, width) or (n, height, width, channels), none of them 0, got "
            f"{images.shape}; check how they were saved"
        )
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise ValueError(
            f"{what}: expected one label for each of {len(images)} images, got shape {labels.shape}; do they "
            "belong together?"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what}: expected labels of an integer dtype, got {labels.dtype}; convert them")
    if labels.min() < 0:
        raise ValueError(f"{what}: expected labels from 0 on, got {labels.min()}; number the classes from 0")
    return Examples(_to_pixels(what, images.reshape(*images.shape[:3], -1)), labels.reshape(-1).astype(np.int32))


def _to_pixels(what: str, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{what}: expected images of dtype uint8 or floats in [0, 1], got {images.dtype}; convert them"
        )
    finite = np.isfinite(images).all((1, 2, 3))
    if not finite.all():
        raise ValueError(
            f"{what}: expected finite pixels, got NaN or infinity in {np.sum(~finite)} images, the first of them image "
            f"{np.argmin(finite)}; remove or mend them"
        )
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"{what}: expected pixels in [0, 1], got {images.min():g} to {images.max():g}; scale them, or save bytes"
        )
    return images.astype(np.float32)


def shape_images(what: str, pixels: np.ndarray) -> np.ndarray:
    """Rows of pixels as square images.

    Args:
      what: they are called this in errors.
      pixels: shape (n, pixels), row by row, channels last.

    Returns:
      Shape (n, height, height, 1) or, if only the third of their number is square, (n, height, height, 3).

    Raises:
      ValueError: no such shape.
    """
    count = pixels.shape[1]
    for channels in (1, 3):
        height = math.isqrt(count // channels)
        if channels * height**2 == count > 0:
            return pixels.reshape(-1, height, height, channels)
    raise ValueError(
        f"{what}: expected a square number of pixels for an image, or three times one, got {count}; save them as npz"
    )


def make_dataset(
    name: str,
    train: Examples,
    validation: Examples,
    test: Examples,
    num_classes: int,
    standardise: bool = False,
) -> Dataset:
    """Assemble a dataset from the pixels of three splits.

    Without standardisation networks see the pixels themselves: a black background stays exactly zero, needs no sign bit
    and costs a chip that skips zeros nothing. Standardised images have mean 0 and variance 1 per channel over the
    training split, which deep networks on photographs prefer.

    Args:
      name: what it is called in reports and errors.
      train, validation, test: pixels in [0, 1] with labels, from `make_examples`.
      num_classes: number of labels.
      standardise: subtract the mean and divide by the standard deviation of each channel.

    Returns:
      The normalised dataset.

    Raises:
      ValueError: splits with images of different shapes, an empty split, labels from num_classes on, fewer than two
        classes, a constant channel with `standardise`.
    """
    if num_classes < 2:
        raise ValueError(f"{name}: expected at least two classes, got {num_classes}; one class needs no network")
    for split_name, split in (("train", train), ("validation", validation), ("test", test)):
        if len(split.labels) == 0:
            raise ValueError(f"{name}, {split_name} split: expected examples, got none; add some")
        if split.images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"{name}, {split_name} split: expected images of shape {train.images.shape[1:]} like those of the "
                f"training split, got {split.images.shape[1:]}; resize them"
            )
        if split.labels.max() >= num_classes:
            raise ValueError(
                f"{name}, {split_name} split: expected labels in [0, {num_classes}), got {split.labels.max()}; "
                "mend the label or raise num_classes"
            )
    channels = train.images.shape[-1]
    if not standardise:
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        return Dataset(name, train, validation, test, num_classes, zeros, ones)
    mean = train.images.mean((0, 1, 2), dtype=np.float64).astype(np.float32)
    scale = train.images.std((0, 1, 2), dtype=np.float64).astype(np.float32)
    if not np.all(scale > 0):
        raise ValueError(f"{name}: expected channels that vary, got a constant one; drop it or do not standardise")
    train, validation, test = (Examples((s.images - mean) / scale, s.labels) for s in (train, validation, test))
    return Dataset(name, train, validation, test, num_classes, mean, scale)


def assemble_dataset(
    name: str, splits: Mapping[str, Examples], num_classes: int | None, standardise: bool = False
) -> Dataset:
    """A dataset of the splits that its source has.

    Without a validation split every sixth training example, stratified by label, becomes it. Without a test split, too,
    of every five examples in the order of their labels the first goes to the test split, the second to validation, the
    others to training.

    Args:
      name: what it is called in reports and errors.
      splits: "train" and, if the source has them, "validation" and "test".
      num_classes: number of labels; None counts those of the training split.
      standardise: see `make_dataset`.

    Raises:
      ValueError: labels of the training split with gaps where they are to be counted; as `make_dataset`.
    """
    train = splits["train"]
    if num_classes is None:
        num_classes = _count_classes(f"{name}, train split", train.labels)
    if "test" in splits and "validation" in splits:
        validation, test = splits["validation"], splits["test"]
    elif "test" in splits:
        test, is_validation = splits["test"], stratified_places(train.labels) % 6 == 0
        train, validation = take(train, ~is_validation), take(train, is_validation)
    else:
        part = stratified_places(train.labels) % 5
        train, validation, test = (take(train, chosen) for chosen in (part >= 2, part == 1, part == 0))
    return make_dataset(name, train, validation, test, num_classes, standardise)


def _count_classes(what: str, labels: np.ndarray) -> int:
    """One more than the largest label, if all below it occur: a stray label would otherwise add empty classes."""
    found = np.unique(labels)
    if not np.array_equal(found, np.arange(len(found))):
        raise ValueError(
            f"{what}: expected labels 0, 1, 2, ... without gaps, got {found[0]} to {found[-1]}, {len(found)} "
            "different ones; mend them, or set num_classes if some classes have no example"
        )
    return len(found)


def take(examples: Examples, indices: np.ndarray) -> Examples:
    """The examples at some indices (or under a mask), in that order."""
    return Examples(examples.images[indices], examples.labels[indices])


def stratified_places(labels: np.ndarray) -> np.ndarray:
    """Place of each example when all are sorted by label, equal labels staying in order.

    Every k-th place is a stratified share of 1 / k, whatever the order of the examples, and no random choice is needed.

    Args:
      labels: integers, shape (n,).

    Returns:
      A permutation of 0 .. n - 1, shape (n,).
    """
    return np.argsort(np.argsort(labels, kind="stable"))


def load_digits_dataset() -> Dataset:
    """Load the 1797 real handwritten digits, 8 x 8 pixels of 17 grey levels, that ship with scikit-learn.

    The split is fixed and stratified, 1077 / 360 / 360: of every five digits in the order of their labels, the first
    goes to the test split, the second to validation, the others to training. Networks see pixels in [0, 1]. Digits of
    one writer occur in all three splits.

    Returns:
      The dataset, images of shape (n, 8, 8, 1).

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    # scikit-learn's own file: importing the library takes a second, which every command would wait for.
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    examples = make_examples("digits", pixels / 16, labels)
    return assemble_dataset("digits", {"train": examples}, num_classes=10)


def batches(dataset: Dataset, batch_size: int, seed: int, epoch: int, *, max_shift: int = 0) -> Iterator[Examples]:
    """Yield the training split once, shuffled, in batches of one size; what is left over waits for another epoch.

    Args:
      dataset: whose training split is used.
      batch_size: examples per batch.
      seed, epoch: together they determine order and augmentation, and nothing else does.
      max_shift: each image moves by up to so many pixels in height and in width, background moving in; 0 leaves it be.

    Yields:
      Batches of `batch_size` examples.

    Raises:
      ValueError: batch_size below one or above the size of the training split.
    """
    num_examples = len(dataset.train.labels)
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"expected batch_size in 1..{num_examples}, the training split, got {batch_size}; change it")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(num_examples)
    background = dataset.from_pixels(np.zeros(dataset.input_shape[-1], np.float32))
    for start in range(0, num_examples - batch_size + 1, batch_size):
        images, labels = take(dataset.train, order[start : start + batch_size])
        shifts = rng.integers(-max_shift, max_shift + 1, size=(batch_size, 2))
        yield Examples(shift_images(images, shifts, background), labels)


def shift_images(images: np.ndarray, shifts: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Move each image by whole pixels.

    Args:
      images: shape (n, height, width, channels).
      shifts: integers, shape (n, 2): pixels downwards and to the right.
      background: shape (channels,), what moves in at the border.

    Returns:
      The moved images, shape and dtype of `images`.
    """
    n, height, width, _ = images.shape
    rows = np.arange(height)[:, None] - shifts[:, 0, None, None]
    columns = np.arange(width)[None, :] - shifts[:, 1, None, None]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    moved = images[np.arange(n)[:, None, None], rows % height, columns % width]
    return np.where(inside[..., None], moved, background)
