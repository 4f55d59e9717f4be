"""Best-first branch and bound: the boxes that are still open, whatever is in them, and the bound on all answers."""

from __future__ import annotations

import heapq
from itertools import count

import numpy as np


class OpenBoxes[Box]:
    """Boxes still to be split, least bound first.

    A box is closed, and never looked at again, where its bound comes within `tolerance` of the best answer known; the
    least bound of those is remembered, because an answer that good may still lie in one.

    Args:
      tolerance: by which fraction an answer must be better to be looked for; 0 finds the best.
    """

    def __init__(self, tolerance: float = 0.0):
        self.tolerance = tolerance
        self._boxes: list[tuple[float, int, Box]] = []
        self._numbers, self._closed = count(), np.inf

    def __bool__(self) -> bool:
        return bool(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)

    def add(self, bound: float, box: Box, best: float = np.inf) -> None:
        """Keep a box open, or close it if an answer of value `best` leaves nothing to look for."""
        if bound * (1 + self.tolerance) >= best:
            self.close(bound)
        else:
            heapq.heappush(self._boxes, (bound, next(self._numbers), box))

    def close(self, bound: float) -> None:
        """Remember the bound of a box that is not looked at again."""
        self._closed = min(self._closed, bound)

    def pop(self) -> tuple[float, Box]:
        """The box of the least bound, and that bound."""
        bound, _, box = heapq.heappop(self._boxes)
        return bound, box

    def is_done(self, best: float) -> bool:
        """Whether no open box can hold an answer better than `best` by more than the tolerance."""
        return not self._boxes or self._boxes[0][0] * (1 + self.tolerance) >= best

    @property
    def bound(self) -> float:
        """No answer in any box, open or closed, is less; infinite if there was none."""
        return min(self._closed, self._boxes[0][0] if self._boxes else np.inf)
