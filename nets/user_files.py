"""Data by user, as LEAF writes them: JSON with the samples of every user, for learning from some and adapting to others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nets.data import Dataset, Examples, make_dataset, make_examples, shape_images


def load_user_dataset(path: str | Path, *, num_classes: int | None = None, standardise: bool = False) -> Dataset:
    """Load one LEAF file, or all of a folder (also in its subfolders train and test).

    A file is {"users": [...], "num_samples": [...], "user_data": {user: {"x": [[pixel, ...], ...], "y": [label, ...]}}},
    pixels in [0, 1], row by row, of square images, grey or RGB. Samples of a user in several files are joined in the
    order of the files' names, whatever split LEAF made. Splits are by user, so that nobody of the test split was seen
    in training: of every five users in the order of their names the first goes to the test split, the second to
    validation, the others to training.

    Args:
      path: of the file or the folder.
      num_classes: number of labels; None for one more than the largest (a single user need not have them all).
      standardise: see `nets.data.make_dataset`.

    Returns:
      The dataset, with `test_users`: `nets.personalisation` adapts to one of those.

    Raises:
      ValueError: no such files, not JSON of this form, fewer than three users, x and y that do not belong together,
        labels that are no whole numbers, NaN, pixels out of range.

    Source: Caldas et al., LEAF: A benchmark for federated settings, 2019, and its repository.
    """
    path = Path(path)
    files = _files(path)
    if not files:
        raise ValueError(f"{path}: expected JSON files as of LEAF, found none; put them there")
    joined: dict[str, list[Examples]] = {}
    for file in files:
        for user, examples in _read(file).items():
            joined.setdefault(user, []).append(examples)
    if len(joined) < 3:
        raise ValueError(f"{path}: expected at least three users, one for each split, got {len(joined)}; add some")
    users = [_concatenate(str(path), joined[user]) for user in sorted(joined)]
    train = _concatenate(str(path), [examples for i, examples in enumerate(users) if i % 5 >= 2])
    validation, test = (_concatenate(str(path), users[place::5]) for place in (1, 0))
    if num_classes is None:
        num_classes = 1 + max(int(examples.labels.max()) for examples in users)
    dataset = make_dataset(str(path), train, validation, test, num_classes, standardise)
    sizes = [len(examples.labels) for examples in users[::5]]
    return replace(dataset, test_users=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for place in (path, path / "train", path / "test") for file in place.glob("*.json"))


def is_user_folder(folder: Path) -> bool:
    """Whether a folder holds JSON files, itself or in train and test."""
    return bool(_files(folder))


def _read(path: Path) -> dict[str, Examples]:
    """The samples of each user of one file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {str(error)[:80]}; fetch the file again") from error
    by_user = content.get("user_data") if isinstance(content, dict) else None
    if not isinstance(by_user, dict) or not by_user:
        raise ValueError(
            f"{path}: expected 'user_data' with samples by user, as of LEAF, found none; is it the right file?"
        )
    return {user: _user(f"{path}, user {user}", samples) for user, samples in by_user.items()}


def _user(what: str, samples: Any) -> Examples:
    values = [samples.get(key) if isinstance(samples, dict) else None for key in ("x", "y")]
    if not all(isinstance(value, list) and value for value in values):
        raise ValueError(f"{what}: expected lists 'x' and 'y' of samples, found none; mend or remove the user")
    try:
        pixels, labels = (np.array(value, dtype) for value, dtype in zip(values, (np.float64, None), strict=True))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{what}: expected samples of numbers, all of one length, got {str(error)[:80]}; mend them"
        ) from error
    if pixels.ndim == 2:
        pixels = shape_images(what, pixels)
    return make_examples(what, pixels, labels)


def _concatenate(what: str, parts: list[Examples]) -> Examples:
    shapes = {part.images.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"{what}: expected images of one shape, got {', '.join(map(str, sorted(shapes)))}; resize them"
        )
    return Examples(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
