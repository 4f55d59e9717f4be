"""Datasets from anything that Python can loop over: tfds, grain, Hugging Face, torch loaders, lists of arrays."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nets.data import Dataset, Examples, assemble_dataset, make_examples

_IMAGE_KEYS, _LABEL_KEYS = ("image", "images", "img", "pixel_values", "x"), ("label", "labels", "y")


def collect_dataset(
    name: str,
    train: Iterable[Any],
    test: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    *,
    num_classes: int | None = None,
    standardise: bool = False,
    max_items: int | None = None,
) -> Dataset:
    """Go once through streams of examples and keep them in memory.

    An item is a batch or a single example: a pair (images, labels), or a mapping with image, images, img, pixel_values
    or x, and label, labels or y. Images are arrays (height, width) or (height, width, channels), of a batch with an
    axis before them, or whatever NumPy converts (tensors of other libraries, images of Pillow): bytes, or floats in
    [0, 1]. Nothing is shuffled here: `nets.data.batches` does that, by its seed.

    Args:
      name: what it is called in reports and errors.
      train: the training split.
      test, validation: the others; without them see `nets.data.assemble_dataset`.
      num_classes: number of labels; None counts those of the training split.
      standardise: see `nets.data.make_dataset`.
      max_items: items taken of each stream at most; needed for one without end.

    Returns:
      The dataset.

    Raises:
      ValueError: an empty stream, an item that is neither, images of different shapes, and what `make_examples` raises.
    """
    given = {"train": train, "validation": validation, "test": test}
    splits = {
        split: _collect(f"{name}, {split} split", itertools.islice(stream, max_items))
        for split, stream in given.items()
        if stream is not None
    }
    if "validation" in splits and "test" not in splits:
        raise ValueError(f"{name}: expected a test split beside the validation split, got none; give it")
    return assemble_dataset(name, splits, num_classes, standardise)


def _collect(what: str, stream: Iterable[Any]) -> Examples:
    parts: list[Examples] = []
    for number, item in enumerate(stream):
        images, labels = (np.asarray(value) for value in _pair(f"{what}, item {number}", item))
        if labels.ndim == 0:
            images, labels = images[None], labels[None]
        parts.append(make_examples(f"{what}, item {number}", images, labels))
        if parts[-1].images.shape[1:] != parts[0].images.shape[1:]:
            raise ValueError(
                f"{what}, item {number}: expected images of shape {parts[0].images.shape[1:]} as before it, got "
                f"{parts[-1].images.shape[1:]}; resize them"
            )
    if not parts:
        raise ValueError(f"{what}: expected batches or examples, got an empty stream; is it used up already?")
    return Examples(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _pair(what: str, item: Any) -> tuple[Any, Any]:
    """Images and labels of an item."""
    if isinstance(item, Mapping):
        images, labels = (next((key for key in keys if key in item), None) for keys in (_IMAGE_KEYS, _LABEL_KEYS))
        if images is None or labels is None:
            raise ValueError(
                f"{what}: expected an image and a label, got {', '.join(map(str, item))[:80]}; rename them"
            )
        return item[images], item[labels]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise ValueError(f"{what}: expected a pair (images, labels) or a mapping, got {type(item).__name__}; convert it")
