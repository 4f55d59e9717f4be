"""Personalisation: a network trained on everybody's images adapts to one user from a few samples.

Where the data come by user, it is one of those that no training saw. Otherwise it is a synthetic writer: real digits that
no training saw, in a handwriting of its own, which is a seeded affine map (slant, rotation, size) and a seeded change of
stroke width, the same for all of the writer's digits.
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
      dataset: the global set. Of a synthetic writer its test split holds the originals of `evaluation`, none of
        `adaptation`; of a real user it holds the other users of the test split.
      adaptation: the few examples of the user that the network may learn from, of each class the same number, or up to
        half of a real user's.
      evaluation: the user's other examples.
      writer: how a synthetic writer writes; None for a real user.
    """

    dataset: Dataset
    adaptation: Examples
    evaluation: Examples
    writer: Writer | None


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
    """Make the task of one user out of a dataset's test split: a real one where it has `test_users`, else synthetic.

    Which digits adapt is fixed by the dataset and `samples_per_class`, so synthetic writers differ in their handwriting
    only. A real user adapts on the first examples of each class, at most half of them.

    Args:
      dataset: pretraining uses its training and validation splits; its test split becomes the writer's digits, or holds
        the user.
      seed: of the synthetic writer, or which of the users.
      samples_per_class: digits of each class for adaptation, at most.

    Returns:
      The task. The 360 test digits of the digits dataset give 50 for adaptation and 310 for evaluation.

    Raises:
      ValueError: samples_per_class below one, or so large that less is left for evaluation than for adaptation; no such
        user, or one with fewer than two examples of every class.
    """
    if dataset.test_users is not None:
        return _personalise_to_user(dataset, dataset.test_users, seed, samples_per_class)
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


def _personalise_to_user(dataset: Dataset, users: np.ndarray, user: int, samples_per_class: int) -> Personalisation:
    """The task of one of the users of the test split."""
    num_users = int(users.max()) + 1
    if not 0 <= user < num_users or samples_per_class < 1:
        raise ValueError(
            f"expected a user in 0..{num_users - 1} (those of the test split of {dataset.name}) and at least one sample "
            f"per class, got user {user} and {samples_per_class}; choose another"
        )
    own = take(dataset.test, users == user)
    per_class = np.bincount(own.labels, minlength=dataset.num_classes)
    first_of_class = np.cumsum(per_class) - per_class
    place = stratified_places(own.labels) - first_of_class[own.labels]
    adapts = place < np.minimum(samples_per_class, per_class // 2)[own.labels]
    if not adapts.any():
        raise ValueError(
            f"expected two examples of some class from user {user} of {dataset.name}, got none; choose another"
        )
    others = users != user
    return Personalisation(
        dataset=replace(dataset, test=take(dataset.test, others), test_users=users[others]),
        adaptation=take(own, adapts),
        evaluation=take(own, ~adapts),
        writer=None,
    )
