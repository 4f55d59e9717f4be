"""Images as CSV: a row for each, its label and its pixels."""

from pathlib import Path

import numpy as np

from nets.data import Dataset, Examples, assemble_dataset, make_examples, shape_images

_SPLITS = ("train", "validation", "test")


def load_csv_dataset(path: str | Path, *, num_classes: int | None = None, standardise: bool = False) -> Dataset:
    """Load one CSV file, or a folder with train.csv and test.csv (and validation.csv, if there is one).

    A row is an image: its pixels row by row, channels last, and its label, which is the column called "label" or,
    without a header, the first. Pixels are whole numbers up to 255, or numbers in [0, 1] of which some have a decimal
    point. Images are square: the number of pixels is a square number (grey) or three times one (RGB).

    A single file is split three to one to one; in a folder without validation.csv every sixth training example becomes
    it; both stratified by label (`nets.data.assemble_dataset`).

    Args:
      path: of the file or the folder.
      num_classes: number of labels; None counts those of the training split.
      standardise: see `nets.data.make_dataset`.

    Returns:
      The dataset.

    Raises:
      ValueError: a missing or foreign file, rows of different lengths, what is no number, labels that are no whole
        numbers, NaN, pixels out of range.
    """
    path = Path(path)
    if path.is_dir():
        files = {split: path / f"{split}.csv" for split in _SPLITS}
        splits = {split: _read(file) for split, file in files.items() if split != "validation" or file.is_file()}
    else:
        splits = {"train": _read(path)}
    return assemble_dataset(str(path), splits, num_classes, standardise)


def _read(path: Path) -> Examples:
    """The examples of one file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a CSV file, got {error}; check it") from error
    first, _, rest = text.partition("\n")
    names = [name.strip().strip("\"'") for name in first.split(",")]
    has_header = not _is_number(names[0])
    if has_header and "label" not in names:
        raise ValueError(f"{path}: expected a column 'label' in the header, got {', '.join(names)[:80]}; rename it")
    column = names.index("label") if has_header else 0
    body = rest if has_header else text
    if not body.strip():  # of which loadtxt would warn
        raise ValueError(f"{path}: expected rows with a label and pixels, got none; add them")
    try:
        table = np.loadtxt(body.splitlines(), delimiter=",", ndmin=2, comments=None)
    except ValueError as error:
        reason = str(error).partition(";")[0].partition("\n")[0]
        raise ValueError(f"{path}: expected a row of numbers for each image, got {reason}; mend it") from error
    if len(table) == 0 or table.shape[1] < 2:
        raise ValueError(f"{path}: expected rows with a label and pixels, got a table of {table.shape}; add them")
    labels, pixels = table[:, column], np.delete(table, column, axis=1)
    whole = np.isfinite(labels) & (np.abs(labels) < 2**31) & (labels == np.floor(labels))
    if not whole.all():
        raise ValueError(
            f"{path}: expected labels that are whole numbers, got {labels[~whole][0]:g}; is it the right column?"
        )
    if "." not in body and np.isfinite(pixels).all():
        if pixels.min() < 0 or pixels.max() > 255 or not np.array_equal(pixels, np.floor(pixels)):
            raise ValueError(
                f"{path}: expected pixels from 0 to 255, got {pixels.min():g} to {pixels.max():g}; scale them"
            )
        pixels = pixels.astype(np.uint8)
    return make_examples(str(path), shape_images(str(path), pixels), labels.astype(np.int64))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
