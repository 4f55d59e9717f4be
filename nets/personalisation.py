"""Personalisation: a network trained on everybody's digits adapts to one writer from a few samples.

The writer is synthetic: real digits that no training saw, in a handwriting of its own, which is a seeded affine map
(slant, rotation, size) and a seeded change of stroke width, the same for all of the writer's digits.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from nets.data import Dataset, Examples, stratified_places, take


@dataclass(frozen=True)
class Writer:
    """A handwriting, as a change to upright digits of average width.

    Fields:
      rotation: of every digit, in radians, anticlockwise on the screen.
      slant: shear along the rows: the top moves right by this share of the height above the centre.
      size: factor on height and width.
      stroke: in [-1, 1]; above 0 strokes thicken by this share of a pixel on each side, below 0 they thin.
    """

    rotation: float
    slant: float
    size: float
    stroke: float


@dataclass(frozen=True)
class Personalisation:
    """Pretrain on `dataset.train`, adapt on `adaptation`, report `evaluation`, and what was forgotten: `dataset.test`.

    Fields:
      dataset: the global set; its test split holds the originals of `evaluation`, none of `adaptation`.
      adaptation: the few digits of the writer that the network may learn from, the same number of each class.
      evaluation: the writer's other digits.
      writer: how the writer writes.
    """

    dataset: Dataset
    adaptation: Examples
    evaluation: Examples
    writer: Writer


def make_writer(seed: int) -> Writer:
    """Draw a handwriting.

    Rotation and slant are uniform in 5 to 12 degrees and 0.05 to 0.2, both to the same side so that they do not cancel;
    the side is a coin toss. Size is uniform in 0.9 to 1.05 and stroke in -0.3 to 0.3.

    Args:
      seed: the same seed gives the same writer.
    """
    rng = np.random.default_rng(seed)
    side = float(rng.choice([-1.0, 1.0]))
    return Writer(
        rotation=-side * math.radians(rng.uniform(5, 12)),
        slant=side * rng.uniform(0.05, 0.2),
        size=rng.uniform(0.9, 1.05),
        stroke=rng.uniform(-0.3, 0.3),
    )


def write(pixels: np.ndarray, writer: Writer) -> np.ndarray:
    """Rewrite digits in a writer's hand.

    Each image is mapped about its centre, by cubic interpolation and background moving in. Then it is blended with
    its dilation (for thicker strokes) or erosion (for thinner ones) over the 3 x 3 neighbourhood.

    Args:
      pixels: shape (n, height, width, channels), in [0, 1], bright strokes on background 0.
      writer: the handwriting.

    Returns:
      The rewritten digits, of the shape and dtype of `pixels`, in [0, 1].
    """
    from scipy import ndimage  # slow to import: only who personalises waits for it

    cos, sin = math.cos(writer.rotation), math.sin(writer.rotation)
    # On (row, column), rows downwards: where the writer puts what stood at an offset from the centre.
    rotate = np.array([[cos, -sin], [sin, cos]])
    slant = np.array([[1.0, 0.0], [-writer.slant, 1.0]])
    source = np.linalg.inv(writer.size * rotate @ slant)
    centre = (np.array(pixels.shape[1:3]) - 1) / 2
    offset = centre - source @ centre
    neighbours = ndimage.grey_dilation if writer.stroke > 0 else ndimage.grey_erosion

    def write_plane(plane: np.ndarray) -> np.ndarray:
        # Cubic splines keep thin strokes bright, but overshoot at their edges: hence the clip.
        moved = np.clip(ndimage.affine_transform(plane, source, offset=offset, order=3), 0.0, 1.0)
        share = abs(writer.stroke)
        return (1 - share) * moved + share * neighbours(moved, size=3)

    planes = np.moveaxis(pixels, -1, 1).reshape(-1, *pixels.shape[1:3])
    written = np.stack([write_plane(plane) for plane in planes])
    n, height, width, channels = pixels.shape
    return np.moveaxis(written.reshape(n, channels, height, width), 1, -1)


def make_personalisation(dataset: Dataset, seed: int, samples_per_class: int = 5) -> Personalisation:
    """Make the task of one synthetic writer out of a dataset's test split.

    Which digits adapt is fixed by the dataset and `samples_per_class`, so writers differ in their handwriting only.

    Args:
      dataset: pretraining uses its training and validation splits; its test split becomes the writer's digits.
      seed: of the writer.
      samples_per_class: digits of each class for adaptation.

    Returns:
      The task. The 360 test digits of the digits dataset give 50 for adaptation and 310 for evaluation.

    Raises:
      ValueError: samples_per_class below one, or so large that less is left for evaluation than for adaptation.
    """
    labels = dataset.test.labels
    per_class = np.bincount(labels, minlength=dataset.num_classes)
    if not 1 <= samples_per_class <= per_class.min() // 2:
        raise ValueError(
            f"expected samples_per_class in 1..{per_class.min() // 2} (half of the rarest class of the test split), "
            f"got {samples_per_class}; change it"
        )
    first_of_class = np.cumsum(per_class) - per_class
    adapts = stratified_places(labels) - first_of_class[labels] < samples_per_class
    writer = make_writer(seed)
    written = dataset.from_pixels(write(dataset.to_pixels(dataset.test.images), writer))
    writer_digits = Examples(written, labels)
    return Personalisation(
        dataset=replace(dataset, test=take(dataset.test, ~adapts)),
        adaptation=take(writer_digits, adapts),
        evaluation=take(writer_digits, ~adapts),
        writer=writer,
    )
