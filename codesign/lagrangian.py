"""Mappings of many operations chosen together: the least product of summed energy and summed latency.

A product of powers of two positive sums is quasi-concave: over a convex set it is least at an extreme point. Every extreme
point of a sum of convex hulls is a sum of extreme points, one of each operation, all of them cheapest for the same
prices of a joule and a second. So the Lagrangian relaxation, which minimises ``energy + price * latency`` operation by
operation, has no duality gap for EDP and ED2P: going through the prices finds the optimum of all combinations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Choice(NamedTuple):
    """One mapping for every operation.

    Attributes:
      picks: index into the costs of every operation, (operations,).
      energy, latency: sums over the operations.
      value: energy**i * latency**j.
    """

    picks: NDArray[np.intp]
    energy: float
    latency: float
    value: float


def lower_hull(costs: Array) -> NDArray[np.intp]:
    """Indices of the extreme points of (2, n) towards less of both, by rising first cost.

    >>> lower_hull(np.array([[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 2.0, 1.0]])).tolist()
    [0, 2, 3]
    """
    hull: list[int] = []
    for i in np.lexsort((costs[1], costs[0])):
        if hull and costs[1, i] >= costs[1, hull[-1]]:
            continue
        while len(hull) > 1 and _turns_right(costs[:, hull[-2]], costs[:, hull[-1]], costs[:, i]):
            hull.pop()
        hull.append(int(i))
    return np.array(hull, np.intp)


def least_product(
    costs: Sequence[Array], counts: Sequence[float] | None = None, powers: tuple[float, float] = (1.0, 1.0)
) -> Choice:
    """The best combination of one mapping of each operation; EDP by default, ED2P with powers (1, 2).

    Args:
      costs: (energy, latency) of the mappings of each operation, (2, n) each.
      counts: how often each operation runs; once by default.
      powers: of summed energy and summed latency, >= 0.

    Raises:
      ValueError: an operation has no mapping.
    """
    if any(not c.shape[1] for c in costs):
        raise ValueError("expected mappings of every operation, got none for one; search it first")
    times = np.ones(len(costs)) if counts is None else np.asarray(counts, float)
    hulls = [lower_hull(c) for c in costs]
    corners = [n * c[:, hull] for n, c, hull in zip(times, costs, hulls, strict=True)]
    # Walk the hull of the sums from the least energy on: steepest saving of latency per joule first.
    owner = np.repeat(np.arange(len(costs)), [len(hull) - 1 for hull in hulls])
    steps = np.concatenate([np.diff(c, axis=1) for c in corners], axis=1)
    order = np.argsort(steps[1] / steps[0], kind="stable")
    start = np.sum([c[:, 0] for c in corners], axis=0)
    path = start[:, None] + np.concatenate([np.zeros((2, 1)), np.cumsum(steps[:, order], axis=1)], axis=1)
    values = path[0] ** powers[0] * path[1] ** powers[1]
    taken = int(np.argmin(values))
    walked = np.bincount(owner[order[:taken]], minlength=len(costs))
    picks = np.array([hull[i] for hull, i in zip(hulls, walked, strict=True)], np.intp)
    return Choice(picks, float(path[0, taken]), float(path[1, taken]), float(values[taken]))


def _turns_right(a: Array, b: Array, c: Array) -> bool:
    """Whether b lies on or above the line from a to c."""
    return bool((b[0] - a[0]) * (c[1] - a[1]) <= (c[0] - a[0]) * (b[1] - a[1]))
