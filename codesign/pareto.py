"""Trade-offs between designs: non-dominated front, hypervolume, knee. Every objective is to be minimised."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats: none is at least as good in all objectives and better in one.

    Args:
      points: (n, m) objectives, finite.

    Returns:
      (n,) mask; equal points stay together.

    Raises:
      ValueError: not a table of finite numbers.
    """
    table = _table(points)
    no_worse = (table[:, None] <= table[None]).all(-1)
    better = (table[:, None] < table[None]).any(-1)
    return ~(no_worse & better).any(0)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between a reference point and what the points dominate; larger is a better set.

    Exact, by slicing along the last objective: m - 1 nested sorts, so up to n**(m - 1) steps.

    Args:
      points: (n, m) objectives, finite; points not better than the reference in every objective add nothing.
      reference: (m,) worst values of interest.

    Raises:
      ValueError: not a table of finite numbers, or a reference of another length.
    """
    table, corner = _table(points), np.asarray(reference, float)
    if corner.shape != table.shape[1:]:
        raise ValueError(
            f"expected a reference with {table.shape[1]} objectives, got shape {corner.shape}; give one value for each"
        )
    return _volume(table[(table < corner).all(1)], corner)


def knee(points: ArrayLike) -> int:
    """Index of the front's point farthest from the plane through its extremes, where a gain starts to cost most.

    Each objective is scaled to [0, 1] over the front; there the farthest point below that plane is the one with the
    smallest sum. Ties go to the first.

    Args:
      points: (n, m) objectives, finite, n >= 1.

    Raises:
      ValueError: not a table of finite numbers, or an empty one.
    """
    table = _table(points)
    if not len(table):
        raise ValueError("expected at least one point, got none; a knee needs a front")
    front = np.flatnonzero(non_dominated(table))
    low, high = table[front].min(0), table[front].max(0)
    width = np.where(high > low, high - low, 1.0)  # an objective that is the same everywhere decides nothing
    return int(front[((table[front] - low) / width).sum(1).argmin()])


def _table(points: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(points, float)
    if table.ndim != 2 or not table.shape[1] or not np.isfinite(table).all():
        raise ValueError(
            f"expected finite objectives of shape (points, objectives), got shape {table.shape} with "
            f"{int((~np.isfinite(table)).sum())} values not finite; leave such points out"
        )
    return table


def _volume(points: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Hypervolume of points that all lie below `corner`."""
    if not len(points):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - points.min())
    ordered = points[points[:, -1].argsort()]
    depths = np.diff(ordered[:, -1], append=corner[-1])
    # Between two values of the last objective, the points seen so far dominate the same cross-section.
    slabs = (depth * _volume(ordered[: index + 1, :-1], corner[:-1]) for index, depth in enumerate(depths) if depth)
    return float(sum(slabs))
