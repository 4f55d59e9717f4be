"""Folders of images: a subfolder for each class, the file formats those that Pillow reads without helpers."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nets.data import Dataset, Examples, assemble_dataset, make_examples

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds images in subfolders, with or without folders of splits above them."""
    roots = [folder / "train"] if (folder / "train").is_dir() else [folder]
    return any(_images(place) for root in roots for place in root.iterdir() if place.is_dir())


def load_image_folder(
    folder: str | Path, *, num_classes: int | None = None, standardise: bool = False, size: int | None = None
) -> Dataset:
    """Load FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png, validation or val if there is one, or FOLDER/CLASS/*.png.

    Classes are numbered in the order of their names, images of a class in the order of theirs. Without a validation
    split every sixth training image, stratified by class, becomes it; without folders of splits the images are split
    three to one to one (`nets.data.assemble_dataset`). Images are grey if all of them are, else RGB; transparency is
    dropped.

    Args:
      folder: where the images are.
      num_classes: number of labels; None counts the classes of the training split.
      standardise: see `nets.data.make_dataset`.
      size: height and width that images are resized to, after their middle square is cut out; None takes them as they
        are, and they must be of one size.

    Returns:
      The dataset, images of shape (n, height, width, 1 or 3).

    Raises:
      ValueError: no images, one that cannot be read or of another size, a class that the training split does not have.
    """
    folder = Path(folder)
    files = {split: _by_class(root) for split, root in _roots(folder).items()}
    classes = list(files["train"])
    for split, found in files.items():
        if other := sorted(set(found) - set(classes)):
            raise ValueError(
                f"{folder}, {split} split: expected classes of the training split, got {other[0]!r}; move it"
            )
    paths = [path for found in files.values() for images in found.values() for path in images]
    if not paths:
        raise ValueError(f"{folder}: expected images in a subfolder for each class, found none; put them there")
    mode = "L" if all(_open(path).mode in ("1", "L", "LA") for path in paths) else "RGB"
    splits = {split: _examples(f"{folder}, {split}", found, classes, mode, size) for split, found in files.items()}
    return assemble_dataset(str(folder), splits, num_classes, standardise)


def _roots(folder: Path) -> dict[str, Path]:
    """Where the classes of each split are; without a training split the folder itself holds them."""
    found = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None)
        for split, names in _SPLITS.items()
    }
    return {s: root for s, root in found.items() if root} if found["train"] else {"train": folder}


def _by_class(root: Path) -> dict[str, list[Path]]:
    """Paths of the images of each class."""
    found = {place.name: _images(place) for place in sorted(root.iterdir()) if place.is_dir()}
    return {name: images for name, images in found.items() if images}


def _images(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())


def _examples(what: str, found: dict[str, list[Path]], classes: list[str], mode: str, size: int | None) -> Examples:
    """One split: images of all classes, bytes."""
    labels = [classes.index(name) for name, paths in found.items() for _ in paths]
    images: list[np.ndarray] = []
    for path in (path for paths in found.values() for path in paths):
        image = _open(path, mode, size)
        if images and image.size != (images[0].shape[1], images[0].shape[0]):
            raise ValueError(
                f"{path}: expected {images[0].shape[1]} x {images[0].shape[0]} pixels as of the images before it, got "
                f"{image.size[0]} x {image.size[1]}; resize them (size=... of load_image_folder does)"
            )
        images.append(np.asarray(image))
    if not images:
        raise ValueError(f"{what} split: expected images, found none; put some there")
    return make_examples(f"{what} split", np.stack(images), np.array(labels, np.int64))


def _open(path: Path, mode: str | None = None, size: int | None = None) -> Image.Image:
    """An image; its pixels are only decoded where a mode is asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of decompression bombs and of damage
            with Image.open(path, formats=_FORMATS) as file:
                if file.mode.startswith(("I", "F")):
                    raise ValueError(f"pixels of more than 8 bits (mode {file.mode})")
                if mode is None:
                    return file
                image = file.convert(mode)
                return image if size is None else ImageOps.fit(image, (size, size))
    except (OSError, SyntaxError, ValueError, EOFError, Warning, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected an image of 8 bits per channel, got {reason}; save it anew") from error
